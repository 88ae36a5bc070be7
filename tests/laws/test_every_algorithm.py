"""Laws that hold for every algorithm of the table: the engine equals the slow oracle, for every number of
lanes and order of clients, compiles once, and keeps its state's types."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_lab as fl
from tests.compiling import compiled_once
from tests.laws.table import ALGORITHMS, ALWAYS, sometimes
from tests.problems import FEW_SHAPES, assert_close, assert_same_bits, assert_seeds_vmap, softmax_data, steps

COHORT = fl.uniform(5)


@pytest.mark.parametrize("name", sometimes(*ALWAYS))
def test_engine_is_the_oracle_whatever_the_lanes(name):
    data, round = softmax_data(FEW_SHAPES, empty=1), ALGORITHMS[name].make()
    slow = fl.oracle_run(round, data, COHORT, num_rounds=3, seed=0)
    for lanes in (1, 2, 5) if name in ("fedavg", "fedavg_adam_kept") else (2,):
        process = fl.synchronous(round, data, COHORT, lanes=lanes)
        with compiled_once():
            state, metrics = steps(process, 3)
        assert_close(process.server(state), slow.server, atol=2e-6, rtol=1e-5)
        for k, expected in slow.clients.items():
            mine = jax.tree.map(lambda t, k=k: t[k], process.clients(state).table)
            assert_close(mine, expected, atol=2e-6, rtol=1e-5)
        last = slow.metrics[-1]
        assert int(metrics["survivors"]) == last["survivors"]
        assert fl.total_bytes(metrics["uplink_bytes"]) == last["uplink_bytes"]
        np.testing.assert_allclose(float(metrics["loss"]), last["loss"], rtol=1e-5)
        # The state kept its shapes, types and weak types.
        assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, process.init(jax.random.key(1)))


@pytest.mark.parametrize("name", ["fedavg", "fedavg_adam_kept", "fedadam"])
def test_the_order_of_clients_does_not_matter(name):
    data, round = softmax_data(), ALGORITHMS[name].make()
    forward = np.array([0, 2, 3, 5, 6])
    a = fl.synchronous(round, data, fl.fixed(forward))
    b = fl.synchronous(round, data, fl.fixed(forward[::-1]), lanes=2)
    (sa, _), (sb, _) = steps(a, 3), steps(b, 3)
    assert_close(a.server(sa), b.server(sb), atol=1e-6, rtol=1e-5)
    assert_close(a.clients(sa), b.clients(sb), atol=1e-6, rtol=1e-5)


def test_scanned_and_vmapped_rounds_are_the_stepped_ones():
    data = softmax_data()
    process = fl.synchronous(ALGORITHMS["fedadam"].make(), data, COHORT)
    stepped = steps(process, 4)[0]
    body = lambda state, _: process.step(state, process.data)
    scanned = jax.jit(lambda s: jax.lax.scan(body, s, length=4)[0])(process.init(jax.random.key(0)))
    assert_close(process.server(stepped), process.server(scanned))
    assert_seeds_vmap(process)


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    data = softmax_data()
    process = fl.synchronous(ALGORITHMS["fedavg"].make(), data, COHORT)
    again = fl.synchronous(ALGORITHMS["fedavg"].make(), data, COHORT)
    first, second = steps(process, 3)[0], steps(again, 3)[0]
    assert_same_bits(first, second)
    other = steps(process, 3, seed=1)[0]
    assert not np.allclose(process.params(first)["w"], process.params(other)["w"])
