"""Federated dropout and width slices against networks that are really smaller, entry by entry."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedadam import fedadam
from algorithms.fedavg import fedavg
from algorithms.federated_dropout import federated_dropout as dropout_of_fedavg
from algorithms.heterofl import heterofl
from algorithms.local_only import local_only
from algorithms.scaffold import scaffold
from fedjax_lab.models.base import Variables
from fedjax_lab.transforms import (
    apfl,
    control_variates,
    coupling,
    federated_dropout,
    fine_tuning,
    hidden_units,
    lag_wk,
    leaves,
    personal_model,
    private,
    width_slices,
)
from fedjax_lab.transforms.units import by_rule
from tests.problems import assert_close, assert_same_bits, softmax_data, steps
from tests.transforms.networks import HIDDEN, descent, network

MODEL, RATE, STEPS = network(), 0.5, 2
WORK = {"steps": STEPS, "batch_size": None}
BASE = fedavg(MODEL, optax.sgd(RATE), **WORK)
DATA = softmax_data((7, 4, 9))
RATES = np.array([0.3, 0.5, 0.8])  # 2, 3 and 5 of 6 units


def part_of(params, units):
    """The network with these hidden units."""
    return {
        "hidden": {"kernel": params["hidden"]["kernel"][:, units], "bias": params["hidden"]["bias"][units]},
        "output": {"kernel": params["output"]["kernel"][units], "bias": params["output"]["bias"]},
    }


def expected_round(params, units_of_client):
    """One round by hand: each client trains its small network, each entry is averaged over who had it."""
    total = jax.tree.map(lambda x: np.zeros(x.shape), params)
    weight = jax.tree.map(lambda x: np.zeros(x.shape), params)
    for k, units in units_of_client.items():
        arrays = DATA.client(DATA.ids[k]).arrays
        small = part_of(params, units)
        moved = jax.tree.map(lambda a, b: np.asarray(b - a), small, descent(MODEL, small, arrays, RATE, STEPS))
        size = len(arrays["y"])
        for place in (total, weight):
            add = moved if place is total else jax.tree.map(np.ones_like, moved)
            place["hidden"]["kernel"][:, units] += size * add["hidden"]["kernel"]
            place["hidden"]["bias"][units] += size * add["hidden"]["bias"]
            place["output"]["kernel"][units] += size * add["output"]["kernel"]
            place["output"]["bias"] += size * add["output"]["bias"]
    return jax.tree.map(lambda p, t, w: np.asarray(p) + t / np.maximum(w, 1), params, total, weight)


def entries(units: int) -> int:
    return 4 * units + units + 3 * units + 3


def test_width_slices_train_networks_that_are_really_smaller():
    process = fl.synchronous(heterofl(MODEL, optax.sgd(RATE), rate=RATES, **WORK), DATA)
    state = process.init(jax.random.key(1))
    start = process.params(state)
    state, metrics = process.step(state, process.data)
    counts = dict(enumerate((2, 3, 5)))
    expected = expected_round(start, {k: np.arange(n) for k, n in counts.items()})
    assert_close(process.params(state), expected, atol=2e-6)
    assert_same_bits(process.params(state)["hidden"]["bias"][5], start["hidden"]["bias"][5])  # nobody's
    assert np.abs(process.params(state)["hidden"]["bias"][:5] - start["hidden"]["bias"][:5]).min() > 1e-5
    sizes = sum(4 * entries(n) for n in counts.values())
    assert fl.total_bytes(metrics["uplink_bytes"]) == sizes
    assert fl.total_bytes(metrics["downlink_bytes"]) == sizes + 3 * 4  # and each client's rate


@pytest.mark.slow
def test_evaluation_is_of_the_whole_model_and_of_each_client_s_own_width():
    process = fl.synchronous(heterofl(MODEL, optax.sgd(RATE), rate=RATES, **WORK), DATA)
    state, counts = process.init(jax.random.key(1)), dict(enumerate((2, 3, 5)))
    report = fl.per_client_accuracy(DATA)(process, state)
    own = [
        MODEL.metrics(part_of(process.params(state), np.arange(n)), (), DATA.client(DATA.ids[k]).arrays)["accuracy"]
        for k, n in counts.items()
    ]
    assert report["personal_accuracy"] == pytest.approx(float(np.concatenate(own).mean()), abs=1e-6)
    assert report["accuracy"] == pytest.approx(
        float(MODEL.metrics(process.params(state), (), DATA.arrays)["accuracy"].mean()), abs=1e-6
    )


def drawn_units(process, state, k: int) -> np.ndarray:
    """Which units client ``k`` is sent in the next round: those whose biases, all different, are in its message."""
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.round), 1)
    server = jax.tree.map(jnp.asarray, process.server(state))
    message = process.round.broadcast(
        server, (), process.data.view(jnp.int32(k)), jax.random.fold_in(jax.random.fold_in(key, k), 0)
    )
    bias = np.asarray(process.params(state)["hidden"]["bias"])
    return np.array([int(np.flatnonzero(bias == b)[0]) for b in message.inner.params["hidden"]["bias"]])


def test_federated_dropout_trains_random_networks_that_are_really_smaller():
    process = fl.synchronous(dropout_of_fedavg(MODEL, optax.sgd(RATE), rate=0.5, **WORK), DATA)
    params = MODEL.init(jax.random.key(1))[0]
    params["hidden"]["bias"] = jnp.linspace(-0.3, 0.3, HIDDEN)
    state, seen = process.init(jax.random.key(1), params), []
    for _ in range(2):
        units = {k: drawn_units(process, state, k) for k in range(3)}
        assert all(len(set(u)) == len(u) == 3 for u in units.values())
        seen += [tuple(sorted(u)) for u in units.values()]
        expected = expected_round(process.params(state), units)
        state, metrics = process.step(state, process.data)
        assert_close(process.params(state), expected, atol=2e-6)
    assert len(set(seen)) > 2  # by client and round
    assert fl.total_bytes(metrics["uplink_bytes"]) == 3 * 4 * entries(3)
    assert fl.total_bytes(metrics["downlink_bytes"]) == 3 * (4 * entries(3) + 4)  # and what names the part


@pytest.mark.slow
def test_evaluation_of_federated_dropout_is_of_the_whole_model():
    process = fl.synchronous(fl.compose(BASE, federated_dropout(0.5)), DATA)
    state = process.init(jax.random.key(1))
    report = fl.per_client_accuracy(DATA)(process, state)
    whole = MODEL.metrics(process.params(state), (), DATA.arrays)["accuracy"]
    assert report["accuracy"] == pytest.approx(float(whole.mean()), abs=1e-6)
    assert "personal_accuracy" not in report


def test_full_width_is_the_inner_round():
    assert fl.compose(BASE, width_slices(1.0)) is BASE
    assert fl.compose(BASE, federated_dropout(1)) is BASE


@pytest.mark.slow
def test_full_widths_one_by_one_are_the_inner_round():
    one = fl.synchronous(fl.compose(BASE, width_slices(np.ones(3))), DATA)
    plain = fl.synchronous(BASE, DATA)
    assert_close(one.params(steps(one, 2)[0]), plain.params(steps(plain, 2)[0]), atol=1e-6)


@pytest.mark.slow
def test_entries_that_nobody_had_stay_whatever_the_server_optimizer_does():
    adam = fedadam(MODEL, optax.sgd(RATE), **WORK)
    process = fl.synchronous(fl.compose(adam, width_slices(0.5)), DATA)
    state = process.init(jax.random.key(0))
    start = process.params(state)
    for _ in range(2):
        state, metrics = process.step(state, process.data)
    end = process.params(state)
    assert_same_bits(end["hidden"]["kernel"][:, 3:], start["hidden"]["kernel"][:, 3:])
    assert_same_bits(end["output"]["kernel"][3:], start["output"]["kernel"][3:])
    assert np.abs(end["hidden"]["kernel"][:, :3] - start["hidden"]["kernel"][:, :3]).min() > 1e-3
    assert fl.total_bytes(metrics["downlink_bytes"]) == 3 * 4 * entries(3)  # one rate for all: nothing names the part


@pytest.mark.slow
def test_links_compress_what_is_left_of_federated_dropout():
    """Caldas et al. compress the smaller model both ways, by a rotation and a quantizer."""
    wire = fl.wire
    both = fl.uplink(wire.hadamard(), wire.qsgd(8)), fl.downlink(wire.qsgd(8), deltas=False)
    process = fl.synchronous(fl.compose(BASE, federated_dropout(0.5), *both), DATA)
    _, metrics = steps(process, 2)
    small = jax.tree.map(jnp.ones_like, part_of(MODEL.init(jax.random.key(0))[0], np.arange(3)))
    up = wire.round_trip(wire.chain(wire.hadamard(), wire.qsgd(8)), small)[1]
    down = wire.round_trip(wire.qsgd(8), small)[1]
    assert fl.total_bytes(metrics["uplink_bytes"]) == 3 * int(up)
    assert fl.total_bytes(metrics["downlink_bytes"]) == 3 * (int(down) + 4)
    assert np.isfinite(float(metrics["loss"]))


# ---- which axes count units ----


class Norms(nn.Module):
    """Units that are normalised together can't be left out; those behind can, and those that two layers share."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.LayerNorm()(nn.relu(nn.Dense(8, name="mixed")(x)))
        x = nn.relu(nn.Dense(6, name="first")(x))
        x = x + nn.relu(nn.Dense(6, name="second")(x))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(3, name="output")(nn.Dropout(0.5, deterministic=not train)(x))


