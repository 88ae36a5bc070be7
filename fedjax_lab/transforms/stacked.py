"""Several models in one: pytrees whose leaves have a leading axis, one entry for each model."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab import checks

PyTree = Any


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Trees of equal structure as one, leaves ``[len(trees), ...]``."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *trees)


def pick(tree: PyTree, index: Any) -> PyTree:
    """The ``index``-th of stacked trees."""
    return jax.tree.map(lambda x: x[index], tree)


def replaced(tree: PyTree, index: int, part: PyTree) -> PyTree:
    """The stack with another ``index``-th entry."""
    return jax.tree.map(lambda whole, one: whole.at[index].set(one), tree, part)


def placed(tree: PyTree, here: jax.Array) -> PyTree:
    """A stack that holds ``tree`` where ``here: bool[count]`` is true, and zeros elsewhere."""

    def one(x):
        x = jnp.asarray(x)[None]
        return jnp.where(here.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros_like(x))

    return jax.tree.map(one, tree)


def keys_of(key: jax.Array, count: int) -> list[jax.Array]:
    """A key for each of several models; the first has the key itself."""
    return [key, *(jax.random.fold_in(key, j) for j in range(1, count))]


def spread_out(params: PyTree, spread: Any, key: jax.Array) -> PyTree:
    """The parameters with normal noise of standard deviation ``spread`` added; exactly themselves for 0."""
    if isinstance(spread, int | float) and spread == 0:
        return params
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(key, 0x59EA), max(len(leaves), 1))
    noisy = lambda x, k: (x + spread * jax.random.normal(k, x.shape)).astype(x.dtype)
    floats = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    moved = [noisy(x, k) if floats(x) else x for x, k in zip(leaves, keys, strict=False)]
    return jax.tree.unflatten(structure, moved)


def one_each(params: PyTree, count: int, who: str) -> list[PyTree]:
    """Given parameters ``[count, ...]`` as one tree for each model; as many ``None`` for ``None``.

    Raises:
      ValueError: leaves without that leading axis.
    """
    if params is None:
        return [None] * count
    for name, leaf in checks.named_leaves(params):
        if np.shape(leaf)[:1] != (count,):
            raise ValueError(
                f"{who} starts from {count} models: give params whose leaves have a leading axis of {count}; leaf "
                f"{name} has shape {np.shape(leaf)}"
            )
    return [jax.tree.map(lambda x, j=j: x[j], params) for j in range(count)]
