"""The LSTM whose derivative is written out: flax's cell, and the plain loop that JAX differentiates by itself."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lab import models
from fedjax_lab.models.recurrent import LSTM, hidden_states

UNITS, TIME, BATCH, D = 4, 6, 3, 5


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def plain(gates, recurrent):
    """The same loop without a derivative of its own."""

    def step(carry, gates):
        cell, hidden = carry
        i, f, g, o = jnp.split(gates + hidden @ recurrent, 4, axis=-1)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (cell, hidden), hidden

    zeros = jnp.zeros((gates.shape[1], recurrent.shape[0]))
    return jax.lax.scan(step, (zeros, zeros), gates)[1]


def score(layer):
    """A number of (gates, recurrent) to which every unit contributes differently at every step."""
    weights = normal(0, TIME, BATCH, UNITS)
    return lambda gates, recurrent: jnp.sum(weights * layer(gates, recurrent))


ARGUMENTS = normal(1, TIME, BATCH, 4 * UNITS), normal(2, UNITS, 4 * UNITS)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.OptimizedLSTMCell])
def test_outputs_and_gradients_are_those_of_flax(cell):
    x, weights = normal(3, BATCH, TIME, D), normal(4, BATCH, TIME, UNITS)
    layer, theirs = LSTM(UNITS), nn.RNN(cell(UNITS))
    params = layer.init(jax.random.key(0), x)["params"]

    def as_flax(params):
        kernels = zip(*(jnp.split(p, 4, -1) for p in (params["input"]["kernel"], params["input"]["bias"],
                                                     params["recurrent"])), strict=True)  # fmt: skip
        tree = {}
        for gate, (kernel, bias, recurrent) in zip("ifgo", kernels, strict=True):
            tree |= {f"i{gate}": {"kernel": kernel}, f"h{gate}": {"kernel": recurrent, "bias": bias}}
        return {"params": {"cell": tree}}

    ours = lambda params, x: layer.apply({"params": params}, x)
    other = lambda params, x: theirs.apply(as_flax(params), x)
    assert_close(ours(params, x), other(params, x))
    slopes = [jax.jit(jax.grad(lambda *a, f=f: jnp.sum(weights * f(*a)), (0, 1)))(params, x) for f in (ours, other)]
    assert_close(*slopes)
    assert all(float(jnp.abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(slopes[0]))


def test_derivatives_are_those_of_the_plain_loop():
    """Reverse mode, forward mode, and the Hessian's product with a direction both ways."""
    direction = normal(7, TIME, BATCH, 4 * UNITS), normal(8, UNITS, 4 * UNITS)

    def derivatives(layer):
        slope = jax.grad(score(layer), (0, 1))
        along = lambda *at: sum(jnp.vdot(s, d) for s, d in zip(slope(*at), direction, strict=True))
        forward = jax.jvp(slope, ARGUMENTS, direction)
        return forward, jax.jvp(score(layer), ARGUMENTS, direction), jax.grad(along, (0, 1))(*ARGUMENTS)

    ours, theirs = (jax.jit(derivatives, static_argnums=0)(layer) for layer in (hidden_states, plain))
    assert_close(ours, theirs)
    assert_close(ours[0][1], ours[2])


def test_side_by_side_is_one_by_one():
    """Clients in lanes: each has weights of its own, and a scan around it all."""
    gates, recurrent = normal(5, 3, TIME, BATCH, 4 * UNITS), normal(6, 3, UNITS, 4 * UNITS)
    slope = jax.grad(score(hidden_states), (0, 1))

    def descend(gates, recurrent):
        step = lambda at, _: (jax.tree.map(lambda p, g: p - 0.1 * g, at, slope(*at)), None)
        return jax.lax.scan(step, (gates, recurrent), length=3)[0]

    together = jax.jit(jax.vmap(descend))(gates, recurrent)
    alone = [jax.jit(descend)(g, r) for g, r in zip(gates, recurrent, strict=True)]
    assert_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone))


def products_in_loops(jaxpr, inside=False):
    """Matrix products in the loops of a program."""
    for eqn in jaxpr.eqns:
        if inside and eqn.primitive.name == "dot_general":
            yield eqn.outvars[0].aval.shape
        for value in eqn.params.values():
            if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
                yield from products_in_loops(getattr(value, "jaxpr", value), inside or eqn.primitive.name == "scan")


def test_the_recurrent_gradient_is_one_product_after_the_loop():
    products = {
        layer: list(products_in_loops(jax.make_jaxpr(jax.grad(score(layer), (0, 1)))(*ARGUMENTS).jaxpr))
        for layer in (hidden_states, plain)
    }
    assert (UNITS, 4 * UNITS) in [tuple(sorted(shape)) for shape in products[plain]]
    assert sorted(products[hidden_states]) == [(BATCH, UNITS), (BATCH, 4 * UNITS)]  # backward, forward


@pytest.mark.slow
def test_padding_has_no_part_in_the_gradient():
    model = models.char_lstm(7, 3, UNITS)
    params, state = model.init(jax.random.key(0))
    mean = lambda params, x, y: model.loss(params, state, {"x": x, "y": y}, jnp.ones(1, bool), None, True)[0].sum()
    x, y = jnp.array([[1, 4, 2]]), jnp.array([[4, 2, 6]])
    padded = [jnp.pad(a, ((0, 0), (0, 4))) for a in (x, y)]
    assert_close(*(jax.value_and_grad(mean)(params, *a) for a in ((x, y), padded)))