def units_of(model, shape):
    batch = {"x": jax.ShapeDtypeStruct((2, *shape), jnp.float32), "y": jax.ShapeDtypeStruct((2,), jnp.int32)}
    variables = jax.eval_shape(lambda key, b: Variables(*model.init_from(key, b)), jax.random.key(0), batch)
    return hidden_units(model.loss, variables, batch)


def test_units_of_a_convolutional_network():
    units = units_of(fl.models.emnist_cnn(), (28, 28, 1))
    assert dict(units.sizes) == {"conv_0": 32, "conv_1": 64, "dense": 128}
    table = units.shown()
    assert table["conv_0"] == {"params/conv_0/bias": [0], "params/conv_0/kernel": [3], "params/conv_1/kernel": [2]}
    assert table["conv_1"] == {"params/conv_1/bias": [0], "params/conv_1/kernel": [3], "params/dense/kernel": [0]}
    # 12 x 12 pixels, channels last.
    names = [name for name, _ in fl.checks.named_leaves(units.like.shapes())]
    rows = units.leaves[names.index("params/dense/kernel")][0]
    assert math.prod(n for n, group in rows if group is None) == 144 and rows[-1] == (64, "conv_1")


def test_units_are_tied_by_what_the_equations_do():
    table = units_of(fl.models.from_flax(Norms(), num_classes=3), (4,)).shown()
    assert list(table) == ["first"]
    assert set(table["first"]) == {
        *(f"params/{layer}/{leaf}" for layer in ("first", "second") for leaf in ("kernel", "bias")),
        *(f"params/norm/{leaf}" for leaf in ("scale", "bias")),
        *(f"model_state/batch_stats/norm/{leaf}" for leaf in ("mean", "var")),
        "params/output/kernel",
    }
    assert table["first"]["params/second/kernel"] == [0, 1] and table["first"]["params/first/kernel"] == [1]


