"""What links make of very small and very large entries: the same, on another scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lab import wire
from fedjax_lab.wire.base import float_norm
from tests.problems import assert_close

X = jax.random.normal(jax.random.key(0), (20, 15))
LINKS = {
    "qsgd": wire.qsgd(4),
    "qsgd in blocks": wire.grouped(wire.qsgd(4), size=64),
    "eden": wire.eden(2),
    "drive": wire.drive(unbiased=False),
    "kashin": wire.chain(wire.kashin(), wire.quantize(6)),
    "factorize": wire.factorize(3),
    "low_rank": wire.low_rank(3, iterations=2),
    "power_sgd": wire.power_sgd(3),
    "terngrad": wire.terngrad(2.5),
    "sign": wire.sign(),
    "natural": wire.natural(),
    "top_k": wire.top_k(0.1),
    "count_sketch": wire.count_sketch(3, width=50),
}


@functools.cache
def arriving(name: str):
    return jax.jit(lambda x: wire.round_trip(LINKS[name], x)[0])


@pytest.mark.parametrize("name", LINKS)
def test_a_scale_is_only_a_scale(name):
    arrives = arriving(name)
    usual = np.asarray(arrives(X))
    for power in (-100, -83, 60, 100):  # 2^-83 is 1e-25, 2^100 is 1e30
        scale = np.float32(2.0**power)
        assert_close(np.asarray(arrives(X * scale)) / scale, usual, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_norms_and_clipping_at_any_scale(scale):
    x = {"w": X * scale, "h": jnp.ones(2, jnp.bfloat16), "n": jnp.arange(2)}
    x["h"] = x["h"] * 0
    norm = np.linalg.norm(np.asarray(x["w"], np.float64))
    np.testing.assert_allclose(float_norm(x), norm, rtol=1e-6)
    got = np.asarray(wire.round_trip(wire.clip(1.0), x)[0]["w"], np.float64)
    np.testing.assert_allclose(got, np.asarray(x["w"], np.float64) / max(norm, 1), rtol=1e-5)


def test_gradients_of_norms_where_parts_or_all_of_an_update_are_zero():
    x = {"w": jnp.array([3.0, 4.0]), "still": jnp.zeros(2)}
    slope = jax.grad(float_norm)(x)
    assert_close(slope, {"w": jnp.array([0.6, 0.8]), "still": jnp.zeros(2)})
    clipped = jax.grad(lambda x: jnp.sum(wire.round_trip(wire.clip(1.0), x)[0]["w"]))(x)
    assert_close(clipped, {"w": jnp.array([0.2 - 0.168, 0.2 - 0.224]), "still": jnp.zeros(2)}, atol=1e-6)
    assert not np.any(jax.grad(float_norm)(jnp.zeros(3)))


def test_norms_of_what_is_none():
    assert float_norm({"n": jnp.arange(3), "none": jnp.zeros((0, 2))}) == 0
    assert float_norm(()) == 0
    assert jnp.isnan(float_norm([jnp.array([1.0, jnp.nan]), jnp.ones(2)]))
    assert jnp.isinf(float_norm([jnp.array([1.0, -jnp.inf])]))


@pytest.mark.parametrize("x", [jnp.float32(3.0), jnp.full(33, 0.7)])
def test_terngrad_sends_entries_that_are_all_the_same(x):
    assert_close(wire.round_trip(wire.terngrad(2.5), x)[0], x)
