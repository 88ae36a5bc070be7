"""Lloyd-Max levels after a rotation: DRIVE and EDEN."""

import functools
import math

import jax.numpy as jnp
import numpy as np

from fedjax_lab import checks
from fedjax_lab.wire.base import Wire, float_size, l2_norm
from fedjax_lab.wire.chaining import chain
from fedjax_lab.wire.packing import pack
from fedjax_lab.wire.quantize import bits_between
from fedjax_lab.wire.rotation import BLOCK, block_of, check_block, hadamard, in_rows
from fedjax_lab.wire.seeds import own_seed
from fedjax_lab.wire.vectors import on_vector

SCALES = ("unbiased", "least_squares")


def lloyd_max(bits: int = 1, *, scale: str = "unbiased", block: int | None = None) -> Wire:
    """The levels that lose least of normally distributed entries, as those of a rotated vector are.

    Rotate in front of it: ``chain(hadamard(), lloyd_max(2))`` with one rotation for all, which is undone once
    after the sum; or take :func:`eden`, whose rotations differ by client.

    Args:
      bits: of each entry, 1 to 16.
      scale: what the levels are multiplied by (4 bytes a block). ``"unbiased"``: ``|x|^2 / <x, levels>`` (EDEN,
        Vargaftik et al., ICML 2022, section 3), unbiased behind a random rotation. ``"least_squares"``:
        ``<x, levels> / |levels|^2`` (DRIVE, Vargaftik et al., NeurIPS 2021, section 4.1), the smallest error.
      block: entries that share a scale, as they shared a rotation; ``None``: all.

    Raises:
      ValueError: another number of bits, or another scale.
    """
    bits_between(bits, 1, 16, "lloyd_max")
    if scale not in SCALES:
        raise ValueError(
            f"scale must be one of {SCALES}{checks.nearest(str(scale), SCALES)}; got {checks.shown(scale)}"
        )
    if block is not None:
        check_block(block)
    levels = normal_levels(bits)

    def rows_of(vector, size):
        if block is None:
            return in_rows(vector, size)
        rotated = math.gcd(size, block)  # the width of the rotation's rows, if there was one in front
        return in_rows(vector, rotated if rotated >= min(size, 64) else block_of(size, block))

    def encode(vector, ctx):
        rows = rows_of(vector, vector.shape[0])
        length = l2_norm(rows)
        # Entries beyond the vector are filled up with zeros, which a block's norm and scale don't notice.
        standard = rows * (math.sqrt(rows.shape[1]) / jnp.where(length > 0, length, 1))[:, None]
        codes = _nearest(standard, levels)
        chosen = _take(levels, codes)
        along = jnp.sum(rows * chosen, axis=1)
        if scale == "unbiased":
            factor = length * (length / jnp.where(length > 0, along, 1))
        else:
            factor = along / jnp.sum(chosen * chosen, axis=1)
        return {"codes": pack(codes.reshape(-1)[: vector.shape[0]], bits), "scale": factor}

    def decode(code, ctx, size):
        rows = _take(levels, rows_of(code["codes"].codes(), size))
        return (rows * code["scale"][:, None]).reshape(-1)[:size]

    def bound(norm, like):
        # Levels have the entries' signs, so <x, levels> is at least the smallest of them times |x|_1 >= |x|_2.
        if norm is None or scale == "least_squares":
            return norm
        return norm * math.sqrt(float_size(like)) * float(np.max(levels) / np.min(np.abs(levels)))

    return on_vector("lloyd_max", encode, decode, coded=True, bound=bound)


def eden(bits: int = 1, *, scale: str = "unbiased", block: int = BLOCK, passes: int = 2) -> Wire:
    """EDEN: each client's own random rotation, then Lloyd-Max levels (Vargaftik et al., ICML 2022). Nearly unbiased.

    The error's expected square, as a share of the vector's, tends to .5708, .1331, .0358, .0096 for 1 to 4 bits.

    Args:
      bits, scale: as for :func:`lloyd_max`.
      block: as for :func:`hadamard`; each block has a scale of its own.
      passes: randomized Hadamard transforms, one behind the other. No bias holds exactly for a uniformly random
        rotation. With the single pass that the paper computes with, a vector of two entries among 512 zeros came
        back half too short at 1 bit; with two the bias was 0.2% of its length.
    """
    bits_between(bits, 1, 16, "eden")
    check_block(block)
    checks.positive(passes, "passes", integer=True)
    link = chain(*[hadamard(block)] * passes, lloyd_max(bits, scale=scale, block=block))
    return own_seed(link)._replace(name="eden")


def drive(*, unbiased: bool = True, block: int = BLOCK, passes: int = 2) -> Wire:
    """DRIVE: each client's own random rotation, then signs (Vargaftik et al., NeurIPS 2021, algorithm 1).

    Args:
      unbiased: scale to no bias, with an error of pi/2 - 1; otherwise to the smallest error, 1 - 2/pi.
      block, passes: as for :func:`eden`.
    """
    scale = "unbiased" if unbiased else "least_squares"
    return eden(1, scale=scale, block=block, passes=passes)._replace(name="drive")


@functools.cache
def normal_levels(bits: int) -> np.ndarray:
    """The Lloyd-Max levels of a standard normal variable, ``float32[2**bits]``, rising (Max 1960).

    Computed in float64: from the optimal density of many levels (that of a normal of three times the variance),
    each level is moved to the mean of its interval until nothing moves any more.
    """
    count = 2**bits
    half = _quantile((np.arange(count // 2) + 0.5) / count + 0.5) * math.sqrt(3)
    for _ in range(3000 if bits <= 6 else 30):  # more levels start closer, and move too slowly to matter
        edges = np.concatenate([[0.0], (half[1:] + half[:-1]) / 2, [np.inf]])
        density, tail = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi), _tail(edges)
        mass = tail[:-1] - tail[1:]
        # Far out both differences vanish in rounding: those levels stay where they are.
        half = np.where(mass > 1e-12, (density[:-1] - density[1:]) / np.maximum(mass, 1e-12), half)
    return np.concatenate([-half[::-1], half]).astype(np.float32)


def _tail(x: np.ndarray) -> np.ndarray:
    """The probability that a standard normal variable exceeds ``x``."""
    return np.array([math.erfc(v / math.sqrt(2)) / 2 for v in x])


def _quantile(p: np.ndarray) -> np.ndarray:
    """The quantiles of a standard normal variable."""
    from statistics import NormalDist

    return np.array([NormalDist().inv_cdf(v) for v in p])


def _nearest(values, levels: np.ndarray):
    """The index of the nearest level."""
    edges = (levels[1:] + levels[:-1]) / 2
    if len(levels) <= 16:  # comparing with all is quicker than searching
        code = jnp.zeros(values.shape, jnp.uint8)
        for edge in edges:
            code = code + (values >= edge).astype(jnp.uint8)
        return code
    kind = jnp.uint8 if len(levels) <= 256 else jnp.uint16
    return jnp.searchsorted(jnp.asarray(edges), values, side="right").astype(kind)


def _take(levels: np.ndarray, codes):
    if len(levels) == 2:
        return (codes.astype(jnp.float32) * 2 - 1) * levels[1]
    return jnp.asarray(levels)[codes.astype(jnp.int32)]
