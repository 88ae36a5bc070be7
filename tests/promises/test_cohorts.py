"""Promises 7, 8, 10, 11 and 12: cohorts of every shape, compiled once, clients kept apart."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedadam import fedadam
from algorithms.fedavg import fedavg
from algorithms.fedprox import fedprox
from tests.problems import assert_close, assert_same_bits, softmax_data, softmax_model, steps

MODEL = softmax_model()
MOMENTUM = optax.sgd(0.1, momentum=0.9)
STATEFUL = fedavg(MODEL, MOMENTUM, keep_optimizer_state=True)


def given_slots(slots: int) -> fl.Sampler:
    """A sampler whose state is the cohort itself, valid or not: ids and who is present."""
    start = (jnp.zeros(slots, jnp.int32), jnp.ones(slots, bool))
    return fl.Sampler(lambda data: start, lambda state, key, data, probe: (*state, state))


@pytest.fixture(scope="module")
def slotted():
    """One compiled step for any eight slots of the shared population, one of whose clients is empty."""
    process = fl.synchronous(STATEFUL, softmax_data(empty=1), given_slots(8), lanes=3)
    return process, process.init(jax.random.key(0))


def run(slotted, ids, present=None):
    process, state = slotted
    ids = jnp.asarray(ids, jnp.int32)
    present = jnp.ones(len(ids), bool) if present is None else jnp.asarray(present)
    return process.step(state._replace(sampler=(ids, present)), process.data)


def test_padding_slots_change_no_bit(slotted):
    """Promise 7: the same four clients with padding anywhere behind, between and of any kind."""
    process, _ = slotted
    n = process.data.num_clients
    plain, metrics = run(slotted, [1, 3, 5, 6, n, n, n, n])
    for ids in ([n, 1, n, 3, n, 5, n, 6], [1, 3, 5, 6, -1, n, n + 7, -99], [1, 3, n, n, n, n, 5, 6]):
        padded, more = run(slotted, ids)
        assert_same_bits(plain._replace(sampler=()), padded._replace(sampler=()))
        assert int(metrics["invited"]) == int(more["invited"]) == 4


def test_permuted_slots_agree(slotted):
    plain, _ = run(slotted, [0, 1, 2, 3, 4, 5, 6, 7])
    other, _ = run(slotted, [6, 2, 7, 0, 5, 3, 1, 4])
    assert_close(plain.server, other.server)
    assert_close(plain.clients, other.clients)


@hypothesis.settings(max_examples=500, derandomize=True)
@hypothesis.given(
    st.lists(st.integers(-3, 12), min_size=8, max_size=8), st.lists(st.booleans(), min_size=8, max_size=8)
)
def test_state_is_written_for_those_who_took_part_and_for_no_one_else(slotted, ids, present):
    """Promise 11: duplicates and out-of-range ids included, 500 cohorts."""
    process, before = slotted
    n = process.data.num_clients
    after, metrics = run(slotted, ids, present)
    seen = {}
    for k, here in zip(ids, present, strict=True):
        if 0 <= k < n and k not in seen:
            seen[k] = here
    took_part = [k for k, here in seen.items() if here]
    assert int(metrics["invited"]) == len(seen)
    assert sorted(np.flatnonzero(after.clients.known)) == sorted(took_part)
    for old, new in zip(jax.tree.leaves(before.clients.table), jax.tree.leaves(after.clients.table), strict=True):
        others = [k for k in range(n) if k not in took_part]
        np.testing.assert_array_equal(np.asarray(old)[others], np.asarray(new)[others])


@pytest.mark.parametrize("ids", [[0, 0], [9], [-1], [], [0.5]])
def test_bad_ids_of_a_fixed_cohort_raise(ids):
    with pytest.raises(ValueError, match=r"(more than once|outside the population|non-empty list)"):
        fl.synchronous(STATEFUL, softmax_data(empty=1), fl.fixed(ids))


@pytest.mark.parametrize("make", ["fedavg", "fedadam"])
def test_an_empty_round_changes_nothing_at_all(make):
    """Promise 10: everybody dropped, or only empty clients; server moments included."""
    data = softmax_data(empty=2)
    round = {"fedavg": STATEFUL, "fedadam": fedadam(MODEL, optax.sgd(0.1))}[make]
    process = fl.synchronous(round, data, given_slots(3))
    state = process.init(jax.random.key(0))
    ids = jnp.array([0, 1, 2], jnp.int32)
    # First a real round, so that the server's moments are not zero.
    state, _ = process.step(state._replace(sampler=(ids, jnp.ones(3, bool))), process.data)
    empties = jnp.array([data.num_clients - 1, data.num_clients - 2, data.num_clients], jnp.int32)
    for chosen, present in ((ids, jnp.zeros(3, bool)), (empties, jnp.ones(3, bool))):
        after, metrics = process.step(state._replace(sampler=(chosen, present)), process.data)
        assert_same_bits(after.server, state.server)
        assert int(metrics["survivors"]) == 0
        assert np.isnan(metrics["loss"])  # nobody measured one
    assert int(after.round) == int(state.round) + 1


@pytest.mark.parametrize("sizes", [(1,), (7,), (1, 1, 1)])
def test_one_client_and_one_row_train(sizes):
    process = fl.synchronous(STATEFUL, softmax_data(sizes))
    state, metrics = steps(process, 3)
    assert np.isfinite(metrics["loss"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(process.params(state)))


def test_a_population_with_empty_clients_trains_like_one_without():
    with_empty = fl.synchronous(fedavg(MODEL, optax.sgd(0.1)), softmax_data(empty=3), fl.fixed(range(11)))
    without = fl.synchronous(fedavg(MODEL, optax.sgd(0.1)), softmax_data(), fl.fixed(range(8)), lanes=8)
    a, b = steps(with_empty, 2)[0], steps(without, 2)[0]
    assert_close(with_empty.params(a), without.params(b))


def test_a_hundred_rounds_are_compiled_once():
    """Promise 8: Python runs the loss while tracing only, so its calls are counted."""
    traced = []

    def loss(*args):
        traced.append(1)
        return MODEL.loss(*args)

    process = fl.synchronous(fedprox(MODEL._replace(loss=loss), MOMENTUM, mu=0.1), softmax_data(), fl.uniform(3))
    state = process.init(jax.random.key(0))
    state, _ = process.step(state, process.data)
    first = len(traced)
    cohorts = set()
    for _ in range(99):
        state, metrics = process.step(state, process.data)
        cohorts.add(float(metrics["loss"]))
    assert len(traced) == first
    assert len(cohorts) > 50  # the cohorts did vary


def test_a_clients_result_depends_on_its_own_data_alone(slotted):
    """Promise 12: change client j's rows; every other client's state keeps its bits."""
    process, state = slotted
    ids = (jnp.arange(8, dtype=jnp.int32), jnp.ones(8, bool))
    before, _ = process.step(state._replace(sampler=ids), process.data)
    for j in (0, 3):
        low, high = int(process.data.starts[j]), int(process.data.starts[j] + process.data.sizes[j])
        x = process.data.arrays["x"].at[low:high].multiply(-3.0)
        changed = dataclasses.replace(process.data, arrays=process.data.arrays | {"x": x})
        after, _ = process.step(state._replace(sampler=ids), changed)
        for old, new in zip(jax.tree.leaves(before.clients.table), jax.tree.leaves(after.clients.table), strict=True):
            others = [k for k in range(9) if k != j]
            np.testing.assert_array_equal(np.asarray(old)[others], np.asarray(new)[others])
            assert not np.array_equal(np.asarray(old)[j], np.asarray(new)[j])


@pytest.mark.parametrize("population", ["one_giant", "many"])
def test_a_round_needs_no_more_memory_for_what_else_the_population_holds(population):
    """Ten small clients' round among 1,000 alike, next to one giant, and among 200,000: the same buffers.

    Next to a giant, clients are read in larger pieces (32 rows, not 10), which costs some kB and no more.
    """

    def temporary(sizes):
        x = np.zeros((sum(sizes), 4), np.float32)
        owner = np.repeat(np.arange(len(sizes)), sizes)
        data = fl.FederatedData.from_assignment({"x": x, "y": np.zeros(len(x), np.int32)}, owner)
        process = fl.synchronous(fedavg(MODEL, optax.sgd(0.1), batch_size=None, steps=2), data, fl.uniform(10))
        shapes = jax.eval_shape(lambda: process.init(jax.random.key(0)))
        return process.step.lower(shapes, process.data).compile().memory_analysis().temp_size_in_bytes

    small = temporary([10] * 1000)
    other = {"one_giant": [10] * 999 + [50_000], "many": [10] * 200_000}[population]
    assert temporary(other) <= 4 * small
    assert 4 * small < 100_000  # the giant's rows alone are 800,000 bytes
