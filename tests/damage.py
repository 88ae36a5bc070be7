"""Damaged copies of a file: for the promise that bad data is named (promises.md, row 26)."""

import pathlib
from collections.abc import Iterator

import numpy as np


def truncations(content: bytes, count: int = 50, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """``count`` copies cut off at random places, the empty one and one lacking a byte among them."""
    rng = np.random.default_rng(seed)
    lengths = [0, len(content) - 1, *rng.integers(1, len(content) - 1, count - 2)]
    for length in lengths:
        yield f"cut to {length} of {len(content)} bytes", content[:length]


def flips(content: bytes, count: int = 50, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """``count`` copies with one random bit changed."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        place, bit = int(rng.integers(len(content))), int(rng.integers(8))
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        yield f"bit {bit} of byte {place}", bytes(damaged)


def outcomes(path: pathlib.Path, copies, read) -> Iterator[tuple[str, object]]:
    """What reading each copy gives: its result, or the ValueError it raised; no file is left over."""
    content = path.read_bytes()
    before = sorted(path.parent.iterdir())
    for what, damaged in copies:
        path.write_bytes(damaged)
        try:
            yield what, read()
        except ValueError as error:
            yield what, error
        assert sorted(path.parent.iterdir()) == before, "something was left behind"
    path.write_bytes(content)
