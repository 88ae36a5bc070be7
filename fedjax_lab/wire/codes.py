"""Prefix codes of positive integers: how long their words are on the device, and the words themselves on the host."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Code(NamedTuple):
    """A prefix code of the integers from 1.

    Attributes:
      length: ``(uint32[n]) -> uint32[n]``, bits of each word, on the device.
      write: ``(integer) -> list of bits``.
      read: ``(next bit) -> integer``, on the host.
    """

    length: Callable[[jax.Array], jax.Array]
    write: Callable[[int], list[int]]
    read: Callable[[Callable[[], int]], int]


def _digits(x: jax.Array) -> jax.Array:
    """The number of binary digits, ``uint32``; 1 for 1."""
    return (32 - jax.lax.clz(x.astype(jnp.uint32))).astype(jnp.uint32)


def _binary(value: int, width: int) -> list[int]:
    return [(value >> i) & 1 for i in reversed(range(width))]


def _read_binary(bit: Callable[[], int], width: int, value: int = 0) -> int:
    for _ in range(width):
        value = 2 * value + bit()
    return value


def _write_gamma(x: int) -> list[int]:
    width = x.bit_length()
    return [0] * (width - 1) + _binary(x, width)


def _read_gamma(bit: Callable[[], int]) -> int:
    zeros = 0
    while not bit():
        zeros += 1
    return _read_binary(bit, zeros, 1)


def _write_delta(x: int) -> list[int]:
    width = x.bit_length()
    return _write_gamma(width) + _binary(x, width)[1:]


def _read_delta(bit: Callable[[], int]) -> int:
    return _read_binary(bit, _read_gamma(bit) - 1, 1)


def _omega_length(x: jax.Array) -> jax.Array:
    total, rest = jnp.ones(x.shape, jnp.uint32), x.astype(jnp.uint32)
    for _ in range(5):  # 2^32 is reached after four groups
        more = rest > 1
        digits = _digits(rest)
        total = total + jnp.where(more, digits, 0)
        rest = jnp.where(more, digits - 1, 1)
    return total


def _write_omega(x: int) -> list[int]:
    word = [0]
    while x > 1:
        word = _binary(x, x.bit_length()) + word
        x = x.bit_length() - 1
    return word


def _read_omega(bit: Callable[[], int]) -> int:
    value = 1
    while bit():
        value = _read_binary(bit, value, 1)
    return value


GAMMA = Code(lambda x: 2 * _digits(x) - 1, _write_gamma, _read_gamma)
DELTA = Code(lambda x: _digits(x) - 1 + 2 * _digits(_digits(x)) - 1, _write_delta, _read_delta)
OMEGA = Code(_omega_length, _write_omega, _read_omega)
ELIAS = {"gamma": GAMMA, "delta": DELTA, "omega": OMEGA}


@functools.cache
def rice(bits: int) -> Code:
    """Golomb's code with a parameter of ``2**bits``: a quotient in unary, a remainder in binary."""

    def write(x: int) -> list[int]:
        return [1] * ((x - 1) >> bits) + [0] + _binary((x - 1) & ((1 << bits) - 1), bits)

    def read(bit: Callable[[], int]) -> int:
        quotient = 0
        while bit():
            quotient += 1
        return (quotient << bits) + _read_binary(bit, bits) + 1

    return Code(lambda x: ((x.astype(jnp.uint32) - 1) >> bits) + 1 + bits, write, read)


class BitReader:
    """Bits of a byte string, the highest of each byte first."""

    def __init__(self, data: bytes):
        self._bits = np.unpackbits(np.frombuffer(data, np.uint8))
        self.at = 0

    def __call__(self) -> int:
        if self.at == len(self._bits):
            raise ValueError("the payload ends in the middle of a code word: is it another link's?")
        self.at += 1
        return int(self._bits[self.at - 1])


def bits_to_bytes(bits: list[int]) -> bytes:
    """Bits, the first one highest, filled up to whole bytes with zeros."""
    return np.packbits(np.array(bits, np.uint8)).tobytes()
