"""The hidden units of a model: which entries of which leaves belong to each, so that some can be left out."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.models.base import Variables
from fedjax_lab.transforms.axes import Dimensions, Followed, follow
from fedjax_lab.wire.base import Like

PyTree = Any
# What an axis is made of, the slowest first: how many, and the group of units that they are, or None.
Factors = tuple[tuple[int, str | None], ...]
# (path of a leaf, its shape) -> for each axis None, a group's name, or what it is made of
Rule = Callable[[str, tuple[int, ...]], Any]


@dataclasses.dataclass(frozen=True)
class Units:
    """Groups of hidden units, and where their entries stand.

    A unit's entries are those that make it (columns of a kernel, its bias, its normalisation) and those that use it
    (rows of the next layer's kernel). Hashable: static data of a message.

    Attributes:
      like: structure, shapes and types of the model's Variables.
      leaves: for each leaf, for each of its axes, what it is made of.
      sizes: ``(group, number of units)`` pairs.
    """

    like: Like
    leaves: tuple[tuple[Factors, ...], ...]
    sizes: tuple[tuple[str, int], ...]

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.sizes)

    def shown(self) -> dict[str, dict[str, list]]:
        """The same for people: ``{group: {leaf: [axes with it]}}``."""
        names = [name for name, _ in checks.named_leaves(self.like.shapes())]
        table: dict[str, dict[str, list]] = {group: {} for group in self.groups}
        for name, axes in zip(names, self.leaves, strict=True):
            for i, factors in enumerate(axes):
                for _, group in factors:
                    if group is not None:
                        table[group].setdefault(name, []).append(i)
        return table


def hidden_units(loss: Callable, variables: Variables, batch: PyTree) -> Units:
    """The groups of units that a model's loss lets one leave out, found by following its equations.

    The outputs of a layer are the inputs of the next, of its normalisation, and of the layer that is added to it.
    Units count as a group if wherever they meet weights these are theirs, so that a model with zeros in their place is
    one without them. Units that are added up, concatenated, compared or looked up otherwise (outputs, attention's
    scores, normalisation over features, gates cut from one kernel) stay whole.

    Args:
      loss: a model's.
      variables: its parameters and state, or their shapes.
      batch: examples, or their shapes.
    """
    shaped = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)
    like = Like.of(variables)
    batch = shaped(batch)
    shapes = tuple((s.shape, s.dtype.name) for s in jax.tree.leaves(batch))
    return _derived(loss, like, jax.tree.structure(batch), shapes)


@functools.lru_cache(maxsize=256)
def _derived(loss: Callable, like: Like, structure: Any, shapes: tuple) -> Units:
    variables: Any = like.shapes()
    batch = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(s, jnp.dtype(t)) for s, t in shapes])
    mask = jax.ShapeDtypeStruct((shapes[0][0][0],), bool)
    one = lambda params, state, batch, mask, key: loss(params, state, batch, mask, key, True)
    key = jax.eval_shape(lambda: jax.random.key(0))
    program = jax.make_jaxpr(one)(variables.params, variables.model_state, batch, mask, key)
    dims = Dimensions()
    known = [
        [Followed(dims.new(s.shape), True) for s in jax.tree.leaves(variables.params)],
        [Followed(dims.new(s.shape), False) for s in jax.tree.leaves(variables.model_state)],
        [Followed(dims.new(s.shape, whole=True), False) for s in jax.tree.leaves((batch, mask, key))],
    ]
    out = follow(program, dims, [value for part in known for value in part])
    for before, after in zip(known[1], out[1:], strict=True):
        for a, b in zip(before.axes, after.axes, strict=True):
            dims.tie(a, b)
    names: dict[int, str] = {}
    leaves = []
    paths = [name for name, _ in checks.named_leaves(variables)]
    for path, value in zip(paths, known[0] + known[1], strict=True):
        axes = []
        for axis in value.axes:
            factors = []
            for d in dims.resolve(axis):
                if dims.may_be_cut(d):
                    names.setdefault(d, _layer(path, names.values()))
                factors.append((dims.size[d], names.get(d)))
            axes.append(tuple(factors))
        leaves.append(tuple(axes))
    return Units(like, tuple(leaves), tuple((name, dims.size[d]) for d, name in names.items()))


def _layer(path: str, taken: Iterable[str]) -> str:
    """A group's name: that of the layer where it is first met."""
    name = path.removeprefix("params/").rpartition("/")[0] or path
    others = sum(other.partition("#")[0] == name for other in taken)
    return f"{name}#{others + 1}" if others else name


def by_rule(rule: Rule, variables: Variables) -> Units:
    """Groups of units as a rule names them.

    Args:
      rule: ``(path, shape) ->`` one entry for each axis: ``None``, the name of the group whose units the axis counts,
        or what the axis is made of, slowest first, such as ``((49, None), (64, "conv"))`` for the rows of a dense
        layer behind 7x7 pixels of 64 channels. ``None`` for a leaf without units.
      variables: the model's, or their shapes.

    Raises:
      ValueError: entries that don't fit the shape, groups of several sizes, or no group at all.
    """
    leaves, sizes = [], {}
    for path, leaf in checks.named_leaves(variables):
        shape = jnp.shape(leaf)
        given = rule(path, shape)
        given = (None,) * len(shape) if given is None else tuple(given)
        if len(given) != len(shape):
            raise ValueError(f"units= gives {len(given)} axes for {path}, which has the shape {shape}")
        axes = []
        for size, entry in zip(shape, given, strict=True):
            factors = entry if isinstance(entry, tuple) else ((size, entry),)
            if math.prod(n for n, _ in factors) != size:
                raise ValueError(f"units= makes an axis of {path} out of {factors}, but it is {size} long")
            for n, group in factors:
                if group is not None and sizes.setdefault(group, n) != n:
                    raise ValueError(f"units= gives the group {group!r} {sizes[group]} units, and {n} in {path}")
            axes.append(tuple((int(n), group) for n, group in factors if n != 1 or group is not None))
        leaves.append(tuple(axes))
    if not sizes:
        names = [name for name, _ in checks.named_leaves(variables)]
        raise ValueError(f"units= names no group of units in any of the leaves {names}")
    return Units(Like.of(variables), tuple(leaves), tuple(sizes.items()))
