"""Cutting the entries of some hidden units out of models, and putting them back among zeros; messages with a part."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lab import shuffle
from fedjax_lab.models.base import Variables
from fedjax_lab.round import Sent, nbytes
from fedjax_lab.transforms.units import Units

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Held:
    """The units of a group that a client has.

    Attributes:
      where: ``int32[k]`` in ``0..n-1``; ``None``: the first ``k``.
      k: how many there are room for, static.
      count: ``int32[]``, how many of these it has; ``None``: all.
    """

    where: Any
    k: int = dataclasses.field(metadata={"static": True})
    count: Any = None


def how_many(rate: Any, units: int) -> Any:
    """``ceil(rate * units)``, at least 1; of a Python number an integer, else ``int32[]``.

    The little that is taken off is more than float32 rounds, so that 0.1 of 30 units are 3.
    """
    if isinstance(rate, float | int):
        return min(max(math.ceil(rate * units - 1e-3), 1), units)
    return jnp.clip(jnp.ceil(rate * units - 1e-3), 1, units).astype(jnp.int32)


def held_units(units: Units, most: float, rate: Any, seed: Any) -> dict[str, Held]:
    """Which units of each group a client has.

    Args:
      units: the groups.
      most: the largest share of a group's units that any client has; static.
      rate: this client's share, if clients differ; else ``None``.
      seed: ``uint32[]`` of a random choice; ``None``: the first ones of each group.
    """
    held = {}
    for i, (group, size) in enumerate(units.sizes):
        k = how_many(most, size)
        where = None if seed is None else shuffle.permute(jnp.arange(k), size, shuffle.derive(seed, i))
        held[group] = Held(where, k, None if rate is None else how_many(rate, size))
    return held


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """A message with a part of the model.

    Attributes:
      inner: the inner round's message, cut.
      seed: ``uint32[]`` of which units these are; ``()`` if they are the first ones.
      rate: this client's share as the bits of a ``float32[]``, which no link touches; ``()`` if all have the same.
      units: static, what the model's axes count.
      most: static, the share that there is room for.
    """

    inner: Any
    seed: Any
    rate: Any
    units: Units = dataclasses.field(metadata={"static": True})
    most: float = dataclasses.field(metadata={"static": True})

    def held(self) -> dict[str, Held]:
        rate = None if isinstance(self.rate, tuple) else jax.lax.bitcast_convert_type(self.rate, jnp.float32)
        return held_units(self.units, self.most, rate, None if isinstance(self.seed, tuple) else self.seed)


def opened(message: Any) -> Part:
    """The part that a message is, or was sent as."""
    return message.content if isinstance(message, Sent) else message


def completed(message: Any) -> PyTree:
    """The inner message in the model's shapes, with zeros for units that aren't held."""
    part = opened(message)
    return put_back(part.units, part.held(), part.inner)


def replaced(message: Any, inner: PyTree) -> Any:
    """The message with another inner one, of which it keeps the units that are held."""
    part = opened(message)
    part = dataclasses.replace(part, inner=cut(part.units, part.held(), inner))
    return Sent(part, message.length) if isinstance(message, Sent) else part


def cut(units: Units, held: dict[str, Held], tree: PyTree) -> PyTree:
    """Everything in ``tree`` that is shaped as the model, with the entries of the units that are held."""
    return _map(units, units.like.shapes(), lambda x, factors: _cut(x, factors, held), tree)


def put_back(units: Units, held: dict[str, Held], tree: PyTree) -> PyTree:
    """What :func:`cut` gave, in the model's shapes, with zeros for units that aren't held."""
    whole: Any = units.like.shapes()
    small = jax.eval_shape(lambda h, x: cut(units, h, x), held, whole)
    return _map(units, small, lambda x, factors: _put_back(x, factors, held), tree)


def marks(units: Units, held: dict[str, Held], dtype: Any = jnp.float32) -> Variables:
    """The model with ones for what is held and zeros for the rest, in the model's shapes."""
    whole: Any = units.like.shapes()
    ones = lambda h: cut(units, h, jax.tree.map(lambda s: jnp.ones(s.shape, dtype), whole))
    return put_back(units, held, ones(held))


