"""sweep: many runs in one program, over seeds and over numeric hyper-parameters."""

import functools
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab import checks
from fedjax_lab.cell_program import CellProgram, MakeProcess, build, checked, trace
from fedjax_lab.grids import Cells, cells_of, keywords
from fedjax_lab.process import Process
from fedjax_lab.progress import headline
from fedjax_lab.progress import progress as show_progress
from fedjax_lab.records import Record, evaluation_record
from fedjax_lab.sweep_result import SweepResult

PyTree = Any


def sweep(
    make_process: MakeProcess,
    num_rounds: int,
    seeds: Sequence[int],
    *,
    params: PyTree = None,
    evaluate: Callable[[Process, PyTree], dict[str, Any]] | None = None,
    every: int = 1,
    batch: int | None = None,
    progress: bool | None = None,
    **grids: Sequence[float],
) -> SweepResult:
    """Run a process for every combination of hyper-parameters, and every seed, side by side in one program.

    One cell of a sweep computes what ``fl.run(make_process(**its values), num_rounds, seed)`` would, up to the
    rounding of float operations that the compiler orders otherwise.

    Args:
      make_process: ``(**hyper-parameters) -> Process``. It is called with numbers first, once for each value of a
        grid, so that bad ones are refused with their names; then with traced values, once for all cells. It must
        not decide by a value in Python, nor may data, cohort or batch sizes depend on one.
      num_rounds: rounds of every run.
      seeds: distinct integers, the results' last axis.
      params: parameters that all runs start from instead of the model's own initialisation.
      evaluate: as in :func:`fedjax_lab.run`: ``(process, state) -> {name: number}``, called before the first round
        and at logging points, for one cell after the other. It compiles once for each point of the grid.
      every: rounds between logging points, run in one dispatch; logging points are as in :func:`fedjax_lab.run`.
      batch: how many cells run at once, all by default. Fewer need less memory; ``batch=1`` runs them one after the
        other, still in one program, which large models on a CPU prefer.
      progress: True, False, or None for a live bar on terminals and in notebooks only.
      **grids: ``name=[values]``, numbers for ``make_process``'s parameters: one axis of the results for each, in this
        order.

    Returns:
      A :class:`fedjax_lab.sweep_result.SweepResult`.

    Raises:
      ValueError: bad arguments; a grid or seeds that are empty, repeat a value or aren't numbers; a name that
        ``make_process`` doesn't take; a value that it refuses; one that can't be traced, with the line.
    """
    num_rounds, every = _count(num_rounds, "num_rounds", 0), _count(every, "every", 1)
    cells = cells_of(grids, seeds)
    keywords(make_process, cells.grids)
    if evaluate is not None and not callable(evaluate):
        raise ValueError(f"evaluate must be a function of (process, state); got {checks.shown(evaluate)}")
    width = cells.count if batch is None else min(_count(batch, "batch", 1), cells.count)
    for name, leaf in checks.named_leaves(params):
        if checks.not_finite(leaf):
            raise ValueError(f"params leaf {name} is NaN or infinite in places: nothing could be trained from it")
    begin = time.monotonic()
    reference = checked(make_process, cells)
    runs = Runs(trace(make_process, cells, reference, params), reference.data, cells, width, params)
    measure = None if evaluate is None else Evaluations(evaluate, make_process, cells, reference)
    with show_progress(num_rounds, 0, progress) as update:
        logs = _run_rounds(runs, num_rounds, every, measure, functools.partial(_report, cells, update))
    last, states = runs.finish()
    metrics, points = _named(logs, measure, cells)
    total = time.monotonic() - begin
    apart = runs.compile_seconds + (measure.first_seconds if measure else 0.0)
    return SweepResult(
        params=last, state=states, metrics=metrics, points=points, grids=cells.grids, seeds=cells.seeds,
        rounds=num_rounds, seconds=total - apart, compile_seconds=apart,
    )  # fmt: skip


