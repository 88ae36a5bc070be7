"""One session of a run: its rounds between where it begins and where it ends.

Rounds between two logging points run in one dispatch. The loop on the device has a trip count that
is an argument: whatever the number of rounds, it is one program, compiled once, so that a run cut in
two anywhere computes the same bits.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedjax_lab import compiling, hosts, run_folder
from fedjax_lab.callbacks import Callback, Info
from fedjax_lab.process import HostStep, Process
from fedjax_lab.progress import headline
from fedjax_lab.records import (
    Record,
    byte_totals,
    evaluation_record,
    merge,
    renamed,
    round_records,
)
from fedjax_lab.result import Result

PyTree = Any

FINISHED, INTERRUPTED = "all rounds done", "interrupted"


class Clock:
    """Wall time of a session, building and first calls apart."""

    def __init__(self):
        self.begin = time.monotonic()
        self.compiling = 0.0

    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def first_apart(self, function: Callable) -> Callable:
        """The function, the time of its first call counted as compiling."""
        called = False

        def timed(*args):
            nonlocal called
            if called:
                return function(*args)
            called, begin = True, time.monotonic()
            try:
                return function(*args)
            finally:
                self.compiling += time.monotonic() - begin

        return timed


class Session:
    """Where a run stands on the host."""

    def __init__(self, process: Process, start: run_folder.Start, disk: run_folder.Disk, clock: Clock):
        self.process, self.disk, self.clock = process, disk, clock
        self.state, self.done, self.records = start.state, start.done, list(start.records)
        self.begun, self.before = start.done, start.kept
        self.totals: dict[str, int] = dict(start.kept.get("bytes", {}))

    def write(self, new: list[Record]) -> None:
        for name, value in byte_totals(new).items():
            self.totals[name] = self.totals.get(name, 0) + value
        self.records.extend(new)
        self.disk.append(new)

    def ask(self, callbacks: Sequence[Callback]) -> str:
        """Why a callback wants to end the run; nothing if none does."""
        if not callbacks or not (self.records or hosts.several()):
            return ""
        answer = self._answer(callbacks) if self.records else ""
        if not hosts.decided(lambda: bool(answer))():
            return ""
        return answer or "stopped by the leading process"

    def _answer(self, callbacks: Sequence[Callback]) -> str:
        info = Info(self.done, self.records[-1], self.records, self.state, self.process, self.begun)
        answers = [(callback, callback(info)) for callback in callbacks]
        for callback, answer in answers:
            if answer:
                name = getattr(callback, "__name__", type(callback).__name__)
                return answer if isinstance(answer, str) else f"stopped by {name}"
        return ""

    def times(self) -> dict[str, float]:
        now = {
            "seconds": self.clock.elapsed() - self.clock.compiling,
            "compile_seconds": self.clock.compiling,
        }
        return {name: value + self.before.get(name, 0.0) for name, value in now.items()}

    def save(self) -> None:
        self.disk.save(self.done, self.state, {"bytes": self.totals, **self.times()})

    def result(self, stopped: str) -> Result:
        ending = lambda end: sum(v for n, v in self.totals.items() if n.endswith(end))
        return Result(
            self.process.params(self.state), self.state, self.records,
            ending("uplink_bytes"), ending("downlink_bytes"), self.done, stopped, **self.times(),
        )  # fmt: skip


def run_rounds(
    s: Session,
    num_rounds: int,
    every: int,
    evaluate: Callable | None,
    callbacks: Sequence[Callback],
    interrupted: Callable[[], bool],
    update: Callable[[int, str], None],
) -> str:
    """Go on to ``num_rounds`` rounds, or until a callback or Ctrl-C ends it; returns the reason."""
    step = s.process.step
    if isinstance(step, HostStep):
        many = s.clock.first_apart(_one_by_one(step))
    else:
        many = _compiled_apart(_many(step, max(min(every, num_rounds), 1), s.process.mesh), s.clock)
    measured: Record = {}
    if evaluate is not None:
        evaluate = s.clock.first_apart(evaluate)
        if not s.done and not s.records:
            measured = evaluation_record(evaluate(s.process, s.state))
            s.write([{"round": 0} | measured])
    taken = set(s.records[0]) - {"round"} if s.records and s.records[0]["round"] == 0 else set()
    stopped = s.ask(callbacks)
    pending = None  # rounds whose metrics are still on the device
    while s.done < num_rounds and not stopped and not interrupted():
        first, count = s.done, min(every - s.done % every, num_rounds - s.done)
        s.state, metrics = many(s.state, s.process.data, count)
        s.done += count
        if pending is not None:
            s.write(_read(*pending, taken))  # while the new rounds are under way
        pending = (first, count, metrics)
        at_end = s.done == num_rounds or interrupted()
        if evaluate is not None or callbacks or s.disk.due() or at_end:
            new, pending = _read(*pending, taken), None
            if evaluate is not None:
                measured = evaluation_record(evaluate(s.process, s.state))
                new[-1] = merge(new[-1], measured, taken)
            s.write(new)
            stopped = s.ask(callbacks)
            if s.disk.due():
                s.save()
        if s.records:
            update(s.records[-1]["round"], headline(s.records[-1], measured))
    if pending is not None:
        s.write(_read(*pending, taken))
    s.save()
    return stopped or (FINISHED if s.done == num_rounds else INTERRUPTED)


def _read(first: int, count: int, metrics: Any, taken: set[str]) -> list[Record]:
    return round_records(first, count, renamed(jax.device_get(metrics), taken))


def _one_by_one(step: HostStep) -> Callable:
    """As :func:`_many`, for a step that the host makes; no metric is waited for in between."""

    def many(state, data, count):
        log = []
        for _ in range(count):
            state, metrics = step(state, data)
            log.append(metrics)
        return state, {name: [metrics[name] for metrics in log] for name in log[0]}

    return many


def rounds_of(step: Callable, length: int, state: PyTree, count: jax.Array) -> tuple[PyTree, PyTree]:
    """``count <= length`` rounds of ``step(state) -> (state, metrics)``; metrics ``[length, ...]``, zeros behind."""
    one = jax.eval_shape(step, state)[1]
    log = jax.tree.map(lambda m: jnp.zeros((length, *m.shape), m.dtype), one)

    def body(i, carry):
        state, log = carry
        state, metrics = step(state)
        return state, jax.tree.map(lambda whole, m: whole.at[i].set(m), log, metrics)

    return jax.lax.fori_loop(0, count, body, (state, log))


def _compiled_apart(many: Callable, clock: Clock) -> Callable:
    """The function, compiled by a first call that makes no round, so that the rounds' own time is known."""
    compiled = False

    def timed(state, data, count):
        nonlocal compiled
        if not compiled:
            compiled = True
            state, _ = clock.first_apart(many)(state, data, 0)
        return many(state, data, count)

    return timed


@functools.lru_cache(maxsize=8)
def _many(step: Callable, length: int, mesh: Mesh | None) -> Callable:
    """``(state, data, count) -> (state, metrics)``: up to ``length`` rounds, metrics ``[length, ...]``.

    Kept for the next run of the same process, which then compiles nothing. The state is donated.

    Args:
      step: one round.
      length: of the log.
      mesh: the devices that the rounds run on, if they are several.
    """
    step = jax.jit(step)

    def many(state, data, count):
        return rounds_of(lambda state: step(state, data), length, state, count)

    return compiling.jit(many, mesh, donate_argnums=0)
