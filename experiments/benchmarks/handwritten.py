"""The workloads' models by hand: ``(params, x, y) -> mean loss``, on the parameters of our own models."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def cross_entropy(scores: jax.Array, y: jax.Array) -> jax.Array:
    """The mean over all labels; ``float[..., classes], int[...] -> float[]``."""
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(scores), y[..., None], axis=-1))


def dense(params: PyTree, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"].reshape((1,) * (x.ndim - 1) + (-1,))


def linear(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    """A linear map and softmax."""
    return cross_entropy(dense(params["output"], x), y)


def mlp(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    """Hidden layers ``hidden_0``, ``hidden_1``, ... with ReLU, and softmax."""
    for i in range(len(params) - 1):
        x = jax.nn.relu(dense(params[f"hidden_{i}"], x))
    return cross_entropy(dense(params["output"], x), y)


def window_pool(x: jax.Array) -> jax.Array:
    """2x2 maxima as Flax's ``nn.max_pool`` computes them."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def reshaped_pool(x: jax.Array) -> jax.Array:
    """2x2 maxima as ``fl.models.emnist_cnn`` computes them."""
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))


def cnn(pool: Callable[[jax.Array], jax.Array]) -> Callable[[PyTree, jax.Array, jax.Array], jax.Array]:
    """Two 3x3 convolutions without padding, ``pool``, a hidden layer, softmax."""

    def conv(params, x):
        out = jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.relu(out + params["bias"].reshape(1, 1, 1, -1))

    def mean_loss(params, x, y):
        x = pool(conv(params["conv_1"], conv(params["conv_0"], x)))
        x = jax.nn.relu(dense(params["dense"], x.reshape(x.shape[0], -1)))
        return cross_entropy(dense(params["output"], x), y)

    return mean_loss


def lstm(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    """An embedding, layers ``lstm_0``, ``lstm_1``, ..., and the next character's scores; no padding."""
    sequence = params["embed"]["embedding"][x]
    for i in range(sum(name.startswith("lstm_") for name in params)):
        layer = params[f"lstm_{i}"]
        units = layer["recurrent"].shape[0]

        def step(carry, gates, recurrent=layer["recurrent"]):
            cell, hidden = carry
            i, f, g, o = jnp.split(gates + hidden @ recurrent, 4, axis=-1)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
            return (cell, hidden), hidden

        start = jnp.zeros((x.shape[0], units))
        gates = jnp.swapaxes(dense(layer["input"], sequence), 0, 1)
        sequence = jnp.swapaxes(jax.lax.scan(step, (start, start), gates)[1], 0, 1)
    return cross_entropy(dense(params["output"], sequence), y)
