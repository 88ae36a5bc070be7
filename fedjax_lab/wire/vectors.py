"""Links that work on one vector: all float leaves of a pytree, one behind the other."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lab.wire.base import Ctx, Like, Wire, as_opened, is_float, wide
from fedjax_lab.wire.packing import Packed, Trits
from fedjax_lab.wire.payload import length
from fedjax_lab.wire.selecting import Positions

PyTree = Any
LARGEST = 2**31 - 1  # positions are int32
INTEGERS = (Packed, Trits, Positions)  # what the bytes of an earlier link stand for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vector:
    """What a link made of a pytree's float leaves, seen as one vector.

    Attributes:
      code: whatever arrays stand for the vector.
      rest: the leaves that aren't floats, as they were; an earlier link's codes and positions as what they are, for an
        entropy code behind.
      like: static, the pytree's structure, shapes and types.
    """

    code: PyTree
    rest: tuple
    like: Like = dataclasses.field(metadata={"static": True})


def ravel(x: PyTree) -> tuple[jax.Array, tuple, Like]:
    """A pytree's float leaves as one vector in float32 at least, its other leaves, and its structure."""
    known = lambda leaf: isinstance(leaf, INTEGERS)
    leaves = [leaf if known(leaf) else jnp.asarray(leaf) for leaf in jax.tree.leaves(x, is_leaf=known)]
    floats = [leaf for leaf in leaves if not known(leaf) and is_float(leaf)]
    if sum(leaf.size for leaf in floats) > LARGEST:
        raise ValueError(f"a link takes at most {LARGEST} float entries at once: divide them with wire.grouped(link)")
    kind = jnp.result_type(jnp.float32, *floats)
    if jnp.issubdtype(kind, jnp.complexfloating):
        raise ValueError("a link takes real numbers: send real and imaginary parts as leaves of their own")
    parts = [leaf.astype(kind).reshape(-1) for leaf in floats]
    vector = parts[0] if len(parts) == 1 else jnp.concatenate([jnp.zeros(0, kind), *parts])
    return vector, tuple(leaf for leaf in leaves if known(leaf) or not is_float(leaf)), Like.of(x)


def unravel(vector: jax.Array, rest: tuple, like: Like) -> PyTree:
    """The pytree again, its float leaves in float32 at least."""
    leaves, at, others = [], 0, iter(jax.tree.leaves(rest))
    flat, structure = jax.tree.flatten(like.shapes())
    for leaf in flat:
        if is_float(leaf):
            leaves.append(vector[at : at + leaf.size].reshape(leaf.shape).astype(wide(leaf.dtype)))
            at += leaf.size
        else:
            leaves.append(next(others))
    return jax.tree.unflatten(structure, leaves)


def size_of(like: Like) -> int:
    """The number of float entries."""
    return sum(leaf.size for leaf in jax.tree.leaves(like.shapes()) if is_float(leaf))


def on_vector(
    name: str,
    encode: Callable[[jax.Array, Ctx], PyTree],
    decode: Callable[[PyTree, Ctx, int], jax.Array],
    *,
    summable: bool = False,
    **traits: Any,
) -> Wire:
    """A link without state from two functions of a vector.

    Args:
      name: for messages.
      encode: ``(float[d], Ctx) -> code``.
      decode: ``(code, Ctx, d) -> float[d]``; linear in the code if ``summable``.
      summable, **traits: as of :class:`fedjax_lab.wire.Wire`.
    """

    def encode_tree(x, state, ctx):
        vector, rest, like = ravel(x)
        payload = Vector(encode(vector, ctx) if vector.size else (), rest, like)
        return payload, state, length(payload)

    def back(payload: Vector, ctx: Ctx) -> PyTree:
        size = size_of(payload.like)
        vector = decode(payload.code, ctx, size) if size else jnp.zeros(0)
        return unravel(vector, payload.rest, payload.like)

    if summable:
        return Wire(
            encode_tree,
            open=lambda payload, ctx: payload,
            decode=lambda total, ctx: (back(total, ctx), ctx.state),
            summable=True,
            name=name,
            **traits,
        )
    return Wire(encode_tree, open=back, decode=as_opened, name=name, **traits)
