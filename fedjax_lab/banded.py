"""Convolutions between few channels, as products with a banded matrix.

A row of an image, cut into tiles of some outputs, times a matrix that holds the filter once for each output, shifted by
a place, gives the tile's outputs for all features at once. Most of the matrix is zeros, so that there are two to four
times as many multiplications; but they are those of one matrix product, and little is copied for it, where XLA's CPU
kernels copy each window and multiply by few features (5x5, one channel to six, 64 images of 28 places: 2.3 -> .32 ms
on one core, the kernel's gradient 1.2 -> .39). The adjoint computes what inputs give to outputs, and is the better one
from more channels to fewer, as in gradients of inputs (5x5, sixteen to six: 2.2 -> .42 ms). The sums are the same,
in another order.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Where it was the faster one or even, of 1 to 20 channels to 6 to 64 features, with 3 and 5 taps, one core, jax 0.10.
FEW_CHANNELS, FEW_FEATURES, ODD_CHANNELS, MORE_FEATURES = 7, 16, (3, 5), 32
# The other way: from many to few, where the window may stick out by more than half, or from not so many; of rows that
# take at most so many times the multiplications (16 places: .60 of the time with 5 taps, but 1.58 with 3).
VERY_FEW_FEATURES, SOME_CHANNELS, MOST_TIMES = 8, 16, 4
# Multiplications that pay for the copies.
LEAST_WORK = 5e5
# Places of a tile: a matrix of some 48 places and channels is large enough, and has few zeros.
TILE, SMALLEST, LARGEST = 48, 4, 8
Padding = Sequence[tuple[int, int]]  # of each axis, before and after


def gathers(channels: int, features: int) -> bool:
    """Is it few channels to few features?"""
    return (channels <= FEW_CHANNELS and features <= FEW_FEATURES) or (
        channels in ODD_CHANNELS and features <= MORE_FEATURES
    )


def spreads(width: int, channels: int, features: int, taps: Sequence[int], padding: Padding) -> bool:
    """Is it from more channels to few features, of images that are not wide?"""
    sticks_out = all(low + high >= n for n, (low, high) in zip(taps, padding, strict=True))
    few = features <= VERY_FEW_FEATURES and features < channels
    return few and width + taps[1] - 1 <= MOST_TIMES * taps[1] and (sticks_out or channels <= SOME_CHANNELS)


def gather(images: jax.Array, kernel: jax.Array, padding: Padding, precision: lax.PrecisionLike) -> jax.Array:
    """A convolution of ``[batch, height, width, channels]`` with ``[taps, taps, channels, features]``."""
    tall, wide, channels, features = kernel.shape
    height, width = (n + sum(p) - k + 1 for n, p, k in zip(images.shape[1:3], padding, kernel.shape, strict=False))
    tile = tile_size(width, wide, channels)
    seen = _seen(images, padding, height, width, (tall, wide), tile)
    given = jnp.dot(seen, _banded(kernel, tile).reshape(-1, tile * features), precision=precision)
    return given.reshape(len(images), height, -1, features)[:, :, :width]


def spread(images: jax.Array, kernel: jax.Array, padding: Padding, precision: lax.PrecisionLike) -> jax.Array:
    """The same, by what each row of inputs gives to the rows of outputs around it."""
    batch, height, width, _ = images.shape
    tall, wide, _, features = kernel.shape
    # What an input gives to is what an output sees, in a kernel turned around.
    matrix = _banded(lax.rev(kernel, (0, 1)).swapaxes(2, 3), width)
    given = jnp.einsum("rc,tgc->rtg", images.reshape(batch * height, -1), matrix, precision=precision)
    # Rows as a window gives them that sticks out to the full; of these, the padding says which are wanted.
    rows = np.arange(height)[:, None] + np.arange(tall) - (tall - 1 - padding[0][0])
    target = np.arange(height + sum(padding[0]) - tall + 1)
    sums = jnp.asarray((target[:, None] == rows.reshape(-1)).astype(np.float32))
    given = given.reshape(batch, height * tall, -1)
    whole = jnp.einsum("bor,brg->bog", jnp.broadcast_to(sums, (batch, *sums.shape)), given, precision="highest")
    start = wide - 1 - padding[1][0]
    columns = slice(start, start + width + sum(padding[1]) - wide + 1)
    return whole.reshape(batch, len(target), width + wide - 1, features)[:, :, columns]


def kernel_gradient(
    images: jax.Array, cotangent: jax.Array, padding: Padding, precision: lax.PrecisionLike
) -> jax.Array:
    """``[taps, taps, channels, features]``, of a convolution's images and its outputs' cotangent (all NHWC)."""
    channels, (_, height, width, features) = images.shape[-1], cotangent.shape
    tall, wide = (n + sum(p) - m + 1 for n, p, m in zip(images.shape[1:3], padding, (height, width), strict=True))
    tile = tile_size(width, wide, channels)
    seen = _seen(images, padding, height, width, (tall, wide), tile)
    given = _padded(cotangent, [(0, 0), (0, -width % tile)]).reshape(-1, tile * features)
    both = lax.dot_general(seen, given, (((0,), (0,)), ((), ())), precision)
    both = both.reshape(tall, tile + wide - 1, channels, tile, features)
    return functools.reduce(lax.add, [both[:, i : i + wide, :, i] for i in range(tile)])


def tile_size(width: int, taps: int, channels: int) -> int:
    """Outputs of a tile, such that all tiles are of about one size."""
    most = min(max(TILE // channels - taps + 1, SMALLEST), LARGEST)
    return -(-width // max(1, round(width / most)))


def _banded(kernel: jax.Array, tile: int) -> jax.Array:
    """``[taps, (tile + taps - 1) * channels, tile * features]``: the filter of each row, shifted for each output."""
    tall, wide, _, features = kernel.shape
    shifts = np.zeros((tile + wide - 1, tile, wide), np.float32)
    for i in range(tile):
        shifts[np.arange(i, i + wide), i, np.arange(wide)] = 1
    # One term of a sum isn't zero: any precision but the highest would round the filter.
    matrix = jnp.einsum("xiw,twcf->txcif", shifts, kernel, precision="highest")
    return matrix.reshape(tall, -1, tile * features)


def _seen(images: jax.Array, padding: Padding, height: int, width: int, taps: Sequence[int], tile: int) -> jax.Array:
    """What each tile sees, ``[batch * height * tiles, taps * (tile + taps - 1) * channels]``."""
    batch, _, before, channels = images.shape
    size, count = tile + taps[1] - 1, -(-width // tile)
    low = padding[1][0]
    images = _padded(images, [padding[0], (low, count * tile + taps[1] - 1 - before - low)])
    rows = images.reshape(batch, -1, images.shape[2] * channels)
    if count > 1:
        # By a product that copies: slices and joins would be fused into each row's own slow loop (1.1 -> .1 ms).
        places = (np.arange(count)[:, None] * tile + np.arange(size)).reshape(-1)
        copies = np.kron(np.eye(images.shape[2], dtype=np.float32)[:, places], np.eye(channels, dtype=np.float32))
        rows = jnp.dot(rows, copies, precision="highest")
    rows = rows.reshape(batch, -1, count, size * channels)
    return lax.concatenate([rows[:, i : i + height] for i in range(taps[0])], 3).reshape(batch * height * count, -1)


def _padded(x: jax.Array, space: Sequence[tuple[int, int]]) -> jax.Array:
    """``[batch, height, width, channels]`` with so many zeros before and after the height and the width."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in space), (0, 0, 0)])
