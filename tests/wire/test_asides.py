"""Single numbers beside a model travel as they are: links would mix them up with its entries."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fednova import fednova
from algorithms.one_shot import one_shot
from algorithms.q_fedavg import q_fedavg
from algorithms.term import term
from fedjax_lab import wire
from fedjax_lab.wire.asides import Beside, sparing_asides
from fedjax_lab.wire.base import shapes
from tests.problems import assert_same_bits, softmax_data, softmax_model, steps

MODEL, SGD = softmax_model(), optax.sgd(0.1)
X = (fl.Variables({"w": jnp.linspace(-1e-3, 1e-3, 12), "s": jnp.float32(1e-3)}, ()), jnp.float32(300.0), jnp.int32(3))
ALGORITHMS = {
    "fednova": (lambda: fednova(MODEL, SGD, epochs=3, batch_size=4), 2),  # one for each leaf
    "q_fedavg": (lambda: q_fedavg(MODEL, SGD, q=1.0, L=10.0, epochs=1, batch_size=4), 1),
    "term": (lambda: term(MODEL, SGD, t=1.0, epochs=1, batch_size=4), 2),
}


def moved(round):
    process = fl.synchronous(round, softmax_data())
    start = process.params(process.init(jax.random.key(0)))
    state, metrics = steps(process, 1)
    change = jax.tree.map(lambda a, b: a - b, process.params(state), start)
    return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(change)]), fl.total_bytes(metrics["uplink_bytes"])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_eight_bits_lose_little_of_what_the_server_does(name):
    make, asides = ALGORITHMS[name]
    plain, _ = moved(make())
    sent, size = moved(fl.compose(make(), fl.uplink(wire.grouped(wire.qsgd(8)))))
    assert jnp.linalg.norm(sent - plain) < 0.05 * jnp.linalg.norm(plain)
    assert size == 8 * (15 + 2 * 4 + 4 * asides)  # codes, two norms, and the numbers
    sent, size = moved(fl.compose(make(), fl.uplink(wire.qsgd(8))))
    assert jnp.linalg.norm(sent - plain) < 0.1 * jnp.linalg.norm(plain)
    assert size == 8 * (15 + 4 + 4 * asides)


def test_one_shot_keeps_the_best_by_their_true_scores():
    make = lambda *links: fl.compose(one_shot(MODEL, SGD, members=2, selection="data", steps=1), *links)
    kept = []
    for round in (make(), make(fl.uplink(wire.top_k(2)))):
        process = fl.synchronous(round, softmax_data())
        state, _ = steps(process, 1)
        server = process.server(state)
        kept.append(getattr(server, "inner", server).scores)
    assert_same_bits(*kept)


def test_beside_what_travels_in_some_rounds_only():
    """TERM's estimate goes down with the model in every round, the mean gradient in every other."""
    rounds = fl.transforms.gradient_rounds(lambda *_: fl.identity, own=False)
    make = lambda *links: fl.compose(term(MODEL, SGD, t=1.0, steps=1, batch_size=None), rounds, *links)
    _, plain = steps(fl.synchronous(make(), softmax_data()), 1)
    process = fl.synchronous(make(fl.downlink(wire.top_k(2), deltas=False)), softmax_data())
    _, metrics = steps(process, 1)
    assert fl.total_bytes(plain["downlink_bytes"]) == 8 * 4 * (15 + 1)
    assert fl.total_bytes(metrics["downlink_bytes"]) == 8 * (int(wire.round_trip(wire.top_k(2), jnp.ones(15))[1]) + 4)


def test_payloads_with_asides():
    link = sparing_asides(wire.error_feedback(wire.sign()))
    memory = link.init_client(shapes(X))
    payload, _, size = link.encode(X, memory, wire.context(0))
    data = wire.serialize(payload)
    assert isinstance(payload, Beside) and len(data) == int(size) == 2 + 4 + 4 + 4  # signs, scale, and two numbers
    got = wire.undo(link, wire.deserialize(data, payload), wire.context(0))
    assert got[1:] == X[1:]
    np.testing.assert_allclose(jnp.abs(got[0].params["w"]), got[0].params["s"], rtol=1e-6)


def test_asides_of_links_that_are_decoded_after_the_sum():
    link = sparing_asides(wire.chain(wire.hadamard(), wire.random_k(1.0)))
    opened = link.open(link.encode(X, (), wire.context(0))[0], wire.context(0))
    half = jax.tree.map(lambda x: x / 2 if jnp.issubdtype(x.dtype, jnp.floating) else x, opened)
    got, _ = link.decode(half, wire.context(0))
    assert got[1] == 150
    np.testing.assert_allclose(got[0].params["w"], X[0].params["w"] / 2, atol=1e-9)


def test_what_has_none_is_as_it_was():
    """A model's own numbers are none, nor are those of an upload without a model."""
    for x in (X[0], {"w": jnp.ones(3), "b": jnp.float32(2.0)}, (jnp.ones(3), jnp.float32(2.0))):
        link = wire.qsgd(8)
        same = [one.encode(x, (), wire.context(0))[0] for one in (sparing_asides(link), link)]
        assert_same_bits(*same)


@pytest.mark.parametrize(
    "link",
    [
        wire.chain(wire.clip(1.0), wire.gaussian(1.0, by="client")),
        wire.chain(wire.clip(1.0), wire.gaussian(1.0)),
        wire.fixed_point(limit=1.0, clients=3),
        wire.fetch_sgd(width=5, k=2),
    ],
)
def test_noise_and_sums_are_given_everything(link):
    assert sparing_asides(link) is link
