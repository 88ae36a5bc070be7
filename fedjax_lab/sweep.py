"""sweep: many runs in one program, over seeds and over numeric hyper-parameters."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fedjax_lab import checks, memory
from fedjax_lab.cell_program import MakeProcess, checked, trace
from fedjax_lab.grids import Cells, cells_of, keywords
from fedjax_lab.process import Process
from fedjax_lab.progress import headline
from fedjax_lab.progress import progress as show_progress
from fedjax_lab.records import Record
from fedjax_lab.sweep_evaluation import Evaluations, evaluations
from fedjax_lab.sweep_result import SweepResult
from fedjax_lab.sweep_runs import Runs, devices_for, side_by_side

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
    devices: int | None = None,
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
        and at logging points. This library's own (:func:`fedjax_lab.global_metrics` and the like) run in one program
        for all cells, see :mod:`fedjax_lab.sweep_evaluation`; any other function is called for one cell after the
        other, with one process for each point of the grid.
      every: rounds between logging points, run in one dispatch; logging points are as in :func:`fedjax_lab.run`.
      batch: how many cells run at once, over all devices; the others wait, and go through the same program. Fewer need
        less memory. By default all of them, on a CPU as many as gain by it: models of some thousand parameters side
        by side, larger ones one at a time on each device.
      devices: how many of this computer's devices share the cells out, all by default. Each runs its cells by itself,
        with a copy of the data. A process with a mesh of its own uses that instead.
      progress: True, False, or None for a live bar on terminals and in notebooks only.
      **grids: ``name=[values]``, numbers for ``make_process``'s parameters: one axis of the results for each, in this
        order.

    Returns:
      A :class:`fedjax_lab.sweep_result.SweepResult`.

    Raises:
      ValueError: bad arguments; a grid or seeds that are empty, repeat a value or aren't numbers; a name that
        ``make_process`` doesn't take; a value that it refuses; one that can't be traced, with the line; too little
        memory for all cells' states, with the estimate.
    """
    num_rounds, every = checks.integer(num_rounds, "num_rounds", 0, 2**31), checks.integer(every, "every", 1, 2**31)
    cells = cells_of(grids, seeds)
    keywords(make_process, cells.grids)
    if evaluate is not None and not callable(evaluate):
        raise ValueError(f"evaluate must be a function of (process, state); got {checks.shown(evaluate)}")
    batch = None if batch is None else checks.integer(batch, "batch", 1, 2**31)
    for name, leaf in checks.named_leaves(params):
        if checks.not_finite(leaf):
            raise ValueError(f"params leaf {name} is NaN or infinite in places: nothing could be trained from it")
    begin = time.monotonic()
    reference = checked(make_process, cells)
    places = devices_for(reference, devices)
    program = trace(make_process, cells, reference, params)
    here = places or jax.default_backend() == "cpu"  # else a mesh of the process's own
    memory.require_cells(cells.count, program.state, 1 if here else jax.local_device_count())
    batch = batch or side_by_side(program, cells, len(places))
    measure = None if evaluate is None else evaluations(evaluate, make_process, cells, reference)
    apart = time.monotonic() - begin
    runs = Runs(program, reference.data, cells, batch, places, params)
    with show_progress(num_rounds, 0, progress) as update:
        logs = _run_rounds(runs, num_rounds, every, measure, functools.partial(_report, cells, update))
    last, states = runs.finish()
    metrics, points = _named(logs, measure, cells)
    total = time.monotonic() - begin
    apart += runs.compile_seconds + (measure.seconds if measure else 0.0)
    return SweepResult(
        params=last, state=states, metrics=metrics, points=points, grids=cells.grids, seeds=cells.seeds,
        rounds=num_rounds, seconds=total - apart, compile_seconds=apart,
    )  # fmt: skip


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
