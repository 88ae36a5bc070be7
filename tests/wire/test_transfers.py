"""Bytes of each client, and the seconds they take."""

import jax
import numpy as np
import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab import wire
from tests.problems import SIZES, softmax_data, softmax_model, steps
from tests.refusals import raises, refused

BASE = fedavg(softmax_model(), optax.sgd(0.1), weighting="uniform")
PAYLOAD, WHOLE = 3 * 4 + 2, 4 * 15


def test_bytes_and_seconds_by_hand():
    """Each way 0.5 s, 14 bytes up at 7 a second, 60 down at each client's own rate."""
    rates = np.array([10.0, 20, 30, 40, 50, 60, 60, 60])
    round = fl.compose(BASE, fl.uplink(wire.top_k(3)), fl.transfers(up=7.0, down=rates, latency=0.5))
    _, metrics = steps(fl.synchronous(round, softmax_data()), 1)
    assert float(metrics["upload_size"]) == PAYLOAD
    assert float(metrics["download_size"]) == WHOLE
    np.testing.assert_allclose(metrics["transfer_seconds"], 1 + PAYLOAD / 7 + np.mean(WHOLE / rates), rtol=1e-6)


def test_sizes_of_messages_that_travel_encoded():
    round = fl.compose(BASE, fl.downlink(wire.qsgd(8)), fl.transfers())
    process = fl.synchronous(round, softmax_data())
    state, first = steps(process, 1)
    _, second = process.step(state, process.data)
    assert float(first["download_size"]) == WHOLE
    assert float(second["download_size"]) == 15 + 4
    assert "transfer_seconds" not in first


def test_samplers_see_each_clients_own_seconds():
    """Such as deadlines: the metrics of single clients are theirs to read."""
    data = fl.FederatedData.from_clients(
        {k: {"x": np.ones((n, 4), np.float32), "y": np.zeros(n, np.int64)} for k, n in enumerate(SIZES)},
    )
    rates = np.arange(1.0, 9.0)
    seen = []
    inner = fl.everyone()

    def update(state, ids, ok, metrics):
        jax.debug.callback(lambda i, s: seen.append((np.asarray(i), np.asarray(s))), ids, metrics["transfer_seconds"])
        return inner.update(state, ids, ok, metrics)

    process = fl.synchronous(fl.compose(BASE, fl.transfers(up=rates)), data, inner._replace(update=update))
    steps(process, 1)
    jax.effects_barrier()
    ids, seconds = seen[0]
    np.testing.assert_allclose(seconds, WHOLE / rates[ids], rtol=1e-6)


def test_rates_that_make_no_sense():
    raises(lambda: fl.transfers(up=0), "up", "positive")
    raises(lambda: fl.transfers(down=[1.0, -1.0]), "down", "positive")
    raises(lambda: fl.transfers(latency=-0.1), "latency", "at least 0")
    raises(lambda: fl.transfers(up=[]), "up", "one for each client")
    raises(lambda: fl.transfers(up={"a": 1.0}), "up", "one for each client")
    few = fl.compose(BASE, fl.transfers(up=[1.0, 2.0]))
    refused(lambda: fl.synchronous(few, softmax_data()), "2 clients", "population of 8")
    clients = {k: {"x": np.ones((2, 4), np.float32), "y": np.zeros(2, np.int64)} for k in range(2)}
    still = fl.FederatedData.from_clients(clients, attrs={"speed": np.array([1.0, 0.0])})
    named = fl.compose(BASE, fl.transfers(down="speed"))
    refused(lambda: fl.synchronous(named, still), "down", "'speed'", "positive")
    raises(lambda: fl.transfers(up=float("nan")), "up")
    build = lambda: fl.synchronous(fl.compose(BASE, fl.transfers(up="bandwith")), softmax_data())
    raises(build, "no attribute 'bandwith'")


def test_rates_are_checked_within_a_sweep_over_something_else_too():
    build = lambda up: lambda swept: [fl.transfers(up=up, latency=0.1), swept][1]
    jax.eval_shape(build([1e6, 2e6]), 0.1)
    raises(lambda: jax.eval_shape(build(0.0), 0.1), "up", "positive")
