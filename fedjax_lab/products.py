"""The gradient of a narrow layer's kernel, sums over a few examples, without calls of a matrix product.

XLA:CPU calls a library for every such product, and for one of a few thousand operations the call costs more than the
arithmetic. As sums of scaled rows the compiler makes loops of it: the gradient of a logistic regression with 10 classes
and batches of 10 takes .5 instead of 1.4 us with 60 features and 7 instead of 12 us with 784 (one core, six models side
by side, jax 0.10). The sums are the same, in another order.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

# A reduction of no more results than this keeps them at hand: 3.0 us for six models' 60 x 10, where columns take 4.2
# and a product 8.5; of 784 x 10 it takes 220, 42 and 71. With 640 terms (64 examples, 10 classes) a product is as fast.
MOST_RESULTS, MOST_REDUCED = 1280, 320
# Of columns each term is compiled: a hundred cost .3 s. With 320 a product is as fast.
MOST_TERMS, SHORTEST_ROW = 128, 16


def _form(eqn: JaxprEqn) -> Callable | None:
    """The sums' form of ``lhs.T @ rhs``, of float32 matrices; None where it would not pay off."""
    values: list[Any] = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    lhs, rhs, _ = values
    contracted, batched = eqn.params["dimension_numbers"]
    fits = (
        lhs.ndim == rhs.ndim == 2
        and tuple(map(tuple, contracted)) == ((0,), (0,))
        and not any(batched)
        and all(v.dtype == jnp.float32 for v in values)
        and max(lhs.shape[1], rhs.shape[1]) >= SHORTEST_ROW
    )
    if not fits:
        return None
    terms = lhs.shape[0] * min(lhs.shape[1], rhs.shape[1])
    if terms <= MOST_REDUCED and lhs.shape[1] * rhs.shape[1] <= MOST_RESULTS:
        return as_reduction
    return as_columns if terms <= MOST_TERMS else None


FORMS = {"dot_general": _form}


def as_reduction(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """``lhs.T @ rhs`` of ``[examples, inputs]`` and ``[examples, outputs]``, all results at once."""
    if lhs.shape[1] < rhs.shape[1]:
        return as_reduction(rhs, lhs).T
    scaled = lhs[:, None, :] * rhs[:, :, None]
    return lax.transpose(lax.reduce(scaled, jnp.float32(0), lax.add, (0,)), (1, 0))


def as_columns(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The same, a column at a time (of the narrower)."""
    if lhs.shape[1] < rhs.shape[1]:
        return as_columns(rhs, lhs).T
    # A slice of the whole product would be computed first and read again: a third slower.
    rows = [lax.index_in_dim(lhs, i, keepdims=False) for i in range(len(lhs))]
    factor = lambda i, j: lax.broadcast(lax.squeeze(lax.slice(rhs, (i, j), (i + 1, j + 1)), (0, 1)), rows[0].shape)
    column = lambda j: functools.reduce(lax.add, [lax.mul(row, factor(i, j)) for i, row in enumerate(rows)])
    return lax.transpose(jnp.stack([column(j) for j in range(rhs.shape[1])]), (1, 0))
