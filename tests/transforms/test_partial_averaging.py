"""Partial and periodic averaging, gradients as uploads, sketched sums."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.fedsgd import fedsgd
from algorithms.scaffold import scaffold
from fedjax_lab.round import nbytes
from fedjax_lab.transforms import local_gradients, partial_averaging, periods
from tests.problems import (
    assert_close,
    assert_same_bits,
    quadratic_data,
    quadratic_model,
    softmax_data,
    softmax_model,
    steps,
)

MODEL = softmax_model()
SGD = optax.sgd(0.1)
FULL = {"batch_size": None, "weighting": "uniform"}
W, B = 4 * 12, 4 * 3  # bytes of the leaves


def built(base, *transforms, sampler=None, data=None):
    return fl.synchronous(fl.compose(base, *transforms), softmax_data() if data is None else data, sampler)


def final(*arguments, rounds=4, **options):
    process = built(*arguments, **options)
    return process.params(steps(process, rounds)[0])


def test_everything_in_every_round_is_the_inner_round_bit_for_bit():
    base, sampler = fedavg(MODEL, SGD), fl.uniform(5)
    assert_same_bits(final(base, partial_averaging(periods({})), sampler=sampler), final(base, sampler=sampler))


@pytest.mark.parametrize("tau", [1, 3])
@pytest.mark.slow
def test_everything_every_tau_rounds_is_local_sgd(tau):
    data, _ = quadratic_data()
    model, sgd = quadratic_model(3), optax.sgd(0.3)
    one = fedavg(model, sgd, steps=1, **FULL)
    periodic = final(one, partial_averaging(periods({}, tau)), rounds=2 * tau, data=data)
    assert_close(periodic, final(fedavg(model, sgd, steps=tau, **FULL), rounds=2, data=data), atol=1e-5)


def test_bytes_are_those_of_the_leaves_that_travel():
    process = built(fedavg(MODEL, SGD), partial_averaging(periods({"params/b": 2})), sampler=fl.fixed([0, 3]))
    state, sent = process.init(jax.random.key(0)), []
    for _ in range(4):
        state, metrics = process.step(state, process.data)
        sent.append((fl.total_bytes(metrics["uplink_bytes"]) // 2, fl.total_bytes(metrics["downlink_bytes"]) // 2))
    versions = 2 * 4  # a number for each leaf
    # Down: all at first, then what was averaged in the round before.
    assert sent == [(W, W + B + versions), (W + B, W + versions), (W, W + B + versions), (W + B, W + versions)]


@pytest.mark.slow
def test_leaves_that_are_not_averaged_stay_with_each_client():
    """Two clients of one row each, by hand: w is averaged, b is each one's own."""
    rows = {0: (np.ones((1, 4)), 0), 1: (-np.ones((1, 4)), 1)}
    data = fl.FederatedData.from_clients(
        {k: {"x": x.astype(np.float32), "y": np.array([y])} for k, (x, y) in rows.items()}
    )
    base = fedavg(MODEL, SGD, steps=1, **FULL)
    process = built(base, partial_averaging(periods({"params/b": 0})), data=data)
    state = process.init(jax.random.key(0))
    start = jax.tree.map(lambda x: np.asarray(x, np.float64), process.params(state))
    w, own = start["w"], [start["b"], start["b"]]
    for _ in range(3):
        state, _ = process.step(state, process.data)
        new = []
        for k, (x, y) in rows.items():
            scores = x[0] @ w + own[k]
            error = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum() - np.eye(3)[y]
            new.append(w - 0.1 * np.outer(x[0], error))
            own[k] = own[k] - 0.1 * error
        w = (new[0] + new[1]) / 2
    assert_close(process.params(state), {"w": np.float32(w), "b": np.float32(start["b"])}, atol=1e-6)
    table = process.clients(state).table
    assert_close(table.own.params["b"], np.float32(own), atol=1e-6)
    assert np.abs(own[0] - own[1]).max() > 0.05
    report = fl.per_client_accuracy(data)(process, state)
    assert {"accuracy", "personal_accuracy"} <= set(report)


