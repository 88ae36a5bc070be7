"""Gradients in such an order that parameters can be updated where they are."""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any

# Bytes of a leaf from which on a copy is worth avoiding.
LARGE = 1 << 16


def large_ones_last(grads: PyTree) -> PyTree:
    """The same gradients, of which the large ones wait for the small ones.

    The backward pass still reads a layer's kernel when that kernel's own gradient is known. Unless the update waits,
    XLA copies the kernel before every step of a loop; the biases of the layers below are known after the last
    such reading. ``optimization_barrier`` is gone when XLA decides about copies; what holds here is a condition that is
    never true, which it doesn't find out.
    """
    leaves = [g for g in jax.tree.leaves(grads) if jnp.issubdtype(g.dtype, jnp.floating) and g.size]
    small = [g for g in leaves if not _is_large(g)]
    if not small or len(small) == len(leaves):
        return grads
    first = jnp.stack([g.reshape(-1)[0].astype(jnp.float32) for g in small])
    never = jnp.any((first < 0) & (first > 0))
    return jax.tree.map(lambda g: jax.lax.select_n(never, g, jnp.zeros_like(g)) if _is_large(g) else g, grads)


def _is_large(g: jax.Array) -> bool:
    return jnp.issubdtype(g.dtype, jnp.floating) and g.size * jnp.dtype(g.dtype).itemsize >= LARGE