def bytes_of(units: Units, held: dict[str, Held], tree: PyTree) -> Any:
    """Bytes of what :func:`cut` gave that belong to units held; ``uint32[]`` where clients differ."""
    sizes = []

    def size(x, factors):
        entries: Any = 1
        for n, group in (f for axis in factors for f in axis):
            h = None if group is None else held[group]
            entries = entries * (n if h is None else h.k if h.count is None else h.count)
        sizes.append(jnp.asarray(entries, jnp.uint32) * jnp.dtype(x.dtype).itemsize)
        return ()  # counted

    whole: Any = units.like.shapes()
    small = jax.eval_shape(lambda h, x: cut(units, h, x), held, whole)
    rest = _map(units, small, size, tree)
    return sum(sizes) + jnp.uint32(nbytes(rest))


def _map(units: Units, like: Variables, change: Callable, tree: PyTree) -> PyTree:
    """``change(leaf, factors)`` over every part of a tree that is shaped as the Variables ``like`` or their params."""
    factors = jax.tree.unflatten(jax.tree.structure(like), [_Axes(axes) for axes in units.leaves])
    shape = lambda t: (jax.tree.structure(t), tuple(jnp.shape(x) for x in jax.tree.leaves(t)))
    known = {shape(like): factors, shape(like.params): factors.params}

    def one(part):
        found = known.get(shape(part))
        return part if found is None else jax.tree.map(lambda x, axes: change(x, axes.factors), part, found)

    return jax.tree.map(one, tree, is_leaf=lambda part: shape(part) in known)


class _Axes:
    """A leaf's factors, as one leaf of a pytree."""

    def __init__(self, factors):
        self.factors = factors


def _cut(x: jax.Array, factors: tuple, held: dict[str, Held]) -> jax.Array:
    x, shape = _apart(x, factors, held, cut=False)
    for i, (_, group) in enumerate(f for axis in factors for f in axis):
        if group is None:
            continue
        h = held[group]
        x = jax.lax.slice_in_dim(x, 0, h.k, axis=i) if h.where is None else jnp.take(x, h.where, axis=i)
        if h.count is not None:
            here = jnp.arange(h.k) < h.count
            x = jnp.where(here.reshape([-1 if j == i else 1 for j in range(x.ndim)]), x, jnp.zeros_like(x))
    return x.reshape(shape)


def _put_back(x: jax.Array, factors: tuple, held: dict[str, Held]) -> jax.Array:
    x, shape = _apart(x, factors, held, cut=True)
    for i, (n, group) in enumerate(f for axis in factors for f in axis):
        if group is None:
            continue
        h = held[group]
        if h.where is None:
            x = jnp.pad(x, [(0, n - h.k if j == i else 0) for j in range(x.ndim)])
        else:
            room = jnp.zeros((*x.shape[:i], n, *x.shape[i + 1 :]), x.dtype)
            x = room.at[(slice(None),) * i + (h.where,)].set(x, unique_indices=True)
    return x.reshape(shape)


def _apart(x: jax.Array, factors: tuple, held: dict[str, Held], cut: bool) -> tuple[jax.Array, tuple[int, ...]]:
    """The leaf with an axis for each factor, and its shape after it was cut (or put back, if it is cut already)."""
    small = lambda n, group: n if group is None else held[group].k
    now, then = (small, lambda n, group: n) if cut else (lambda n, group: n, small)
    shape = tuple(now(n, group) for axis in factors for n, group in axis)
    goal = []
    for axis in factors:
        length = 1
        for n, group in axis:
            length *= then(n, group)
        goal.append(length)
    return jnp.asarray(x).reshape(shape), tuple(goal)
