"""Images cut into tiles, for convolutions: gathered, put side by side, and added where they overlap.

Rows of channels are copied by gathers: XLA:CPU does that at twice the speed of its own transposes, slices and sums.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Inputs of a tile along an axis: with more than six, Winograd's filtering would lose digits, as its points are larger.
MOST_INPUTS = 6
# Each block reads all filters: its tiles are to take so many times their bytes. Image by image, a ResNet's rounds took
# 1.2 times as long (width 64: the filters of its last layers take 14 times the bytes of an image's tiles).
TIMES = 3


class Axis(NamedTuple):
    """How one axis is tiled: ``count`` tiles, of ``outputs`` places each, for a filter of ``taps``."""

    outputs: int
    taps: int
    count: int

    @property
    def inputs(self) -> int:
        """What a tile sees."""
        return self.outputs + self.taps - 1


def tiling(places: int, taps: int) -> Axis:
    """Tiles for an axis of so many outputs: of two places, or of three where that takes fewer multiplications."""
    small, large = (Axis(m, taps, -(-places // m)) for m in (2, 3))
    saves = large.count * large.inputs <= small.count * small.inputs
    return large if saves and large.inputs <= MOST_INPUTS else small


def block_size(batch: int, axes: Sequence[Axis], widths: Sequence[int], most: float) -> int:
    """How many images at a time, the same for all blocks.

    Args:
      batch: images.
      axes: how they are tiled.
      widths: channels and features.
      most: bytes that a block's tiles of inputs and outputs may take; more, if it's little beside the filters.
    """
    each = 4 * sum(widths) * math.prod(axis.inputs * axis.count for axis in axes)
    filters = 4 * math.prod(widths) * math.prod(axis.inputs for axis in axes)
    most = max(most, TIMES * filters)
    return max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * each <= most))


def in_blocks(images: jax.Array, size: int) -> jax.Array:
    """``[blocks, size, height, width, n]``."""
    return images.reshape(-1, size, *images.shape[1:])


def joined(blocks: jax.Array) -> jax.Array:
    """``[batch, height, width, n]``."""
    return blocks.reshape(-1, *blocks.shape[2:])


def cut(images: jax.Array, axes: Sequence[Axis], sizes: Sequence[int], low: Sequence[int]) -> jax.Array:
    """Of each tile its (i, j)-th place, ``[places, batch, *tiles, channels]``; zeros outside of the image.

    A row of places at a time: XLA would let a gather of all of them write for the product after it, number by number.
    """
    batch, height, width, channels = images.shape
    firsts = [np.arange(axis.count) * axis.outputs - before for axis, before in zip(axes, low, strict=True)]
    tall, wide = (np.add.outer(np.arange(n), first) for n, first in zip(sizes, firsts, strict=True))
    y, x = tall[:, None, :, None], wide[None, :, None, :]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    shape = (*sizes, 1, axes[0].count, axes[1].count)
    at, inside = (array.reshape(shape) for array in (np.where(inside, y * width + x, 0), inside))
    own, rows = _strides(batch, height * width)[None], images.reshape(-1, channels)
    if inside.all():
        places = lax.map(lambda at: _rows(rows, at + own), jnp.asarray(at, jnp.int32))
    else:
        each = (jnp.asarray(at, jnp.int32), jnp.asarray(inside))
        places = lax.map(lambda each: _rows(rows, each[0] + own, each[1]), each)
    return places.reshape(-1, *places.shape[2:])


def side_by_side(tiles: jax.Array, axes: Sequence[Axis], out: Sequence[int]) -> jax.Array:
    """``[batch, height, width, features]`` of each tile's (i, j)-th place ``[places, batch, *tiles, features]``."""
    (y, i), (x, j) = (np.divmod(np.arange(n), axis.outputs) for n, axis in zip(out, axes, strict=True))
    return _back(tiles, np.add.outer(i * axes[1].outputs, j), y, x)


def overlapping(tiles: jax.Array, axes: Sequence[Axis], first: Sequence[int], out: Sequence[int]) -> jax.Array:
    """Sums of what all tiles see of each place, ``[batch, height, width, channels]``, from the ``first`` place on."""

    def seeing(axis: Axis, start: int, n: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Tiles that see each place, the last of them, the one before, ...; where in them; and if they do."""
        last, inside = np.divmod(np.arange(start, start + n), axis.outputs)
        each = [(last - k, inside + k * axis.outputs) for k in range(-(-axis.inputs // axis.outputs))]
        return [(tile, i, (tile >= 0) & (tile < axis.count) & (i < axis.inputs)) for tile, i in each]

    tall, wide = (seeing(axis, start, n) for axis, start, n in zip(axes, first, out, strict=True))
    parts = [
        _back(tiles, np.add.outer(i * axes[1].inputs, j), y, x, np.logical_and.outer(seen, also))
        for (y, i, seen), (x, j, also) in itertools.product(tall, wide)
    ]
    return functools.reduce(lax.add, parts)


def _back(
    tiles: jax.Array, place: np.ndarray, y: np.ndarray, x: np.ndarray, there: np.ndarray | None = None
) -> jax.Array:
    """``[batch, height, width, channels]``: from ``[places, batch, *tiles, channels]`` the tiles' rows.

    Args:
      tiles: what to take them from.
      place: ``int[height, width]``, where in its tile.
      y, x: ``int[height]`` and ``int[width]``, the tile.
      there: ``bool[height, width]``; zeros where it is false.
    """
    _, batch, tall, wide, channels = tiles.shape
    at = ((place * batch * tall + y[:, None]) * wide + x)[None]
    if there is not None:
        there = there[None]
        at = np.where(there, at, 0)
    return _rows(tiles.reshape(-1, channels), jnp.asarray(at, jnp.int32) + _strides(batch, tall * wide), there)


def _strides(batch: int, stride: int) -> jax.Array:
    """``int32[batch, 1, 1]``, where each example's rows begin."""
    return jnp.arange(batch, dtype=jnp.int32)[:, None, None] * stride


def _rows(rows: jax.Array, at: jax.Array, there: Any = None) -> jax.Array:
    """``rows[at]``, ``[*at.shape, channels]``; zeros where ``there``, of as many axes as ``at``, is false."""
    names = lax.GatherDimensionNumbers((at.ndim,), (0,), (0,))
    found = lax.gather(rows, at[..., None], names, (1, rows.shape[-1]), mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    if there is None:
        return found
    return jnp.where(jnp.asarray(there)[..., None], found, jnp.zeros((), rows.dtype))
