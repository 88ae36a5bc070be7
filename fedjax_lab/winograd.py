"""Convolutions with fewer multiplications: Winograd's minimal filtering.

Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks": ``m`` outputs of a filter of ``r`` taps, from
the ``t = m + r - 1`` inputs that they see, take ``t`` multiplications instead of ``m r``, as
``A ((G filter) * (B inputs))`` with three small matrices; in two dimensions ``t^2`` instead of ``(m r)^2``. The sums
over channels lie between the transforms, so each of the ``t^2`` places is a matrix product of ``[tiles, channels]``
and ``[channels, features]``. A kernel's gradient is the adjoint, and shares the transform of the images with the
forward pass (the compiler computes equal things once). From more channels to fewer, as in the gradient of most
layers' inputs, it is left a convolution: the transforms cost what they save (17.2 against 16.0 ms).

A training step of a CNN with 3x3 kernels (W2 of ``experiments/benchmarks``) takes 16.0 instead of 20.8 ms. Results
differ from those of plain sums by some 2e-6 of the largest, with 5x5 kernels by 1e-5 (one core, jax 0.10).
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# With fewer channels, or more of them than features, the transforms cost what the products save.
FEWEST_CHANNELS = 32
# Multiplications that pay for compiling the transforms, about a second for each layer.
LEAST_WORK = 4e6
# Taps of a filter along an axis. Tiles of more inputs than six would lose digits: their points are larger.
TAPS, MOST_INPUTS = (3, 4, 5), 6
# Larger tiles have more terms to add in their transforms: they may take at most this share of the multiplications.
WORTH = 0.85

Grid = list[list[jax.Array]]
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
    def size(self) -> int:
        """Output places of all tiles; the last ones may stick out."""
        return self.outputs * self.count

    @property
    def filtering(self) -> Filtering:
        """The matrices of such tiles."""
        return minimal_filtering(self.outputs, self.taps)


def fits(channels: int, features: int, taps: Sequence[int], params: dict[str, Any]) -> bool:
    """Of plain convolutions of images: is it wide enough to pay off, and its precision left to the machine?"""
    return (
        all(n in TAPS for n in taps)
        and FEWEST_CHANNELS <= channels <= features
        and params["precision"] in (None, lax.Precision.DEFAULT, (lax.Precision.DEFAULT,) * 2)
    )


def convolution(images: jax.Array, kernel: jax.Array, padding: Padding, precision: lax.PrecisionLike) -> jax.Array:
    """A convolution of ``[batch, height, width, channels]`` with ``[taps, taps, channels, features]``."""
    out = _places(images.shape, kernel.shape, padding)
    axes = [tiling(places, taps) for places, taps in zip(out, kernel.shape, strict=False)]
    seen, filters = _seen(images, padding, axes), _filters(kernel, axes)
    products = [
        [jnp.dot(a, b, precision=precision) for a, b in zip(*row, strict=True)]
        for row in zip(seen, filters, strict=True)
    ]
    tiles = _transformed([axis.filtering.a for axis in axes], products)
    shape = (len(images), *(axis.count for axis in axes), kernel.shape[-1])
    whole = _side_by_side([[tile.reshape(shape) for tile in row] for row in tiles])
    return whole[:, : out[0], : out[1]]


def kernel_gradient(
    images: jax.Array, cotangent: jax.Array, padding: Padding, precision: lax.PrecisionLike
) -> jax.Array:
    """``[taps, taps, channels, features]``, of a convolution's images and its outputs' cotangent (all NHWC)."""
    out = cotangent.shape[1:3]
    sizes = [n + low + high for n, (low, high) in zip(images.shape[1:3], padding, strict=True)]
    axes = [tiling(places, size - places + 1) for places, size in zip(out, sizes, strict=True)]
    seen, given = _seen(images, padding, axes), _given(cotangent, axes)
    by_examples = lambda a, b: lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision)
    products = [by_examples(a, b) for row in zip(seen, given, strict=True) for a, b in zip(*row, strict=True)]
    gradient = _product(_of_filters(axes).T, jnp.stack(products))
    return gradient.reshape(axes[0].taps, axes[1].taps, *gradient.shape[1:])


def tiling(places: int, taps: int) -> Axis:
    """Tiles for an axis of so many outputs: of two places, or of three where that saves enough."""
    small, large = (Axis(m, taps, -(-places // m)) for m in (2, 3))
    saves = large.count * large.inputs <= math.sqrt(WORTH) * small.count * small.inputs  # on each of two axes
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


def _seen(images: jax.Array, padding: Padding, axes: Sequence[Axis]) -> Grid:
    """What each tile of outputs sees, transformed: for each place ``[tiles, channels]``."""
    ends = [
        axis.size + axis.taps - 1 - n - low for axis, n, (low, _) in zip(axes, images.shape[1:3], padding, strict=True)
    ]
    images = padded(images, [(low, end) for (low, _), end in zip(padding, ends, strict=True)])
    grid = _pieces(images, axes, [axis.inputs for axis in axes])
    return _as_rows(_transformed([axis.filtering.b for axis in axes], grid))


def _given(cotangent: jax.Array, axes: Sequence[Axis]) -> Grid:
    """What each tile of outputs gives, transformed: for each place ``[tiles, features]``."""
    short = [axis.size - n for axis, n in zip(axes, cotangent.shape[1:3], strict=True)]
    grid = _pieces(padded(cotangent, [(0, more) for more in short]), axes, [axis.outputs for axis in axes])
    return _as_rows(_transformed([axis.filtering.a.T for axis in axes], grid))


def _filters(kernel: jax.Array, axes: Sequence[Axis]) -> Grid:
    places = _product(_of_filters(axes), kernel.reshape(-1, *kernel.shape[2:]))
    width = axes[1].inputs
    return [[places[i * width + j] for j in range(width)] for i in range(axes[0].inputs)]


def _of_filters(axes: Sequence[Axis]) -> np.ndarray:
    """The transform of a kernel in one matrix: ``[inputs^2, taps^2]``."""
    return np.kron(axes[0].filtering.g, axes[1].filtering.g)


def _product(weights: np.ndarray, places: jax.Array) -> jax.Array:
    return jnp.tensordot(jnp.asarray(weights, places.dtype), places, 1)


def _pieces(images: jax.Array, axes: Sequence[Axis], sizes: Sequence[int]) -> Grid:
    """Of each tile its (i, j)-th place: ``[batch, *tiles, channels]``."""
    tall, wide = axes

    def piece(i, j):
        stop = i + (tall.count - 1) * tall.outputs + 1, j + (wide.count - 1) * wide.outputs + 1
        ends = (len(images), *stop, images.shape[-1])
        return lax.slice(images, (0, i, j, 0), ends, (1, tall.outputs, wide.outputs, 1))

    return [[piece(i, j) for j in range(sizes[1])] for i in range(sizes[0])]


def _transformed(matrices: Sequence[np.ndarray], grid: Grid) -> Grid:
    """``matrices[0] @ grid @ matrices[1].T``, of a grid of arrays."""
    rows, columns = matrices
    half = [_combined(_as_tuples(columns), row) for row in grid]
    whole = [_combined(_as_tuples(rows), column) for column in zip(*half, strict=True)]
    return [list(row) for row in zip(*whole, strict=True)]


def _as_tuples(matrix: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in matrix)


@functools.partial(jax.jit, static_argnums=0)
def _combined(matrix: tuple[tuple[float, ...], ...], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """``matrix @ arrays``: a program of its own, which is traced and lowered once for all of a grid's rows."""
    scaled = lambda weights: [x if w == 1 else x * w for w, x in zip(weights, arrays, strict=True) if w != 0]
    return [functools.reduce(lax.add, scaled(weights)) for weights in matrix]


def _as_rows(grid: Grid) -> Grid:
    return [[x.reshape(-1, x.shape[-1]) for x in row] for row in grid]


def padded(x: jax.Array, space: Sequence[tuple[int, int]]) -> jax.Array:
    """``[batch, height, width, channels]`` with so many zeros before and after the height and the width."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in space), (0, 0, 0)])


def _side_by_side(tiles: Grid) -> jax.Array:
    """``[batch, height, width, features]`` of each tile's (i, j)-th place ``[batch, *tiles, features]``."""
    batch, tall, wide, features = tiles[0][0].shape
    spread = [[x.reshape(batch, tall, 1, wide, 1, features) for x in row] for row in tiles]
    whole = lax.concatenate([lax.concatenate(row, 4) for row in spread], 2)
    return whole.reshape(batch, tall * len(tiles), wide * len(tiles[0]), features)
