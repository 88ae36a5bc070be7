"""Clipping and fixed point hold their bounds, in any type and at the edges."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lab import wire
from fedjax_lab.wire.base import shapes
from tests.refusals import refused
from tests.wire.table import context

_clip = jax.jit(lambda x, c: wire.clip(c).encode(x, (), None)[0])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@hypothesis.settings(max_examples=350)
@hypothesis.given(
    st.lists(st.floats(-6e4, 6e4, width=16), min_size=9, max_size=9), st.floats(1e-3, 1e3, allow_subnormal=False)
)
def test_clipped_is_no_longer_than_the_bound(dtype, values, most):
    """|clip(x)| <= C (1 + 4 eps), directions kept; zeros stay zero, and what is short enough keeps its bits."""
    x = {"a": jnp.asarray(values[:5], dtype), "b": jnp.asarray(values[5:], dtype).reshape(2, 2)}
    got = _clip(x, most)
    flat = lambda t: np.concatenate([np.asarray(v, np.float64).ravel() for v in jax.tree.leaves(t)])
    norm, eps = np.linalg.norm(flat(x)), float(jnp.finfo(dtype).eps)
    tiny = float(jnp.finfo(dtype).smallest_subnormal) * 9
    assert np.linalg.norm(flat(got)) <= most * (1 + 4 * eps) + tiny
    assert got["a"].dtype == dtype
    if norm < most * (1 - 1e-6):
        np.testing.assert_array_equal(flat(got), flat(x))


def test_what_is_no_number_is_not_hidden_by_clipping():
    for bad in (jnp.nan, jnp.inf):
        assert not np.isfinite(wire.clip(1.0).encode(jnp.array([1.0, bad]), (), None)[0]).all()


@pytest.mark.parametrize("bits", [8, 12, 16, 20, 32])
@pytest.mark.parametrize("stochastic", [True, False])
def test_sums_of_integers_are_exact_at_the_edge(bits, stochastic):
    """Every client at the limit, all of one sign: no wrap, and a sum that is right to a step for each client."""
    clients, limit = 9, 1.5
    link = wire.fixed_point(bits, limit=limit, clients=clients, stochastic=stochastic)
    step = limit / ((2 ** (bits - 1) - 1) // clients - (1 if stochastic else 0))
    x = jnp.array([limit, -limit, 0.0, 0.3, -0.7])
    total, truth = jnp.uint32(0), np.zeros(5)
    for k in range(clients):
        ctx = context(jax.random.key(k), ())
        payload, state, _ = link.encode(x, link.init_client(shapes(x)), ctx)
        assert np.isfinite(state)
        opened = link.open(payload, ctx)
        total = total + opened.code
        truth += np.asarray(x)
    got = link.decode(opened.__class__(total, (), opened.like), ctx)[0]
    assert np.abs(np.asarray(got) - truth).max() <= clients * step * 1.01 + 1e-5


@pytest.mark.parametrize("value", [1.6, -1.6, np.nan, np.inf, 1e38])
def test_what_does_not_fit_is_flagged(value):
    link = wire.fixed_point(16, limit=1.5, clients=9)
    _, state, _ = link.encode(jnp.array([0.0, value]), link.init_client(None), context(jax.random.key(0), ()))
    assert np.isnan(state)


def test_overflow_is_refused_when_built():
    """Clients x range against the modulus: promise 23."""
    refused(lambda: wire.fixed_point(4, limit=1.0, clients=8), "8 clients overflows 4 bits")
    refused(lambda: wire.fixed_point(16, limit=1.0, clients=100, step=1e-3), "overflow 16 bits", "take 18 bits")
    wire.fixed_point(18, limit=1.0, clients=100, step=1e-3)
    refused(lambda: wire.fixed_point(33, limit=1.0, clients=2), "2 to 32 bits")
    refused(lambda: wire.fixed_point(limit=0.0, clients=2), "limit", "positive")
    refused(lambda: wire.fixed_point(limit=1.0, clients=0), "clients", "positive")