def test_one_who_was_away_takes_what_was_averaged_meanwhile():
    """Client 0 trains in rounds 0 and 3 only; the leaf that others averaged in round 1 is new to it, b isn't."""
    data = softmax_data()
    schedule = lambda path, r: jnp.asarray(r == 1) if path == "params/w" else jnp.asarray(r > 5)
    cohorts = jnp.array([[0, 1], [1, 2], [1, 2], [0, 1]])
    sampler = fl.Sampler(
        lambda data: jnp.int32(0), lambda s, key, data, probe: (cohorts[s], jnp.ones(2, bool), s + 1),
        lambda state, ids, ok, metrics: state,
    )  # fmt: skip
    process = built(fedavg(MODEL, SGD, steps=1, **FULL), partial_averaging(schedule), data=data, sampler=sampler)
    state = steps(process, 3)[0]
    before = jax.tree.map(lambda t: t[0], process.clients(state).table)
    server, env = process.server(state), fl.Env(3, jax.random.key(0), jnp.arange(2), True, True, 8, 2)
    client = process.data.view(jnp.int32(0), env)
    message = process.round.broadcast(server, before, client, jax.random.key(0))
    start = process.round.personalize(message, before, client, jax.random.key(0)).params
    assert_same_bits(start["w"], process.params(state)["w"])
    assert_same_bits(start["b"], before.own.params["b"])
    assert np.abs(start["b"] - process.params(state)["b"]).max() > 1e-3
    assert int(nbytes(message.inner)) == W


@pytest.mark.slow
def test_a_servers_momentum_does_not_move_what_is_not_averaged():
    base = fedavg(MODEL, SGD, server_optimizer=optax.sgd(1.0, momentum=0.9))
    process = built(base, partial_averaging(periods({"params/b": 2})))
    one, two, three = (process.params(steps(process, n)[0])["b"] for n in (1, 2, 3))
    assert not one.any() and np.abs(two).max() > 1e-3
    assert_same_bits(two, three)


def test_the_mean_gradient_of_one_step_is_fedsgd():
    base = fedavg(MODEL, optax.sgd(0.7), steps=1, batch_size=None, server_optimizer=optax.sgd(0.1))
    assert_close(final(base, local_gradients(0.7)), final(fedsgd(MODEL, SGD)), atol=1e-6)


@pytest.mark.slow
def test_gradients_of_unequal_work_count_alike_where_updates_do_not():
    """Both clients sit in the same valley; one makes ten times the steps."""
    rows = {k: {"A": np.eye(1)[None], "b": np.full((1, 1), b)} for k, b in enumerate((1.0, -1.0))}
    data = fl.FederatedData.from_clients(rows)
    work = lambda client, key: jnp.where(client.id == 0, 10, 1)
    base = fedavg(quadratic_model(1), optax.sgd(1e-3), steps=work, server_optimizer=optax.sgd(1.0), **FULL)
    update, gradient = final(base, rounds=1, data=data), final(base, local_gradients(1e-3), rounds=1, data=data)
    assert float(update[0]) == pytest.approx((0.00995512 - 0.001) / 2, rel=1e-3)
    assert float(gradient[0]) == pytest.approx((0.995512 - 1) / 2, rel=1e-2)  # almost zero: they pull alike
    recorded = fedavg(quadratic_model(1), fl.recording(optax.sgd(1e-3)), steps=work, **FULL)
    assert_close(final(recorded, local_gradients(), rounds=1, data=data), gradient, atol=1e-5)


@pytest.mark.slow
def test_sketched_sums_go_with_both():
    """A count sketch as large as the vector, decoded once after the sum, is the mean with its collisions alone."""
    link = fl.wire.count_sketch(9, width=60)
    for base in (partial_averaging(periods({"params/b": 2})), local_gradients(0.1)):
        exact, sketched = (final(fedavg(MODEL, SGD, steps=2, batch_size=None), base, *more, rounds=2)
                           for more in ((), (fl.uplink(link),)))  # fmt: skip
        assert_close(sketched, exact, atol=0.1)
        assert np.abs(sketched["w"] - exact["w"]).max() < 0.5 * np.abs(exact["w"]).max()


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: periods({"params/*": -1}), "period of 'params/\\*'"),
        (lambda: periods({}, 1.5), "period of 'default'"),
        (lambda: partial_averaging({"params/b": 2}), "such as periods"),
        (lambda: built(fedavg(MODEL, SGD), partial_averaging(lambda path, r: r)), "must give one truth value"),
        (lambda: built(scaffold(MODEL, SGD), partial_averaging(periods({}))), "shaped as the model"),
        (lambda: built(scaffold(MODEL, SGD), local_gradients(0.1)), "sends something else"),
        (lambda: built(fedavg(MODEL, SGD), fl.uplink(fl.wire.qsgd(4)), partial_averaging(periods({}))), "put it first"),
        (lambda: local_gradients(0), "learning_rate must"),
    ],
)
def test_refusals(call, word):
    with pytest.raises(ValueError, match=word):
        call()
