"""Asserting that something is refused before anything is compiled."""

from collections.abc import Callable

import jax
import optax
import pytest

from algorithms.fedavg import fedavg
from fedjax_lab import kept_programs
from tests.problems import softmax_model

COMPILED: list[str] = []  # what XLA compiled, or was taken from a cache, since it was last cleared
COPIES = {"jit(stage)", "jit(convert_element_type)"}  # of arrays to the device
PROGRAMS = {"jit(start)", "jit(step)", "jit(many)"}  # of a process and a run


def _count(event: str, seconds: float, **what) -> None:
    if event in ("/jax/core/compile/backend_compile_duration", kept_programs.READ):
        COMPILED.append(what.get("fun_name", "?"))


jax.monitoring.register_event_duration_secs_listener(_count)


def warm() -> None:
    """Compile, unless that was done, how a key is made and the few sums with which an optimizer is asked."""
    jax.random.key(0)
    fedavg(softmax_model(), optax.sgd(0.1))


def raises(call: Callable, *words: str, error: type[Exception] = ValueError) -> None:
    """The call raises, and its message has all the words."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert [w for w in words if w not in message] == [], message


def refused(call: Callable, *words: str, error: type[Exception] = ValueError) -> None:
    """As :func:`raises`, and nothing was compiled but copies."""
    warm()
    COMPILED.clear()
    raises(call, *words, error=error)
    assert set(COMPILED) <= COPIES


def contents(folder) -> dict:
    """Every file below a folder."""
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
