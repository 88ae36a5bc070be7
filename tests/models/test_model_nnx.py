"""from_nnx: random streams, factories, and what is trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fedjax_lab as fl
from fedjax_lab import models
from tests.compiling import in_a_process

KEY = jax.random.key(0)
BATCH = {"x": jnp.ones((3, 2)), "y": jnp.zeros(3, jnp.int32)}
MASK = jnp.array([True, True, False])
# The module's first output as the loss: a look at what reached it.
LOOK = {"loss": lambda outputs, batch: outputs[:, 0], "metrics": {}}


class Dropping(nnx.Module):
    """Two dropouts of one, on two streams, so that the output shows both masks."""

    def __init__(self, rngs):
        self.first = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return jnp.stack([self.first(x), self.second(x)], -1)


def test_nnx_dropout_is_a_function_of_the_key():
    model = models.from_nnx(Dropping, loss=lambda o, b: o.sum((1, 2)), metrics={})
    params, state = model.init(KEY)
    assert (params, state) == ({}, ())  # the random streams are not carried

    def masks(key):
        kept = {}
        spying = models.from_nnx(Dropping, loss=lambda o, b: kept.setdefault("o", o)[:, 0, 0], metrics={})
        spying.loss(params, state, {"x": jnp.ones((1, 64))}, jnp.ones(1, bool), key, True)
        return np.asarray(kept["o"][0])

    one = masks(KEY)
    np.testing.assert_array_equal(one, masks(KEY))
    assert set(np.unique(one)) == {0, 2}
    assert np.any(one != masks(jax.random.key(1)))
    assert np.any(one[:, 0] != one[:, 1])
    with pytest.raises(ValueError, match="needs a key"):
        model.loss(params, state, {"x": jnp.ones((1, 4))}, jnp.ones(1, bool), None, True)
    old_style = jax.random.PRNGKey(0)
    np.testing.assert_array_equal(masks(old_style), one)


class Layered(nnx.Module):
    def __init__(self, width, *, rngs):
        self.layers = nnx.List([nnx.Linear(2, width, rngs=rngs), nnx.Linear(width, 1, rngs=rngs)])

    def __call__(self, x, *, rngs=None):
        assert rngs is not None
        for layer in self.layers:
            x = layer(x)
        return x


def test_nnx_factories_and_built_modules_agree():
    width = 4
    built = Layered(width, rngs=nnx.Rngs(KEY))
    ways = [
        functools.partial(Layered, width),
        lambda rngs: Layered(width, rngs=rngs),
        lambda *, rngs: Layered(width, rngs=rngs),
        built,
    ]
    expected = built(BATCH["x"], rngs=nnx.Rngs(0))[:, 0]
    for way in ways:
        model = models.from_nnx(way, **LOOK)
        params, state = model.init(KEY)
        assert set(params["layers"]) == {"0", "1"}
        np.testing.assert_allclose(model.metrics(params, state, BATCH)["loss"], expected)
    # The model holds a copy: what happens to the module later is its owner's business.
    built.layers[1].bias[...] = jnp.full(1, 9.0)
    np.testing.assert_array_equal(model.init(KEY)[0]["layers"]["1"]["bias"], [0])


def test_nnx_trains_what_the_filter_says():
    class Adapted(nnx.Module):
        def __init__(self, rngs):
            self.base = nnx.Linear(2, 1, rngs=rngs)
            self.lora = nnx.LoRA(2, 1, 1, rngs=rngs)

        def __call__(self, x):
            return self.base(x) + self.lora(x)

    model = models.from_nnx(Adapted, trainable=nnx.LoRAParam, **LOOK)
    params, state = model.init(KEY)
    assert set(params) == {"lora"} and set(state) == {"base"}
    _, new = model.loss(params, state, BATCH, MASK, KEY, True)
    jax.tree.map(np.testing.assert_array_equal, new, state)


@pytest.mark.parametrize("wrong", [3, lambda rngs: 3])
def test_nnx_refuses_what_is_no_module(wrong):
    with pytest.raises(ValueError, match="needs an NNX module or a factory of one"):
        models.from_nnx(wrong)


def test_nnx_is_imported_by_those_who_use_it():
    script = """
    import sys
    import fedjax_lab as fl
    before = "flax.nnx" in sys.modules
    fl.models.from_nnx
    print(before, "flax.nnx" in sys.modules)
    """
    assert in_a_process(script).split() == ["False", "True"]
    with pytest.raises(AttributeError, match="from_nxn"):
        _ = fl.models.from_nxn
