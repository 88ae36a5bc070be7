"""Small integers in their true width: b-bit codes in whole bytes, ternary digits five to a byte."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """``count`` integers of ``bits`` bits, as ``uint8[ceil(count * bits / 8)]``.

    Attributes:
      data: the bytes; the first code stands in the lowest bits of the first.
      bits: static, 1 to 32.
      count: static, how many codes.
      zero: static, the code that stands for zero where codes are levels to both sides of it; else ``None``.
    """

    data: jax.Array
    bits: int = dataclasses.field(metadata={"static": True})
    count: int = dataclasses.field(metadata={"static": True})
    zero: int | None = dataclasses.field(default=None, metadata={"static": True})

    def codes(self) -> jax.Array:
        """``uint32[count]``; ``uint8`` or ``uint16`` where they fit."""
        return unpack(self.data, self.bits, self.count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trits:
    """``count`` ternary digits, five to a byte (3^5 = 243): 1.6 bits each."""

    data: jax.Array
    count: int = dataclasses.field(metadata={"static": True})
    zero: int = dataclasses.field(default=1, metadata={"static": True})

    def codes(self) -> jax.Array:
        """``uint8[count]`` of 0, 1 and 2."""
        digits = self.data[:, None] // jnp.array([1, 3, 9, 27, 81], jnp.uint8)[None] % 3
        return digits.reshape(-1)[: self.count]


def pack(codes: jax.Array, bits: int, zero: int | None = None) -> Packed:
    """Codes ``integer[n]`` below ``2**bits`` in ``ceil(n * bits / 8)`` bytes."""
    return Packed(_bytes(codes, bits), bits, codes.shape[0], zero)


def pack_trits(digits: jax.Array) -> Trits:
    """Ternary digits ``integer[n]`` in ``ceil(n / 5)`` bytes."""
    groups = _grouped(digits.astype(jnp.uint8), 5)
    weights = jnp.array([1, 3, 9, 27, 81], jnp.uint8)[None]
    return Trits(jnp.sum(groups * weights, axis=1, dtype=jnp.uint8), digits.shape[0])


def code_type(bits: int) -> Any:
    """The narrowest unsigned type for codes of so many bits."""
    return jnp.uint8 if bits <= 8 else jnp.uint16 if bits <= 16 else jnp.uint32


def _grouped(codes: jax.Array, group: int) -> jax.Array:
    """``[n] -> [ceil(n / group), group]``, filled up with zeros."""
    pad = -codes.shape[0] % group
    return (jnp.concatenate([codes, jnp.zeros(pad, codes.dtype)]) if pad else codes).reshape(-1, group)


def _recut(rows: jax.Array, width: int, other: int) -> list[jax.Array]:
    """Rows of words of ``width`` bits, cut anew into words of ``other`` bits, each ``uint32[rows]``.

    Both cover the same bits. Bits above a word's ``other`` lowest belong to the words after it.
    """
    columns = [rows[:, i].astype(jnp.uint32) for i in range(rows.shape[1])]
    out = []
    for j in range(len(columns) * width // other):
        word = jnp.zeros(rows.shape[:1], jnp.uint32)
        for i, column in enumerate(columns):
            shift = i * width - j * other
            if -width < shift < other:
                word = word | (column << shift if shift >= 0 else column >> -shift)
        out.append(word)
    return out


def _bytes(codes: jax.Array, bits: int) -> jax.Array:
    codes = codes.astype(code_type(bits))
    if bits in (8, 16, 32):
        return jax.lax.bitcast_convert_type(codes, jnp.uint8).reshape(-1)
    # The smallest group of codes that fills whole bytes.
    whole = math.lcm(bits, 8)
    group, width = whole // bits, whole // 8
    rows = _grouped(codes, group)
    out = [byte.astype(jnp.uint8) for byte in _recut(rows, bits, 8)]
    flat = out[0] if width == 1 else jnp.stack(out, axis=1).reshape(-1)
    return flat[: -(-codes.shape[0] * bits // 8)]


def unpack(data: jax.Array, bits: int, count: int) -> jax.Array:
    """The codes of :func:`pack`, in :func:`code_type`."""
    kind = code_type(bits)
    if bits in (8, 16, 32):
        return jax.lax.bitcast_convert_type(data.reshape(-1, bits // 8), kind).reshape(-1) if bits > 8 else data
    whole = math.lcm(bits, 8)
    group, width = whole // bits, whole // 8
    rows = _grouped(data, width)
    mask = jnp.uint32((1 << bits) - 1)
    out = [(code & mask).astype(kind) for code in _recut(rows, 8, bits)]
    flat = out[0] if group == 1 else jnp.stack(out, axis=1).reshape(-1)
    return flat[:count]