def test_a_part_of_a_convolutional_network_is_the_paper_s_corner():
    """Shapes of the message, abstractly: half of the channels, and their pixels' rows in the dense layer."""
    data = fl.FederatedData.from_clients({"a": {"x": np.zeros((2, 8, 8, 1), np.float32), "y": np.zeros(2, np.int32)}})
    round = fl.compose(fedavg(fl.models.emnist_cnn(10), optax.sgd(0.1)), width_slices(0.5))

    def message(key):
        server, client = round.init(key, data), data.on_device().view(jnp.int32(0))
        return round.broadcast(server, (), client, key).inner.params

    shapes = jax.tree.map(jnp.shape, jax.eval_shape(message, jax.random.key(0)))
    assert shapes["conv_0"] == {"kernel": (3, 3, 1, 16), "bias": (16,)}
    assert shapes["conv_1"] == {"kernel": (3, 3, 16, 32), "bias": (32,)}
    assert shapes["dense"] == {"kernel": (2 * 2 * 32, 64), "bias": (64,)}
    assert shapes["output"] == {"kernel": (64, 10), "bias": (10,)}


def rule(path, shape):
    return {"params/hidden/kernel": (None, "h"), "params/hidden/bias": ("h",), "params/output/kernel": ("h", None)}.get(
        path
    )


