"""Adapters: they start as the model itself, follow the chain rule, and nothing frozen travels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.fedlora import fedlora
from algorithms.scaffold import scaffold
from fedjax_lab.transforms import adapters, leaves, private, proximal
from tests.problems import assert_same_bits, softmax_data, steps
from tests.transforms.networks import network

MODEL, RATE = network(), 0.5
BASE = MODEL.init(jax.random.key(7))[0]
DATA = softmax_data((7, 4, 9))
WORK = {"steps": 1, "batch_size": None}
LORA = adapters(MODEL, BASE, rank=2, alpha=6)


def test_training_starts_from_the_base_bit_for_bit():
    start = LORA.model.init(jax.random.key(0))[0]
    assert_same_bits(LORA.merge(start), BASE)
    assert {name: jax.tree.map(jnp.shape, tuple(a)) for name, a in start.items()} == {
        "hidden/kernel": ((4, 2), (2, 6)),
        "output/kernel": ((6, 2), (2, 3)),
    }
    assert float(jnp.abs(start["hidden/kernel"].a).min()) > 0


def test_two_rounds_by_hand():
    """Gradient steps on ``W + 3 a b`` in NumPy, from jax.grad of the plain network; everything else stays."""
    process = fl.synchronous(fl.compose(fedavg(LORA.model, optax.sgd(RATE), **WORK), LORA.merged), DATA)
    state = process.init(jax.random.key(0))
    ours = jax.tree.map(np.asarray, process.server(state).variables.params)
    sizes = np.array([7, 4, 9])
    for _ in range(2):
        state, _ = process.step(state, process.data)
        whole = jax.tree.map(np.array, BASE)
        for name, (a, b) in ours.items():
            whole[name.split("/")[0]]["kernel"] = BASE[name.split("/")[0]]["kernel"] + 3 * a @ b
        total = jax.tree.map(np.zeros_like, ours)
        for k, size in enumerate(sizes):
            arrays = DATA.client(DATA.ids[k]).arrays
            mean = lambda p, arrays=arrays: jnp.mean(MODEL.loss(p, (), arrays, None, None, True)[0])
            grads = jax.grad(mean)(whole)
            for name, (a, b) in ours.items():
                g = np.asarray(grads[name.split("/")[0]]["kernel"])
                total[name] = type(ours[name])(
                    total[name].a + size / 20 * 3 * g @ b.T, total[name].b + size / 20 * 3 * a.T @ g
                )
        ours = jax.tree.map(lambda x, g: x - RATE * g, ours, total)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), process.server(state).variables.params, ours)
    # What the process gives is the whole model, with the base's biases.
    merged = process.params(state)
    np.testing.assert_allclose(
        merged["output"]["kernel"],
        BASE["output"]["kernel"] + 3 * ours["output/kernel"].a @ ours["output/kernel"].b,
        atol=2e-6,
    )
    assert_same_bits(merged["hidden"]["bias"], BASE["hidden"]["bias"])
    expected = float(MODEL.metrics(merged, (), DATA.arrays)["loss"].mean())
    assert fl.global_metrics(DATA)(process, state)["loss"] == pytest.approx(expected, rel=1e-5)


def travelling(round):
    """Shapes of what a client is sent and sends, abstractly."""
    data = DATA.on_device()

    def turn(key):
        server, client = round.init(key, data), data.view(jnp.int32(0))
        state = round.init_client(server, client)
        message = round.broadcast(server, state, client, key)
        env = fl.cohort.make_env(jnp.int32(0), key, jnp.arange(3), jnp.ones(3, bool), 3)
        return message, round.client_update(message, state, data.view(jnp.int32(0), env), key).upload

    return [[leaf.shape for leaf in jax.tree.leaves(part)] for part in jax.eval_shape(turn, jax.random.key(0))]


@pytest.mark.parametrize(
    "over", ["scaffold", "private", *(pytest.param(n, marks=pytest.mark.slow) for n in ("fedavg", "fedprox"))]
)
def test_nothing_frozen_travels(over):
    sgd = optax.sgd(RATE)
    round = {
        "fedavg": lambda: fedavg(LORA.model, sgd),
        "fedprox": lambda: fl.compose(fedavg(LORA.model, sgd), proximal(0.1)),
        "scaffold": lambda: scaffold(LORA.model, sgd),
        "private": lambda: fl.compose(fedavg(LORA.model, sgd), private(leaves("*/b"))),
    }[over]()
    round = fl.compose(round, LORA.merged)
    mine = [(4, 2), (6, 2)] if over == "private" else [(4, 2), (2, 6), (6, 2), (2, 3)]
    for shapes in travelling(round):
        assert sorted(shapes) == sorted(mine * (2 if over == "scaffold" else 1))
    fl.synchronous(round, DATA)  # the whole round has stable types


@pytest.mark.slow
def test_bytes_with_links_and_a_head_that_is_trained_whole():
    round = fedlora(MODEL, optax.sgd(RATE), base=BASE, rank=1, predicate=leaves("hidden/*"), whole=leaves("output/*"))
    wire = fl.wire
    process = fl.synchronous(fl.compose(round, fl.uplink(wire.qsgd(8)), fl.downlink(wire.qsgd(8), deltas=False)), DATA)
    state, metrics = steps(process, 2)
    size = (4 + 6) + (6 * 3 + 3)
    sent = int(wire.round_trip(wire.qsgd(8), jnp.ones(size))[1])
    assert fl.total_bytes(metrics["uplink_bytes"]) == fl.total_bytes(metrics["downlink_bytes"]) == 3 * sent
    assert_same_bits(process.params(state)["hidden"]["bias"], BASE["hidden"]["bias"])
    assert (process.params(state)["output"]["bias"] != BASE["output"]["bias"]).all()
    assert fl.per_client_accuracy(DATA)(process, state)["accuracy"] > 0


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: adapters(MODEL, BASE, rank=0), "rank must be an integer of at least 1"),
        (lambda: adapters(MODEL, BASE, rank=4), "rank 4 is above that of output/kernel, 3"),
        (lambda: adapters(MODEL, BASE, rank=1, alpha=0), "alpha must"),
        (lambda: adapters(MODEL, BASE, rank=1, predicate=leaves("dense/*")), "names none of"),
        (
            lambda: adapters(network(5), BASE, rank=1).model.init(jax.random.key(0)),
            "base has hidden/bias of shape \\(6,\\), and the model of shape \\(5,\\)",
        ),
        (lambda: fl.compose(fedlora(MODEL, optax.sgd(0.1), base=BASE, rank=1), proximal(0.1)), "put `merged` behind"),
        (lambda: fl.compose(fedlora(MODEL, optax.sgd(0.1), base=BASE, rank=1), private(leaves("*/b"))), "go together"),
    ],
)
def test_refusals(call, word):
    with pytest.raises(ValueError, match=word):
        call()
