"""Magnitude pruning by hand: the schedule, the global threshold, what stays zero, and the bytes of what is left."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedadam import fedadam
from algorithms.fedavg import fedavg
from algorithms.local_only import local_only
from algorithms.scaffold import scaffold
from fedjax_lab.transforms import control_variates, leaves, personal_model, private, pruning
from tests.problems import softmax_data, steps
from tests.transforms.networks import descent, network

MODEL, RATE = network(), 0.5
WORK = {"steps": 2, "batch_size": None}
BASE = fedavg(MODEL, optax.sgd(RATE), **WORK)
DATA = softmax_data((7, 4, 9))
KERNELS, BIASES = 4 * 6 + 6 * 3, 6 + 3


def magnitudes(params):
    return np.concatenate([np.abs(np.ravel(params[name]["kernel"])) for name in ("hidden", "output")])


def by_hand(params, masks):
    """A round of FedAvg whose networks are zero, and stay so, where ``masks`` are."""
    model = MODEL._replace(
        loss=lambda p, *rest: MODEL.loss(jax.tree.map(lambda x, m: x * m, p, masks), *rest),
    )
    sizes, total = np.array([7, 4, 9]), jax.tree.map(lambda x: 0.0, params)
    for k, size in enumerate(sizes):
        moved = descent(model, params, DATA.client(DATA.ids[k]).arrays, RATE, 2)
        total = jax.tree.map(lambda t, m, size=size: t + size / sizes.sum() * m, total, moved)
    return total


@pytest.fixture(scope="module")
def process():
    """60 % of the kernels in the end: nothing after round 0, 0.525 of all after 2, 0.6 after 4."""
    return fl.synchronous(fl.compose(BASE, pruning(0.6, start=0, end=4, every=2)), DATA)


def test_the_schedule_the_threshold_and_local_training_by_hand(process):
    state = process.init(jax.random.key(0))
    masks = jax.tree.map(lambda x: np.ones(x.shape), process.params(state))
    gone = {0: 0, 2: int(0.6 * (1 - 0.5**3) * KERNELS), 4: int(0.6 * KERNELS)}
    for t in range(6):
        expected = by_hand(process.params(state), masks)
        state, metrics = process.step(state, process.data)
        if t in gone:
            largest = np.sort(magnitudes(expected))[gone[t]]
            for name in ("hidden", "output"):
                masks[name]["kernel"] = (np.abs(expected[name]["kernel"]) >= largest).astype(float)
        expected = jax.tree.map(lambda x, m: np.asarray(x) * m, expected, masks)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), process.params(state), expected)
        count = int((magnitudes(process.params(state)) == 0).sum())
        assert count == gone[t - t % 2 if t < 4 else 4]
        assert float(metrics["sparsity"]) == pytest.approx(count / KERNELS, abs=1e-6)


def test_bytes_are_of_what_is_left_and_a_mask_travels_when_it_is_news(process):
    state = process.init(jax.random.key(0))
    left, versions = KERNELS, []
    mask, header = -(-KERNELS // 8), 4
    gone = {2: int(0.6 * (1 - 0.5**3) * KERNELS), 4: int(0.6 * KERNELS)}
    for t in range(6):
        state, metrics = process.step(state, process.data)
        each = 4 * (left + BIASES)
        news = mask if t - 1 in gone else 0
        assert fl.total_bytes(metrics["uplink_bytes"]) == 3 * each
        assert fl.total_bytes(metrics["downlink_bytes"]) == 3 * (each + header + news)
        left = KERNELS - gone.get(t, KERNELS - left)
        versions.append(int(process.server(state).version))
    assert versions == [0, 0, 1, 1, 2, 2]  # what keeps everything at first is no news, nor is a mask that stays
    assert set(np.asarray(process.clients(state).table.version)) == {2}


@pytest.mark.slow
def test_a_client_that_missed_the_news_gets_it_later():
    cohorts = jnp.array([[0, 1], [0, 1], [0, 1], [1, 2]])
    sampler = fl.Sampler(
        lambda data: jnp.int32(0),
        lambda state, key, data, probe: (cohorts[state], jnp.ones(2, bool), state),
        lambda state, ids, ok, metrics: state + 1,
    )
    process = fl.synchronous(fl.compose(BASE, pruning(0.5, start=0, end=0, every=1)), DATA, sampler)
    state, seen = process.init(jax.random.key(0)), []
    for _ in range(4):
        state, metrics = process.step(state, process.data)
        seen.append(fl.total_bytes(metrics["downlink_bytes"]))
    whole, pruned, mask = 4 * (KERNELS + BIASES) + 4, 4 * (KERNELS // 2 + BIASES) + 4, -(-KERNELS // 8)
    assert seen == [2 * whole, 2 * (pruned + mask), 2 * pruned, 2 * pruned + mask]  # client 2 meets it in the last


def test_no_sparsity_is_the_inner_round():
    assert fl.compose(BASE, pruning(0.0)) is BASE


@pytest.mark.slow
@pytest.mark.parametrize("over", ["fedadam", "scaffold", "links"])
def test_what_is_pruned_stays_zero_over_and_under_others(over):
    prune = pruning(0.5, start=0, end=0, every=1)
    wire = fl.wire
    rounds = {
        "fedadam": lambda: fl.compose(fedadam(MODEL, optax.sgd(RATE), **WORK), prune, personal_model(0.1)),
        "scaffold": lambda: fl.compose(scaffold(MODEL, optax.sgd(RATE), **WORK), prune),
        # A quantized broadcast, as changes of what each client has, and runs of zeros coded on the way up.
        "links": lambda: fl.compose(
            BASE, prune, fl.uplink(wire.qsgd(8), wire.elias(runs=True)), fl.downlink(wire.quantize(8))
        ),
    }
    process = fl.synchronous(rounds[over](), DATA)
    state = process.init(jax.random.key(0))
    state, first = process.step(state, process.data)
    zero = magnitudes(process.params(state)) == 0
    assert zero.sum() == KERNELS // 2
    for _ in range(2):
        state, metrics = process.step(state, process.data)
    np.testing.assert_array_equal(magnitudes(process.params(state)) == 0, zero)
    up = fl.total_bytes(metrics["uplink_bytes"])
    models = 2 if over == "scaffold" else 1  # its control variates are shaped as the model, and pruned with it
    if over == "links":
        assert up < fl.total_bytes(first["uplink_bytes"])
    else:
        assert up == 3 * 4 * models * (KERNELS // 2 + BIASES)
    assert np.isfinite(float(metrics["loss"]))


@pytest.mark.slow
def test_a_predicate_chooses_the_kernels():
    prune = pruning(0.5, start=0, end=0, every=1, predicate=leaves("params/hidden/kernel"))
    process = fl.synchronous(fl.compose(BASE, prune), DATA)
    state, metrics = steps(process, 1)
    kernel = np.asarray(process.params(state)["hidden"]["kernel"])
    assert (kernel == 0).sum() == 12 and (np.asarray(process.params(state)["output"]["kernel"]) != 0).all()
    assert float(metrics["sparsity"]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: pruning(1.0), "sparsity must be below 1"),
        (lambda: pruning(-0.1), "sparsity must"),
        (lambda: pruning(0.5, start=5, end=2), "ends after it starts"),
        (lambda: pruning(0.5, every=0), "every must"),
        (
            lambda: fl.synchronous(fl.compose(BASE, pruning(0.5, predicate=leaves("Dense_7/*"))), DATA),
            "nothing to prune",
        ),
        (lambda: fl.compose(local_only(MODEL, optax.sgd(0.1)), pruning(0.5)), "sends none"),
        (lambda: fl.compose(BASE, fl.uplink(fl.wire.qsgd(8)), pruning(0.5)), "put fl.uplink behind it"),
        (lambda: fl.compose(BASE, private(leaves("*/bias")), pruning(0.5)), "don.t go together"),
        (lambda: fl.compose(BASE, pruning(0.5), private(leaves("*/bias"))), "don't go together"),
        (lambda: fl.compose(BASE, pruning(0.5), control_variates(learning_rate=0.1)), "put it first"),
    ],
)
def test_refusals(call, word):
    with pytest.raises(ValueError, match=word):
        call()
