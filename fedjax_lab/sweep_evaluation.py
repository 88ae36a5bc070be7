"""Evaluating a sweep's cells at logging points: side by side where the evaluation allows it, else one by one.

An evaluation with the attributes ``arrays``, ``(process, state) -> pytree`` (pure: it may be traced), and ``numbers``,
``(pytree of NumPy arrays) -> {name: number}``, of which ``evaluate(process, state)`` is the composition, runs its first
half for many cells in one program. Any other function is called on the host for one cell after the other.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

from fedjax_lab.cell_program import MakeProcess, build, trace_more
from fedjax_lab.grids import Cells
from fedjax_lab.process import Process
from fedjax_lab.records import Record, evaluation_record
from fedjax_lab.sweep_runs import Runs

Evaluate = Callable[[Process, Any], dict[str, Any]]
Measure = Callable[[Runs], Iterator[dict[str, Any]]]


class Evaluations:
    """What the evaluation returned at every logging point, for every cell."""

    def __init__(self, measure: Measure):
        self.measure, self.seconds = measure, 0.0  # of the first time, when everything compiles
        self.rounds: list[int] = []
        self.records: list[list[Record]] = []

    def __call__(self, runs: Runs, round: int) -> list[Record]:
        begin = time.monotonic()
        records = [evaluation_record(values) for values in self.measure(runs)]
        if not self.rounds:
            self.seconds = time.monotonic() - begin
        self.rounds.append(round)
        self.records.append(records)
        return records

    def names(self) -> list[str]:
        """Every name that some cell has at some point."""
        return list(dict.fromkeys(name for records in self.records for record in records for name in record))


def evaluations(evaluate: Evaluate, make_process: MakeProcess, cells: Cells, reference: Process) -> Evaluations:
    """How to evaluate a sweep's cells."""
    if callable(getattr(evaluate, "arrays", None)) and callable(getattr(evaluate, "numbers", None)):
        return Evaluations(_side_by_side(evaluate, make_process, cells, reference))
    return Evaluations(_one_by_one(evaluate, make_process, cells, reference))


def _side_by_side(evaluate: Any, make_process: MakeProcess, cells: Cells, reference: Process) -> Measure:
    looked: list = []

    def measure(runs: Runs) -> Iterator[dict[str, Any]]:
        if not looked:
            first = next(runs.each())
            look = lambda process, state, data: evaluate.arrays(process._replace(data=data), state)
            looked.append(runs.reading(trace_more(look, make_process, cells, reference, first)))
        for arrays in looked[0]():
            yield evaluate.numbers(arrays)

    return measure


def _one_by_one(evaluate: Evaluate, make_process: MakeProcess, cells: Cells, reference: Process) -> Measure:
    # One process for each point of the grid, shared by its seeds: evaluations keep what they compiled for it.
    processes = [reference, *(build(make_process, point)._replace(data=reference.data) for point in cells.points()[1:])]

    def measure(runs: Runs) -> Iterator[dict[str, Any]]:
        for cell, state in enumerate(runs.each()):
            yield evaluate(processes[cell // len(cells.seeds)], state)

    return measure
