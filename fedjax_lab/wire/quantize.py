"""Quantizers: each entry in a few bits."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab import checks
from fedjax_lab.wire import hashing
from fedjax_lab.wire.base import Wire, float_size, l2_norm
from fedjax_lab.wire.packing import pack, pack_trits
from fedjax_lab.wire.vectors import on_vector


def bits_between(bits: Any, least: int, most: int, name: str) -> None:
    """Refuse a number of bits that a quantizer doesn't have."""
    if isinstance(bits, bool) or not isinstance(bits, int | np.integer) or not least <= bits <= most:
        raise ValueError(f"{name} takes {least} to {most} bits, an integer; got {checks.shown(bits)}")


def quantize(bits: int = 8, *, stochastic: bool = False) -> Wire:
    """Uniform quantization between the smallest and the largest entry (Konečný et al. 2016, section 2).

    Args:
      bits: of each entry, 1 to 16.
      stochastic: round up or down at random, which is unbiased, rather than to the nearest level.

    Raises:
      ValueError: another number of bits.
    """
    bits_between(bits, 1, 16, "quantize")
    top = 2**bits - 1

    def encode(vector, ctx):
        low, high = jnp.min(vector), jnp.max(vector)
        scaled = (vector - low) * (top / jnp.where(high > low, high - low, 1))
        level = hashing.rounded(scaled, hashing.seed_of(ctx.private) if stochastic else None)
        return {"codes": pack(_codes(level, top), bits), "range": jnp.stack([low, high])}

    def decode(code, ctx, size):
        low, high = code["range"]
        return low + code["codes"].codes().astype(low.dtype) * ((high - low) / top)

    def bound(norm, like):
        # An entry moves by at most one level, and the levels span at most twice the norm.
        return None if norm is None else norm * (1 + 2 * math.sqrt(float_size(like)) / top)

    return on_vector("quantize", encode, decode, coded=True, bound=bound)


def qsgd(bits: int = 8, *, levels: int | None = None, norm: str = "l2") -> Wire:
    """Stochastic levels of the norm (QSGD, Alistarh et al., NeurIPS 2017, section 3.1). Unbiased.

    The error's expected square is ``norm^2 sum_i f_i (1 - f_i) / s^2`` with ``f_i`` the fractional part of
    ``s |v_i| / norm``. :func:`elias` codes the levels as the paper does.

    Args:
      bits: of each entry, its sign included, 2 to 16: ``s = 2^(bits-1) - 1`` levels.
      levels: the paper's ``s`` itself, in as many bits as ``2s + 1`` codes need.
      norm: ``"l2"``, or ``"max"`` for the paper's practical variant of section 4.

    Raises:
      ValueError: another number of bits or levels, or another norm.
    """
    if norm not in ("l2", "max"):
        raise ValueError(f"norm must be 'l2' or 'max'; got {checks.shown(norm)}")
    if levels is not None:
        checks.positive(levels, "levels", integer=True)
        bits = int(2 * levels).bit_length()
    bits_between(bits, 2, 16, "qsgd")
    s = levels or 2 ** (bits - 1) - 1

    def encode(vector, ctx):
        size = l2_norm(vector) if norm == "l2" else jnp.max(jnp.abs(vector))
        share = jnp.abs(vector) * (s / jnp.where(size > 0, size, 1))
        level = hashing.rounded(share, hashing.seed_of(ctx.private))
        codes = _codes(s + jnp.sign(vector) * jnp.minimum(level, s), 2 * s)
        return {"codes": pack(codes, bits, zero=s), "norm": size}

    def decode(code, ctx, size):
        return (code["codes"].codes().astype(jnp.float32) - s) * (code["norm"] / s)

    def bound(norm_in, like):
        # An entry moves by less than one level of norm / s.
        return None if norm_in is None else norm_in * (1 + math.sqrt(float_size(like)) / s)

    return on_vector("qsgd", encode, decode, coded=True, bound=bound)


def natural() -> Wire:
    """Stochastic rounding to powers of two: a sign and an exponent, 9 bits (Horváth et al. 2019, section 2). Unbiased.

    The error's expected square is at most an eighth of the entry's.
    """

    def encode(vector, ctx):
        word = jax.lax.bitcast_convert_type(vector.astype(jnp.float32), jnp.uint32)
        coin = hashing.bits(hashing.seed_of(ctx.private), vector.shape[0]) >> 9
        up = (coin < (word & 0x7FFFFF)).astype(jnp.uint32)  # the mantissa is the share of the way up
        exponent = jnp.minimum(((word >> 23) & 0xFF) + up, 255)
        return pack((word >> 31 << 8) | exponent, 9)

    def decode(code, ctx, size):
        codes = code.codes().astype(jnp.uint32)
        return jax.lax.bitcast_convert_type((codes >> 8 << 31) | ((codes & 0xFF) << 23), jnp.float32)

    return on_vector("natural", encode, decode, coded=True, bound=lambda norm, like: None if norm is None else 2 * norm)


def terngrad(clip: float | None = None) -> Wire:
    """Each entry as -1, 0 or 1 times the largest (TernGrad, Wen et al., NeurIPS 2017, section 3). Unbiased.

    The error's expected square is ``sum_i |v_i| (max |v| - |v_i|)``. Five entries take a byte.

    Args:
      clip: cut entries at so many standard deviations first (the paper's section 4 has 2.5), which is biased;
        entries that are all the same stay. ``None``: don't.
    """
    if clip is not None:
        checks.positive(clip, "clip")

    def encode(vector, ctx):
        if clip is not None:
            spread = l2_norm(vector - jnp.mean(vector)) / math.sqrt(vector.shape[0])
            # Where entries don't differ there is nothing to cut: a bias of one entry would never be sent.
            limit = jnp.where(spread > 1e-6 * jnp.max(jnp.abs(vector)), clip * spread, jnp.inf)
            vector = jnp.clip(vector, -limit, limit)
        largest = jnp.max(jnp.abs(vector))
        share = jnp.abs(vector) / jnp.where(largest > 0, largest, 1)
        hit = hashing.uniform(hashing.seed_of(ctx.private), vector.shape[0]) < share
        return {"digits": pack_trits(_codes(1 + jnp.sign(vector) * hit, 2)), "largest": largest}

    def decode(code, ctx, size):
        return (code["digits"].codes().astype(jnp.float32) - 1) * code["largest"]

    def bound(norm, like):
        return None if norm is None else norm * math.sqrt(float_size(like))

    return on_vector("terngrad", encode, decode, coded=True, bound=bound)


def _codes(level: jax.Array, top: int) -> jax.Array:
    """Levels as integers in ``0..top``. What is not a number becomes 0; its scale tells."""
    return jnp.clip(jnp.nan_to_num(level), 0, top).astype(jnp.uint8 if top < 256 else jnp.uint16)