def test_a_rule_of_one_s_own_finds_the_same():
    variables = Variables(*MODEL.init(jax.random.key(0)))
    found, told = hidden_units(MODEL.loss, variables, DATA.arrays), by_rule(rule, variables)
    assert found.sizes == (("hidden", 6),) and told.sizes == (("h", 6),)
    renamed = [[tuple((n, g and "h") for n, g in axis) for axis in axes] for axes in found.leaves]
    assert [list(axes) for axes in told.leaves] == renamed
    fl.synchronous(fl.compose(BASE, width_slices(0.5, units=rule)), DATA)


LATE = fl.compose(BASE, width_slices(0.5))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: federated_dropout(0.0), "needs a rate above 0"),
        (lambda: width_slices(1.5), "needs a rate above 0"),
        (lambda: width_slices([0.5, 0.0]), "needs a rate above 0"),
        (lambda: width_slices(None), "needs a rate above 0"),
        (lambda: fl.synchronous(fl.compose(BASE, width_slices([0.5, 1.0])), DATA), "rates of 2 clients"),
        (lambda: fl.synchronous(fl.compose(BASE, width_slices("speed")), DATA), "no attribute 'speed'"),
        (lambda: fl.synchronous(fl.compose(BASE, width_slices(0.5, units=lambda p, s: None)), DATA), "names no group"),
        (
            lambda: fl.synchronous(fl.compose(BASE, width_slices(0.5, units=lambda p, s: ("h",) * len(s))), DATA),
            "gives",
        ),
        (
            lambda: fl.synchronous(
                fl.compose(fedavg(fl.models.logistic_regression(3), optax.sgd(0.1)), width_slices(0.5)), DATA
            ),
            "found no hidden units",
        ),
        (lambda: fl.compose(local_only(MODEL, optax.sgd(0.1)), width_slices(0.5)), "trains none"),
        (lambda: fl.compose(BASE, fl.uplink(fl.wire.qsgd(8)), federated_dropout(0.5)), "put fl.uplink behind it"),
        (lambda: fl.compose(BASE, private(leaves("*/bias")), width_slices(0.5)), "one whole model"),
        (lambda: fl.compose(LATE, private(leaves("*/bias"))), "don't go together"),
        (lambda: fl.compose(BASE, personal_model(0.1), width_slices(0.5)), "put it first"),
        (lambda: fl.compose(LATE, control_variates(learning_rate=0.1)), "don't go together"),
        (lambda: fl.synchronous(fl.compose(scaffold(MODEL, optax.sgd(0.1)), width_slices(0.5)), DATA), "one change"),
        (lambda: fl.compose(BASE, fine_tuning(), federated_dropout(0.5)), "Ditto, .* go with width_slices"),
        (lambda: fl.compose(BASE, federated_dropout(0.5), personal_model(0.1)), "take width_slices"),
        (lambda: fl.compose(BASE, federated_dropout(0.5), apfl()), "take width_slices"),
        (lambda: fl.compose(BASE, federated_dropout(0.5), coupling(0.1)), "take width_slices"),
        (lambda: fl.compose(BASE, federated_dropout(0.5), lag_wk(instead="nothing")), "take width_slices"),
        (
            lambda: fl.compose(BASE, federated_dropout(0.5), fl.uplink(fl.wire.error_feedback(fl.wire.top_k(0.1)))),
            "remembers entries",
        ),
        (lambda: fl.compose(BASE, federated_dropout(0.5), fl.downlink(fl.wire.qsgd(8))), "deltas=False"),
    ],
)
def test_refusals(call, word):
    with pytest.raises(ValueError, match=word):
        call()


@pytest.mark.parametrize("transform", [fl.transforms.width_slices, fl.transforms.federated_dropout])
def test_a_sweep_over_rates_counts_the_bytes_of_each_ones_own_run(transform):
    """Where all have one rate, nobody is told it, whether it is known when the program is made or not."""

    def make(rate):
        algorithm = fl.compose(fedavg(network(), optax.sgd(0.1), batch_size=10), transform(rate))
        return fl.synchronous(algorithm, softmax_data(), fl.uniform(2))

    cell, own = fl.sweep(make, 1, [0], rate=[0.25]).cell(), fl.run(make(0.25), 1)
    assert (cell.uplink_bytes, cell.downlink_bytes) == (own.uplink_bytes, own.downlink_bytes)
