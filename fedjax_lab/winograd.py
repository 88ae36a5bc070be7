"""Convolutions with fewer multiplications: Winograd's minimal filtering.

Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks": ``m`` outputs of a filter of ``r`` taps, from
the ``t = m + r - 1`` inputs that they see, take ``t`` multiplications instead of ``m r``, as
``A ((G filter) * (B inputs))`` with three small matrices; in two dimensions ``t^2`` instead of ``(m r)^2``. The sums
over channels lie between the transforms, so each of the ``t^2`` places is a matrix product of ``[tiles, channels]``
and ``[channels, features]``. The gradients are the adjoints.

Each transform is one product with a small matrix over all tiles. They overlap, and those of a batch don't stay in a
core's cache: so it is done a block of images after the other. What is transformed isn't kept for the backward pass, but
the two gradients of a layer are computed in one pass over the blocks, with one transform of the outputs' cotangent.
"""

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedjax_lab import tiles

# A layer by itself takes 1.3 of the time of plain sums with 16 channels and 32 features, 1.3 to 1.5 with 32 and 32, and
# .8 with 32 and 64. A ResNet's rounds were not seen to differ with and without the layers of 32 and 32.
FEWEST_CHANNELS = 32
# Multiplications that pay for the transforms: 24 million take .7 of the time of plain sums, 6 million 1.2.
LEAST_WORK = 1e7
# Bytes of a block's tiles, about what stays in a core's cache. As many for a device of several threads: blocks say in
# which order a kernel's gradient is summed, and W2's rounds on one device and on two were 2e-6 to 7e-6 apart.
BLOCK = 7e5
# Taps of a filter along an axis.
TAPS = (3, 4, 5)


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


def fits(channels: int, features: int, taps: Sequence[int], params: dict[str, Any]) -> bool:
    """Of plain convolutions of images: is it wide enough to pay off, and its precision left to the machine?"""
    return (
        all(n in TAPS for n in taps)
        and min(channels, features) >= FEWEST_CHANNELS
        and params["precision"] in (None, lax.Precision.DEFAULT, (lax.Precision.DEFAULT,) * 2)
    )


class Layer(NamedTuple):
    """A convolution without strides.

    Attributes:
      images: height and width of its images.
      outputs: of what it gives.
      taps: of its kernel.
      low: places that the first window begins before the image.
      precision: of its products.
      most: bytes that the tiles of a block of images may take.
    """

    images: Sequence[int]
    outputs: Sequence[int]
    taps: Sequence[int]
    low: Sequence[int]
    precision: lax.PrecisionLike
    most: float

    @property
    def axes(self) -> list[tiles.Axis]:
        """How its outputs are tiled."""
        return [tiles.tiling(places, taps) for places, taps in zip(self.outputs, self.taps, strict=True)]


def convolution(layer: Layer, images: jax.Array, kernel: jax.Array) -> jax.Array:
    """``[batch, height, width, features]`` from images ``[batch, height, width, channels]`` and a kernel
    ``[*taps, channels, features]``."""
    filters = _filters(layer, kernel)

    def given(images):
        products = _by_place(_seen(layer, images), filters, 1, layer.precision)
        return tiles.side_by_side(_product(layer, "a", products), layer.axes, layer.outputs)

    return _block_by_block(layer, given, images, kernel)


def images_gradient(layer: Layer, cotangent: jax.Array, kernel: jax.Array) -> jax.Array:
    """``[batch, height, width, channels]`` from the outputs' cotangent: the adjoint of :func:`convolution`."""
    filters = _filters(layer, kernel)
    return _block_by_block(layer, lambda c: _taken(layer, _given(layer, c), filters), cotangent, kernel)


def kernel_gradient(layer: Layer, images: jax.Array, cotangent: jax.Array) -> jax.Array:
    """``[*taps, channels, features]`` from the images and the outputs' cotangent."""
    return _summed(layer, images, cotangent, lambda given: None)[0]


