"""Streaming is synchronous, bit for bit, whatever lies where."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms import fedavg, scaffold
from fedjax_lab import fetching, stored, streaming
from fedjax_lab.process import HostStep
from fedjax_lab.state_leaves import state_digest
from tests.problems import SIZES, softmax_data, softmax_model


def plain(**options):
    return fedavg.fedavg(softmax_model(), optax.sgd(0.1), epochs=1, batch_size=5, **options)


def stateful():
    return fedavg.fedavg(
        softmax_model(), optax.sgd(0.05, momentum=0.9), epochs=1, batch_size=5, keep_optimizer_state=True
    )


def controlled():
    return scaffold.scaffold(softmax_model(), optax.sgd(0.1), epochs=1, batch_size=5)


def waiting(cohort: int) -> fl.Sampler:
    """A sampler whose next cohort hangs on who survived."""
    inner = fl.dropout(fl.uniform(cohort), 0.3)

    def sample(state, key, data, probe):
        ids, present, _ = inner.sample((), key, data, probe)
        return (ids + state) % data.num_clients, present, state

    return fl.Sampler(
        lambda data: inner.init(data) or np.int32(0), sample, lambda state, ids, ok, metrics: state + ok.sum()
    )


ROUNDS = {"fedavg": plain, "fedavg with state": stateful, "scaffold": controlled}
SAMPLERS = {
    "uniform": lambda: fl.uniform(3),
    "everyone": fl.everyone,
    "dropout": lambda: fl.dropout(fl.uniform(5), 0.5),
    "waiting": lambda: waiting(4),
}


def both(make, sampler, data, rounds, lanes=2):
    """Last states, and metrics with a digest of the state after every round."""
    out = []
    for process in (fl.synchronous(make(), data, sampler, lanes), fl.streamed(make(), data, sampler, lanes)):
        state = process.init(jax.random.key(1))
        log = []
        for _ in range(rounds):
            state, metrics = process.step(state, process.data)
            log.append(jax.device_get(metrics) | {"bits": state_digest(state)})
        out.append((state, log))
    return out


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    ("make", "sampler"),
    [
        ("fedavg", "everyone"),
        ("fedavg with state", "dropout"),
        ("fedavg", "waiting"),
        pytest.param("scaffold", "uniform", marks=pytest.mark.slow),
    ],
)
def test_the_same_bits_as_synchronous(make, sampler):
    (a, log_a), (b, log_b) = both(ROUNDS[make], SAMPLERS[sampler](), softmax_data(SIZES, empty=2), 20)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(log_a, log_b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


@pytest.mark.usefixtures("optimized")
def test_a_stored_data_set_is_streamed_by_synchronous_and_run(tmp_path):
    data = softmax_data()
    there = fl.FederatedData.open(data.save(tmp_path / "set"))
    process = fl.synchronous(stateful(), there, fl.uniform(3))
    assert isinstance(process.step, HostStep)
    result = fl.run(process, 7, every=3)
    expected = fl.run(fl.synchronous(stateful(), data, fl.uniform(3)), 7, every=3)
    assert state_digest(result.state) == state_digest(expected.state)
    assert result.metrics == expected.metrics
    assert result.uplink_bytes == expected.uplink_bytes > 0


def test_a_resumed_run_gives_the_same_bits(tmp_path):
    there = fl.FederatedData.open(softmax_data().save(tmp_path / "set"))
    made = lambda: fl.synchronous(stateful(), there, fl.uniform(3))
    whole = fl.run(made(), 9, every=2)
    fl.run(made(), 4, every=2, out=tmp_path / "run")
    result = fl.run(made(), 9, every=2, out=tmp_path / "run")
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(result.state.clients))
    assert state_digest(result.state) == state_digest(whole.state)
    with pytest.raises(ValueError, match="program was"):
        fl.run(fl.synchronous(stateful(), there, fl.uniform(4)), 12, out=tmp_path / "run")
    other = softmax_data(seed=3)
    with pytest.raises(ValueError, match=r"setup|data"):
        fl.run(fl.streamed(stateful(), other, fl.uniform(3)), 12, out=tmp_path / "run")


def test_varying_cohorts_are_compiled_once():
    traces = []
    model = softmax_model()
    loss = lambda *arguments: traces.append(0) or model.loss(*arguments)
    round = fedavg.fedavg(model._replace(loss=loss), optax.sgd(0.1), epochs=1, batch_size=5)
    process = fl.streamed(round, softmax_data(SIZES, empty=3), fl.uniform(4))
    state, _ = process.step(process.init(jax.random.key(0)), process.data)
    count = len(traces)
    for _ in range(10):
        state, _ = process.step(state, process.data)
    assert len(traces) == count > 0


def test_only_the_next_round_is_fetched_ahead_and_only_if_it_is_known(monkeypatch):
    pieces = []
    original = ThreadPoolExecutor.submit
    rows = lambda pool, call, *a: call is fetching.fetch and pieces.append(call)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *a: rows(*a) or original(*a))
    for sampler, expected in ((fl.uniform(3), 6), (waiting(3), 5)):
        process = fl.streamed(plain(), softmax_data(), sampler)
        state = process.init(jax.random.key(0))
        pieces.clear()
        for _ in range(5):
            state, _ = process.step(state, process.data)
        assert len(pieces) == expected


def test_stepping_twice_from_one_state():
    """Without client states a step is a pure function; with them it says that they have moved on."""
    process = fl.streamed(plain(), softmax_data(), fl.uniform(3))
    state = process.init(jax.random.key(0))
    first, second = (process.step(state, process.data)[0] for _ in range(2))
    assert state_digest(first) == state_digest(second)
    process = fl.streamed(stateful(), softmax_data(), fl.uniform(3))
    state = process.init(jax.random.key(0))
    kept = state._replace(clients=jax.tree.map(np.array, state.clients))
    first, _ = process.step(state, process.data)
    digest = state_digest(first)
    with pytest.raises(ValueError, match="handed on"):
        process.step(state, process.data)
    assert state_digest(process.step(kept, process.data)[0]) == digest


def test_only_the_cohorts_rows_are_read():
    data = softmax_data()
    poisoned = {"x": data.arrays["x"].copy(), "y": data.arrays["y"]}
    keep = np.concatenate([np.arange(int(data.starts[k]), int(data.starts[k] + data.sizes[k])) for k in (1, 4)])
    poisoned["x"][np.setdiff1d(np.arange(len(poisoned["x"])), keep)] = np.nan
    bad = fl.FederatedData(poisoned, data.starts, data.sizes, {}, data.id_table, data.max_size, data.tile)
    for set_ in (data, bad):
        process = fl.streamed(plain(), set_, fl.fixed([4, 1]))
        _, metrics = process.step(process.init(jax.random.key(0)), process.data)
        assert metrics["survivors"] == 2
    fetched = fetching.fetch(fetching.population_of(bad, 2), fl.Env(0, None, np.array([4, 1]), *[None] * 4))
    assert fetched.data.arrays["x"].shape == (53, 4)  # the two largest clients have 30 and 23 rows
    np.testing.assert_array_equal(fetched.data.arrays["x"][:12], data.client("c1").arrays["x"])
    np.testing.assert_array_equal(fetched.data.arrays["x"][12:20], data.client("c4").arrays["x"])
    assert not np.any(fetched.data.arrays["x"][20:])


def test_clients_may_lie_in_any_order():
    """Three clients of two rows at 0, 10 and 4: the last row is six behind the first, and yet they lie apart."""
    ids = fl.FederatedData.from_assignment({"x": np.ones(3)}, np.arange(3)).id_table
    starts, sizes = np.array([0, 10, 4], np.int32), np.array([2, 2, 2], np.int32)
    data = fl.FederatedData({"x": np.arange(12.0, dtype=np.float32)}, starts, sizes, {}, ids, 2, 2)
    fetched = fetching.fetch(fetching.population_of(data, 3), fl.Env(0, None, np.arange(3), *[None] * 4))
    assert fetched.data.arrays["x"].tolist() == [0, 1, 10, 11, 4, 5]
    assert fetched.data.view(jnp.int32(2)).take(jnp.arange(2))["x"].tolist() == [4, 5]


def test_what_can_not_be_streamed_is_refused():
    process = fl.streamed(plain(), softmax_data(), fl.uniform(3))
    state = process.init(jax.random.key(0))
    with pytest.raises(ValueError, match="can't be traced"):
        jax.jit(process.step)(state, process.data)
    probing = fl.Sampler(lambda data: (), lambda s, key, data, probe: (jnp.arange(3), probe(jnp.arange(3)) > 0, s))
    with pytest.raises(ValueError, match="not in memory"):
        streaming.streamed(plain(), softmax_data(), probing)
    streamed: Any = fl.streamed
    with pytest.raises(ValueError, match="takes a Round first"):
        streamed(fedavg.fedavg, softmax_data())
    with pytest.raises(ValueError, match="cohort_size 9 is larger"):
        fl.streamed(plain(), softmax_data(), fl.uniform(9))


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_two_hundred_thousand_clients_with_state(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(2_000_000, 4)).astype(np.float32), "y": rng.integers(0, 3, 2_000_000)}
    data = fl.FederatedData.from_assignment(arrays, np.repeat(np.arange(200_000), 10))
    there = fl.FederatedData.open(data.save(tmp_path / "set"))
    assert stored.mapped(there)
    result = fl.run(fl.synchronous(stateful(), there, fl.uniform(100)), 3)
    expected = fl.run(fl.synchronous(stateful(), data, fl.uniform(100)), 3)
    assert state_digest(result.state) == state_digest(expected.state)
