"""Large gradients wait for small ones: the numbers are the same, and a loop's kernel is updated where it is."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lab.ordering import LARGE, large_ones_last


def network(params, x):
    hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    return jnp.sum(jnp.square(hidden @ params["b"]["kernel"] + params["b"]["bias"][None]))


def start(features: int = 256, units: int = 128):
    key = jax.random.key(0)
    return {
        "a": {"kernel": jax.random.normal(key, (units, features)), "bias": jnp.zeros(features)},
        "b": {"kernel": jax.random.normal(key, (features, units)), "bias": jnp.zeros(units)},
    }


def body_of_loop(order) -> str:
    """The HLO of the body of a compiled training loop."""

    def train(params, x):
        def step(t, params):
            grads = order(jax.grad(network)(params, x))
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

        return jax.lax.fori_loop(0, x.shape[0], step, params)

    text = jax.jit(train).lower(start(), jnp.ones((8, 128))).compile().as_text() or ""
    name = re.search(r" while\(.*body=%?([\w.]+)", text)
    assert name, text[:2000]
    found = re.search(rf"^%?{re.escape(name[1])} .*?^}}", text, re.MULTILINE | re.DOTALL)
    assert found, text[:2000]
    return found[0]


def test_a_kernel_is_not_copied_in_every_step():
    assert start()["b"]["kernel"].nbytes >= LARGE
    body = body_of_loop(large_ones_last)
    assert "f32[256,128]" in body
    assert not re.findall(r"f32\[256,128\]\S* copy\(", body), body


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradients_stay_as_they_are(dtype):
    grads = jax.tree.map(lambda x: x.astype(dtype), jax.grad(network)(start(), jnp.ones((8, 128))))
    grads["b"]["bias"] = grads["b"]["bias"].at[0].set(jnp.nan)
    grads["a"]["bias"] = grads["a"]["bias"].at[0].set(-jnp.inf)
    out = jax.jit(large_ones_last)(grads)
    wide = lambda x: np.asarray(x, np.float32)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(wide(a), wide(b)), out, grads)
    assert jax.tree.map(lambda x: x.dtype, out) == jax.tree.map(lambda x: x.dtype, grads)


@pytest.mark.parametrize("grads", [{"w": jnp.ones((4, 4)), "b": jnp.ones(4)}, {"w": jnp.ones((256, 128))}, {}])
def test_where_there_is_nothing_to_order_nothing_is_computed(grads):
    jaxpr = jax.make_jaxpr(large_ones_last)(grads)
    assert not jaxpr.eqns
