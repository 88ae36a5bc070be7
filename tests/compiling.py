"""Asserting that a program is compiled once, by what JAX reports and not by a cache that may be emptied."""

import contextlib
from collections.abc import Iterator

from tests.refusals import COMPILED


@contextlib.contextmanager
def compiled_once(program: str = "jit(step)") -> Iterator[None]:
    """The block compiles one program of this name, or takes one from the cache, exactly once."""
    begin = len(COMPILED)
    yield
    assert COMPILED[begin:].count(program) == 1, COMPILED[begin:]
