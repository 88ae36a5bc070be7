"""Convolutions with fewer multiplications: Winograd's minimal filtering.

Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks": ``m`` outputs of a filter of ``r`` taps, from
the ``t = m + r - 1`` inputs that they see, take ``t`` multiplications instead of ``m r``, as
``A ((G filter) * (B inputs))`` with three small matrices; in two dimensions ``t^2`` instead of ``(m r)^2``. The sums
over channels lie between the transforms, so each of the ``t^2`` places is a matrix product of ``[tiles, channels]``
and ``[channels, features]``. The gradients are the adjoints: a kernel's shares the transform of the images with the
forward pass, and the images' those of the kernel and of the outputs (the compiler computes equal things once).

Each transform is one product with a small matrix over all tiles, and rows of channels are copied into tiles and back
by gathers. XLA:CPU copies by rows there, at twice the speed of its own transposes, slices and sums.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# A layer by itself takes 1.3 of the time of plain sums with 16 channels and 32 features, 1.3 to 1.5 with 32 and 32, and
# .8 with 32 and 64. A ResNet's rounds were not seen to differ with and without the layers of 32 and 32.
FEWEST_CHANNELS = 32
# Multiplications that pay for the transforms: 24 million take .7 of the time of plain sums, 6 million 1.2.
LEAST_WORK = 1e7
# Taps of a filter along an axis. Tiles of more inputs than six would lose digits: their points are larger.
TAPS, MOST_INPUTS = (3, 4, 5), 6
Padding = Sequence[tuple[int, int]]


class Filtering(NamedTuple):
    """``a @ ((g @ filter) * (b @ inputs))`` is what a filter gives at each place of a tile.

    Attributes:
      a: ``float32[outputs, inputs]``.
      g: ``float32[inputs, taps]``.
      b: ``float32[inputs, inputs]``.
    """

    a: np.ndarray
    g: np.ndarray
    b: np.ndarray


class Axis(NamedTuple):
    """How one axis is tiled: ``count`` tiles, of ``outputs`` places each, for a filter of ``taps``."""

    outputs: int
    taps: int
    count: int

    @property
    def inputs(self) -> int:
        """What a tile sees."""
        return self.outputs + self.taps - 1

    @property
    def filtering(self) -> Filtering:
        """The matrices of such tiles."""
        return minimal_filtering(self.outputs, self.taps)


def fits(channels: int, features: int, taps: Sequence[int], params: dict[str, Any]) -> bool:
    """Of plain convolutions of images: is it wide enough to pay off, and its precision left to the machine?"""
    return (
        all(n in TAPS for n in taps)
        and min(channels, features) >= FEWEST_CHANNELS
        and params["precision"] in (None, lax.Precision.DEFAULT, (lax.Precision.DEFAULT,) * 2)
    )


def convolution(images: jax.Array, kernel: jax.Array, padding: Padding, precision: lax.PrecisionLike) -> jax.Array:
    """A convolution of ``[batch, height, width, channels]`` with ``[taps, taps, channels, features]``."""
    out = _places(images.shape, kernel.shape, padding)
    axes = [tiling(places, taps) for places, taps in zip(out, kernel.shape, strict=False)]
    seen = _seen(images, padding, axes)
    products = _by_place(seen, _filters(kernel, axes), 1, precision)
    return _side_by_side(_product(_both(axes, "a"), products), axes, out)


def images_gradient(
    cotangent: jax.Array, kernel: jax.Array, padding: Padding, precision: lax.PrecisionLike
) -> jax.Array:
    """``[batch, height, width, channels]``: a convolution of the cotangent with the kernel turned around.

    As the adjoint of a convolution with the kernel, which needs what that and the kernel's gradient have transformed.

    Args:
      cotangent: ``[batch, height, width, features]``.
      kernel: ``[taps, taps, channels, features]``.
      padding: of the cotangent; less than the taps.
      precision: of the products.
    """
    out = _places(cotangent.shape, kernel.shape, padding)
    axes = [tiling(places, taps) for places, taps in zip(cotangent.shape[1:3], kernel.shape, strict=False)]
    products = _by_place(_given(cotangent, axes), _filters(kernel, axes), 2, precision)
    first = [axis.taps - 1 - low for axis, (low, _) in zip(axes, padding, strict=True)]
    return _overlapping(_product(_both(axes, "b").T, products), axes, first, out)


def kernel_gradient(
    images: jax.Array, cotangent: jax.Array, padding: Padding, precision: lax.PrecisionLike
) -> jax.Array:
    """``[taps, taps, channels, features]``, of a convolution's images and its outputs' cotangent (all NHWC)."""
    out = cotangent.shape[1:3]
    sizes = [n + low + high for n, (low, high) in zip(images.shape[1:3], padding, strict=True)]
    axes = [tiling(places, size - places + 1) for places, size in zip(out, sizes, strict=True)]
    seen, given = _as_rows(_seen(images, padding, axes)), _as_rows(_given(cotangent, axes))
    products = lax.dot_general(seen, given, (((1,), (1,)), ((0,), (0,))), precision)
    gradient = _product(_both(axes, "g").T, products)
    return gradient.reshape(axes[0].taps, axes[1].taps, *gradient.shape[1:])


def tiling(places: int, taps: int) -> Axis:
    """Tiles for an axis of so many outputs: of two places, or of three where that takes fewer multiplications."""
    small, large = (Axis(m, taps, -(-places // m)) for m in (2, 3))
    saves = large.count * large.inputs <= small.count * small.inputs
    return large if saves and large.inputs <= MOST_INPUTS else small


@functools.cache
def minimal_filtering(outputs: int, taps: int) -> Filtering:
    """The matrices of ``F(outputs, taps)``, by Toom and Cook: polynomials multiplied at points and infinity."""
    points = [Fraction(p) for p in (0, 1, -1, 2, -2)][: outputs + taps - 2]
    others = [[q for q in points if q != p] for p in points]
    powers = lambda p, n: [p**i for i in range(n)]
    infinity = lambda n: [Fraction(0)] * (n - 1) + [Fraction(1)]
    a = [powers(p, outputs) for p in points] + [infinity(outputs)]
    scales = [math.prod(p - q for q in rest) for p, rest in zip(points, others, strict=True)]
    g = [[x / scale for x in powers(p, taps)] for p, scale in zip(points, scales, strict=True)] + [infinity(taps)]
    b = [[*_coefficients(rest), Fraction(0)] for rest in others] + [_coefficients(points)]
    as_array = lambda rows: np.array(rows, np.float64).astype(np.float32)
    return Filtering(as_array(a).T, as_array(g), as_array(b))


def _coefficients(roots: list[Fraction]) -> list[Fraction]:
    """Those of ``prod (x - root)``, the constant first."""
    found = [Fraction(1)]
    for root in roots:
        pairs = zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)
        found = [above - root * below for above, below in pairs]
    return found


def _places(images: Sequence[int], kernel: Sequence[int], padding: Padding) -> list[int]:
    return [n + low + high - taps + 1 for n, taps, (low, high) in zip(images[1:3], kernel, padding, strict=False)]


def _seen(images: jax.Array, padding: Padding, axes: Sequence[Axis]) -> jax.Array:
    """What each tile of outputs sees, transformed: ``[places, batch, *tiles, channels]``."""
    tiles = _tiles(images, axes, [axis.inputs for axis in axes], [low for low, _ in padding])
    return _product(_both(axes, "b"), tiles)


def _given(cotangent: jax.Array, axes: Sequence[Axis]) -> jax.Array:
    """What each tile of outputs gives, transformed: ``[places, batch, *tiles, features]``."""
    tiles = _tiles(cotangent, axes, [axis.outputs for axis in axes], (0, 0))
    return _product(_both(axes, "a").T, tiles)


def _filters(kernel: jax.Array, axes: Sequence[Axis]) -> jax.Array:
    """The kernel, transformed: ``[places, channels, features]``."""
    return _product(_both(axes, "g"), kernel.reshape(-1, *kernel.shape[2:]))


def _both(axes: Sequence[Axis], name: str) -> np.ndarray:
    """The transform along both axes in one matrix: that of a tile, row by row."""
    return np.kron(*(getattr(axis.filtering, name) for axis in axes))


def _product(weights: np.ndarray, places: jax.Array) -> jax.Array:
    """``weights @ places``, over the first axis."""
    product = jnp.dot(jnp.asarray(weights, places.dtype), places.reshape(len(places), -1))
    return product.reshape(-1, *places.shape[1:])


def _by_place(tiles: jax.Array, filters: jax.Array, axis: int, precision: lax.PrecisionLike) -> jax.Array:
    """A product for each place, of channels and the filters' ``axis``: ``[places, batch, *tiles, n]``."""
    product = lax.dot_general(_as_rows(tiles), filters, (((2,), (axis,)), ((0,), (0,))), precision)
    return product.reshape(*tiles.shape[:-1], -1)


