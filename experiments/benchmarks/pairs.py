"""Timing two computations against each other, and the table of what came out."""

import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax


class Row(NamedTuple):
    """One comparison; ``ratio = ours / theirs``, so that less than 1 means that ours is faster.

    Attributes:
      workload, cohort: what ran.
      against: the other side.
      ratio, ours, theirs: ``ours`` and ``theirs`` are medians over the runs, in ``unit``.
      unit: of the two.
      runs: pairs of timings behind the medians.
    """

    workload: str
    cohort: int
    against: str
    ratio: float
    ours: float
    theirs: float
    unit: str
    runs: int


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Wall time of one call, the mean over ``repeats`` made in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / repeats


def paired(
    ours: Callable[[], object], theirs: Callable[[], object], runs: int, at_least: float = 0.1
) -> list[tuple[float, float]]:
    """Interleaved timings ``(ours, theirs)`` in seconds, whichever goes first alternating.

    Each side runs twice beforehand: compiled by the first call, timed in the second, to choose how
    often a timing must repeat it to last ``at_least`` seconds.
    """
    calls = (ours, theirs)
    for call in calls:
        seconds(call, 1)
    repeats = [max(1, round(at_least / seconds(call, 1))) for call in calls]
    out = []
    for run in range(runs):
        order = (0, 1) if run % 2 == 0 else (1, 0)
        took = {side: seconds(calls[side], repeats[side]) for side in order}
        out.append((took[0], took[1]))
    return out


def summary(workload: str, cohort: int, against: str, pairs: Sequence, unit: str) -> Row:
    """The medians of pairs of figures that are in ``unit`` already."""
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Row(workload, cohort, against, ours / theirs, ours, theirs, unit, len(pairs))


def spread(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The lower and upper quartile of the pairs' own ratios."""
    ratios = sorted(a / b for a, b in pairs)
    if len(ratios) < 2:
        return ratios[0], ratios[0]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, high


def machine() -> str:
    """A line about what the figures were measured on."""
    device = jax.devices()[0]
    return f"jax {jax.__version__} on {device.device_kind} ({device.platform}), {os.cpu_count()} cores"


def line(row: Row, pairs: Sequence[tuple[float, float]]) -> str:
    """The row as the table shows it, under :data:`HEADER`."""
    low, high = spread(pairs)
    return (
        f"{row.workload:<9} {row.cohort:>6}  {row.against:<14} {row.ratio:>6.2f}  "
        f"{f'{low:.2f}-{high:.2f}':>11}  {row.ours:>9.1f} {row.theirs:>9.1f}  {row.unit:<12} {row.runs:>4}"
    )


HEADER = (
    f"{'workload':<9} {'cohort':>6}  {'against':<14} {'ratio':>6}  {'quartiles':>11}  "
    f"{'ours':>9} {'theirs':>9}  {'unit':<12} {'runs':>4}"
)


def write(rows: Sequence[Row], file: pathlib.Path) -> None:
    """The rows as a JSON list of objects."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