def gradients(layer: Layer, images: jax.Array, cotangent: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The kernel's and the images', in one pass over the blocks."""
    filters = _filters(layer, kernel)
    of_kernel, of_images = _summed(layer, images, cotangent, lambda given: _taken(layer, given, filters))
    return of_kernel, tiles.joined(of_images)


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


def _block_by_block(layer: Layer, function: Callable, images: jax.Array, kernel: jax.Array) -> jax.Array:
    size = tiles.block_size(len(images), layer.axes, kernel.shape[2:], layer.most)
    return tiles.joined(lax.map(function, tiles.in_blocks(images, size)))


def _summed(layer: Layer, images: jax.Array, cotangent: jax.Array, beside: Callable) -> tuple[jax.Array, Any]:
    """The kernel's gradient, block by block; and ``beside`` of each block's transformed cotangent."""
    widths = (images.shape[-1], cotangent.shape[-1])
    size = tiles.block_size(len(images), layer.axes, widths, layer.most)

    def add(total, block):
        seen, given = _seen(layer, block[0]), _given(layer, block[1])
        sums = lax.dot_general(_as_rows(seen), _as_rows(given), (((1,), (1,)), ((0,), (0,))), layer.precision)
        return total + sums, beside(given)

    none = jnp.zeros((math.prod(axis.inputs for axis in layer.axes), *widths), images.dtype)
    total, others = lax.scan(add, none, (tiles.in_blocks(images, size), tiles.in_blocks(cotangent, size)))
    gradient = _product(layer, "g", total, adjoint=True)
    return gradient.reshape(*layer.taps, *widths), others


def _seen(layer: Layer, images: jax.Array) -> jax.Array:
    """What each tile of outputs sees, transformed: ``[places, batch, *tiles, channels]``."""
    cut = tiles.cut(images, layer.axes, [axis.inputs for axis in layer.axes], layer.low)
    return _product(layer, "b", cut)


def _given(layer: Layer, cotangent: jax.Array) -> jax.Array:
    """What each tile of outputs gives, transformed: ``[places, batch, *tiles, features]``."""
    cut = tiles.cut(cotangent, layer.axes, [axis.outputs for axis in layer.axes], (0, 0))
    return _product(layer, "a", cut, adjoint=True)


def _filters(layer: Layer, kernel: jax.Array) -> jax.Array:
    """The kernel, transformed: ``[places, channels, features]``."""
    return _product(layer, "g", kernel.reshape(-1, *kernel.shape[2:]))


def _taken(layer: Layer, given: jax.Array, filters: jax.Array) -> jax.Array:
    """The images' gradient, ``[batch, height, width, channels]``."""
    products = _by_place(given, filters, 2, layer.precision)
    return tiles.overlapping(_product(layer, "b", products, adjoint=True), layer.axes, layer.low, layer.images)


def _product(layer: Layer, name: str, places: jax.Array, adjoint: bool = False) -> jax.Array:
    """A transform along both axes, of the first axis: a product with one matrix, that of a tile row by row."""
    matrix = np.kron(*(getattr(minimal_filtering(axis.outputs, axis.taps), name) for axis in layer.axes))
    weights = jnp.asarray(matrix.T if adjoint else matrix, places.dtype)
    return jnp.dot(weights, places.reshape(len(places), -1)).reshape(-1, *places.shape[1:])


def _by_place(rows: jax.Array, filters: jax.Array, axis: int, precision: lax.PrecisionLike) -> jax.Array:
    """A product for each place, of channels and the filters' ``axis``: ``[places, batch, *tiles, n]``."""
    product = lax.dot_general(_as_rows(rows), filters, (((2,), (axis,)), ((0,), (0,))), precision)
    return product.reshape(*rows.shape[:-1], -1)


def _as_rows(places: jax.Array) -> jax.Array:
    """``[places, rows, channels]``."""
    return places.reshape(len(places), -1, places.shape[-1])