class Block(NamedTuple):
    """Cells that run side by side: their numbers (the last one repeated where there are too few), and their state."""

    cells: np.ndarray
    values: tuple[np.ndarray, ...]
    state: PyTree


class Runs:
    """All cells' states on the device, in blocks of equal width that share one compiled program."""

    def __init__(self, program: CellProgram, data: PyTree, cells: Cells, width: int, params: PyTree):
        begin = time.monotonic()
        self.program, self.data, self.cells = program, data, cells
        blocks = -(-cells.count // width)
        self.width = -(-cells.count // blocks)
        numbers = np.minimum(np.arange(blocks * self.width), cells.count - 1).reshape(blocks, self.width)
        values, seeds = cells.flat()
        keys = [jax.random.key(seed) for seed in cells.seeds]

        def start(consts, values, keys, params):
            return jax.vmap(lambda v, k: program.start.call(consts, v, k, params))(values, keys)

        self.blocks, begun = [], None
        for own in numbers:
            own_values = tuple(column[own] for column in values)
            given = (program.start.consts, own_values, jnp.stack([keys[s] for s in seeds[own]]), params)
            begun = begun or jax.jit(start).lower(*given).compile()
            self.blocks.append(Block(own, own_values, begun(*given)))
        self.pick = jax.jit(lambda state, slot: jax.tree.map(lambda leaf: leaf[slot], state))
        self.many = None
        self.compile_seconds = time.monotonic() - begin

    def advance(self, count: int, length: int) -> list[PyTree]:
        """Enqueue ``count`` rounds, of at most ``length``; gives each block's metrics, ``[length, width, ...]``."""
        logs = []
        for i, block in enumerate(self.blocks):
            given = (block.state, block.values, self.data, self.program.step.consts, np.int32(count))
            if self.many is None:
                begin = time.monotonic()
                self.many = jax.jit(self._rounds(length), donate_argnums=0).lower(*given).compile()
                self.compile_seconds += time.monotonic() - begin
            state, log = self.many(*given)
            self.blocks[i] = block._replace(state=state)
            logs.append(log)
        return logs

    def _rounds(self, length: int) -> Callable:
        call = self.program.step.call

        def many(state, values, data, consts, count):
            step = jax.vmap(lambda values, state: call(consts, values, state, data))
            one = jax.eval_shape(step, values, state)[1]
            log = jax.tree.map(lambda m: jnp.zeros((length, *m.shape), m.dtype), one)

            def body(i, carry):
                state, log = carry
                state, metrics = step(values, state)
                return state, jax.tree.map(lambda whole, m: whole.at[i].set(m), log, metrics)

            return jax.lax.fori_loop(0, count, body, (state, log))

        return many

    def each(self) -> Iterator[PyTree]:
        """Every cell's own state, a copy, in the cells' order."""
        for cell in range(self.cells.count):
            yield self.pick(self.blocks[cell // self.width].state, cell % self.width)

    def finish(self) -> tuple[PyTree, PyTree]:
        """All cells' parameters and states, leaves ``[*grids, seeds, ...]``."""
        begin, read = time.monotonic(), self.program.read
        params = jax.jit(lambda consts, v, s: jax.vmap(lambda v, s: read.call(consts, v, s))(v, s))
        given = lambda block: (read.consts, block.values, block.state)
        params = params.lower(*given(self.blocks[0])).compile()
        self.compile_seconds += time.monotonic() - begin
        return self._joined([params(*given(b)) for b in self.blocks]), self._joined([b.state for b in self.blocks])

    def _joined(self, parts: list[PyTree]) -> PyTree:
        count, shape = self.cells.count, self.cells.shape

        def join(*leaves):
            whole = jnp.concatenate(leaves)[:count] if len(leaves) > 1 else leaves[0]
            return whole.reshape(*shape, *whole.shape[1:])

        return jax.tree.map(join, *parts)


class Evaluations:
    """What the evaluation returned, at every logging point and for every cell."""

    def __init__(self, evaluate: Callable, make_process: MakeProcess, cells: Cells, reference: Process):
        # One process for each point of the grid, shared by its seeds: evaluations keep what they compiled for it.
        points = cells.points()
        others = [build(make_process, point)._replace(data=reference.data) for point in points[1:]]
        self.processes, self.evaluate = [reference, *others], evaluate
        self.seeds, self.rounds, self.first_seconds = len(cells.seeds), [], 0.0
        self.records: list[list[Record]] = []

    def __call__(self, runs: Runs, round: int) -> list[Record]:
        records = []
        for cell, state in enumerate(runs.each()):
            begin = time.monotonic()
            records.append(evaluation_record(self.evaluate(self.processes[cell // self.seeds], state)))
            if not self.rounds and cell % self.seeds == 0:
                self.first_seconds += time.monotonic() - begin
        self.rounds.append(round)
        self.records.append(records)
        return records

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for records in self.records for record in records for name in record))


def _run_rounds(runs: Runs, num_rounds: int, every: int, measure, report) -> list[dict[str, np.ndarray]]:
    """All rounds, a dispatch from one logging point to the next; gives the metrics, ``[rounds, cells, ...]`` each.

    The next rounds are enqueued before the last ones' metrics are read, unless an evaluation wants the state between.
    """
    logs, done, pending = [], 0, None
    measured = measure(runs, 0) if measure else []

    def read(round: int, count: int, parts: list[PyTree]) -> None:
        parts = [jax.tree.map(lambda m: m[:count], part) for part in jax.device_get(parts)]
        logs.append(jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1)[:, : runs.cells.count], *parts))
        report(round, logs[-1], measured)

    while done < num_rounds:
        count = min(every - done % every, num_rounds - done)
        log = runs.advance(count, min(every, num_rounds))
        done += count
        if pending is not None:
            read(*pending)
        pending = (done, count, log)
        if measure is not None:
            measured = measure(runs, done)
            read(*pending)
            pending = None
    if pending is not None:
        read(*pending)
    return logs


def _report(cells: Cells, update: Callable, round: int, log: dict[str, np.ndarray], measured: list[Record]) -> None:
    """Tell the progress bar the medians over cells: some runs of a sweep may well diverge."""
    numbers = {name: float(np.median(m[-1])) for name, m in log.items() if m.ndim == 2 and m.dtype.kind == "f"}
    medians = {name: float(np.median([r.get(name, np.nan) for r in measured])) for name in (measured or [{}])[0]}
    update(round, f"{cells.count} runs, medians: {headline(numbers, medians)}")


def _named(logs: list[dict], measure: Evaluations | None, cells: Cells) -> tuple[dict, dict]:
    """Metrics ``{name: [*grids, seeds, points, ...]}`` and the rounds that their points stand for."""
    evaluated = measure.names() if measure else []
    metrics, points = {}, {}
    for name in logs[0] if logs else ():
        values = np.moveaxis(np.concatenate([log[name] for log in logs]), 0, 1)
        if name.endswith("_bytes") and values.shape[2:] == (2,):
            values = values[..., 0].astype(np.int64) * 65536 + values[..., 1]
        label = f"train_{name}" if name in evaluated else name
        metrics[label] = values.reshape(*cells.shape, *values.shape[1:])
        points[label] = np.arange(1, values.shape[1] + 1)
    for name in evaluated:
        values = [[record.get(name, np.nan) for record in records] for records in measure.records]
        metrics[name] = np.array(values).T.reshape(*cells.shape, len(values))
        points[name] = np.array(measure.rounds)
    return metrics, points


def _count(value: Any, name: str, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer; got {checks.shown(value)}") from None
    if isinstance(value, bool) or not least <= number < 2**31:
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")
    return number
