"""What is told of a client's turn, held in one row of float32, comes back as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lab.cohort import make_env
from fedjax_lab.facts import facts

MOST = 2**32 - 1


@pytest.mark.parametrize("sent", [0, 1, 0xFFFF, 0x10000, 2**24 + 1, 2**31 + 12345, MOST])
def test_bytes_come_back_exactly(sent):
    told = jax.jit(facts)(True, True, 1.0, jnp.uint32(sent), jnp.uint32(MOST - sent), {})
    assert told.bytes_up.dtype == told.bytes_down.dtype == jnp.uint32
    assert (int(told.bytes_up), int(told.bytes_down)) == (sent, MOST - sent)


def test_each_number_comes_back_of_several_clients():
    alive, counted = np.array([True, True, False]), np.array([True, False, False])
    weight, loss = np.float32([0.1, 1e-30, np.inf]), np.float32([-0.0, np.nan, 3e38])
    zeros = jnp.zeros(3, jnp.uint32)
    told = jax.vmap(facts)(alive, counted, weight, zeros, zeros, {"loss": loss, "accuracy": weight})
    assert told.row.shape == (3, 9)
    np.testing.assert_array_equal(told.alive, alive)
    np.testing.assert_array_equal(told.counted, counted)
    bits = lambda x: np.asarray(x, np.float32).view(np.uint32)
    np.testing.assert_array_equal(bits(told.weight), bits(weight))
    np.testing.assert_array_equal(bits(told.metrics["loss"]), bits(loss))
    np.testing.assert_array_equal(bits(told.metrics["accuracy"]), bits(weight))


def test_weights_and_metrics_have_derivatives():
    def total(x):
        told = facts(x > 0, x > 0, x**2, jnp.uint32(7), jnp.uint32(7), {"loss": 3 * x})
        return told.weight + told.metrics["loss"]

    assert jax.grad(total)(2.0) == 7.0


@pytest.mark.parametrize("cohort", [1, 100, 128, 129, 300])  # up to 128 are compared each with each, more are sorted
def test_a_client_is_invited_once(cohort):
    ids = np.random.default_rng(cohort).integers(-2, cohort, cohort)
    first = np.array([i not in ids[:place] for place, i in enumerate(ids)])
    env = jax.jit(make_env, static_argnums=4)(0, jax.random.key(0), jnp.asarray(ids), True, cohort - 1)
    np.testing.assert_array_equal(env.invited, first & (ids >= 0) & (ids < cohort - 1))
    np.testing.assert_array_equal(env.ids, np.where(env.invited, ids, cohort - 1))