def _as_rows(tiles: jax.Array) -> jax.Array:
    """``[places, rows, channels]``."""
    return tiles.reshape(len(tiles), -1, tiles.shape[-1])


def _tiles(images: jax.Array, axes: Sequence[Axis], sizes: Sequence[int], low: Sequence[int]) -> jax.Array:
    """Of each tile its (i, j)-th place, ``[places, batch, *tiles, channels]``; zeros outside of the image.

    A place at a time: XLA would let a gather of all of them write for the product after it, number by number.
    """
    batch, height, width, channels = images.shape
    firsts = [np.arange(axis.count) * axis.outputs - before for axis, before in zip(axes, low, strict=True)]
    tall, wide = (np.add.outer(np.arange(n), first) for n, first in zip(sizes, firsts, strict=True))
    y, x = tall[:, None, :, None], wide[None, :, None, :]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    shape = (sizes[0] * sizes[1], 1, axes[0].count, axes[1].count)
    at, inside = (array.reshape(shape) for array in (np.where(inside, y * width + x, 0), inside))
    own, rows = _strides(batch, height * width), images.reshape(-1, channels)
    if inside.all():
        return lax.map(lambda at: _rows(rows, at + own), jnp.asarray(at, jnp.int32))
    return lax.map(lambda each: _rows(rows, each[0] + own, each[1]), (jnp.asarray(at, jnp.int32), jnp.asarray(inside)))


def _side_by_side(tiles: jax.Array, axes: Sequence[Axis], out: Sequence[int]) -> jax.Array:
    """``[batch, height, width, features]`` of each tile's (i, j)-th place ``[places, batch, *tiles, features]``."""
    (y, i), (x, j) = (np.divmod(np.arange(n), axis.outputs) for n, axis in zip(out, axes, strict=True))
    return _back(tiles, np.add.outer(i * axes[1].outputs, j), y, x)


def _overlapping(tiles: jax.Array, axes: Sequence[Axis], first: Sequence[int], out: Sequence[int]) -> jax.Array:
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
