"""Timing two computations against each other, and the table, figures and picture of what came out."""

import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from fedjax_lab import plots


class Row(NamedTuple):
    """One comparison; ``ratio = ours / theirs``, so that less than 1 means that ours takes less.

    Attributes:
      workload, cohort: what ran.
      against: the other side.
      ratio, ours, theirs: ``ours`` and ``theirs`` are medians over the runs, in ``unit``.
      unit: of the two.
      runs: pairs of measurements behind the medians.
    """

    workload: str
    cohort: int
    against: str
    ratio: float
    ours: float
    theirs: float
    unit: str
    runs: int


class Pair(NamedTuple):
    """Both sides measured one right after the other, and the machine's load average (a minute's) before."""

    ours: float
    theirs: float
    load: float = float("nan")


class Measured(NamedTuple):
    """A comparison with all its pairs; nothing is left out of the medians."""

    row: Row
    pairs: tuple[Pair, ...]


def load() -> float:
    """Processes that wanted a core, on average over the last minute; NaN where the system doesn't say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Wall time of one call, the mean over ``repeats`` made in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / repeats


def paired(ours: Callable[[], object], theirs: Callable[[], object], runs: int, at_least: float = 0.1) -> list[Pair]:
    """Interleaved timings of two calls in this process, as :func:`alternating_pairs`."""
    side = lambda call: lambda repeats: seconds(call, repeats)
    return alternating_pairs((side(ours), side(theirs)), runs, at_least)


def alternating_pairs(sides: Sequence[Callable[[int], float]], runs: int, at_least: float = 0.1) -> list[Pair]:
    """Interleaved timings in seconds of ``repeats -> seconds`` a call, whichever side goes first alternating.

    Each side runs twice beforehand: compiled by the first call, timed in the second, to choose how
    often a timing must repeat it to last ``at_least`` seconds.
    """
    for side in sides:
        side(1)
    repeats = [max(1, round(at_least / side(1))) for side in sides]
    return [alternating(run, lambda side: sides[side](repeats[side])) for run in range(runs)]


def alternating(run: int, measure: Callable[[int], float]) -> Pair:
    """``measure(0)`` of our side and ``measure(1)`` of theirs; ours first in runs of even number."""
    busy = load()
    took = {side: measure(side) for side in ((0, 1) if run % 2 == 0 else (1, 0))}
    return Pair(took[0], took[1], busy)


def scaled(pairs: Sequence[Pair], ours: float, theirs: float | None = None) -> list[Pair]:
    """The pairs in another unit."""
    return [p._replace(ours=p.ours * ours, theirs=p.theirs * (ours if theirs is None else theirs)) for p in pairs]


def summary(workload: str, cohort: int, against: str, pairs: Sequence[Pair], unit: str) -> Measured:
    """The medians of pairs of figures that are in ``unit`` already."""
    ours = statistics.median(p.ours for p in pairs)
    theirs = statistics.median(p.theirs for p in pairs)
    return Measured(Row(workload, cohort, against, ours / theirs, ours, theirs, unit, len(pairs)), tuple(pairs))


def spread(pairs: Sequence[Pair]) -> tuple[float, float]:
    """The lower and upper quartile of the pairs' own ratios."""
    ratios = sorted(p.ours / p.theirs for p in pairs)
    if len(ratios) < 2:
        return ratios[0], ratios[0]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, high


# ---- what is shown and written ----

COLUMNS = "{:<14} {:>6}  {:<20} {:>7}  {:>13}  {:>10} {:>10}  {:<12} {:>4}  {:>9}"
HEADER = COLUMNS.format(
    "workload", "cohort", "against", "ratio", "quartiles", "ours", "theirs", "unit", "runs", "load"
).rstrip()


def machine() -> str:
    """A line about what the figures are measured on."""
    device = jax.devices()[0]
    return (
        f"jax {jax.__version__} on {len(jax.devices())} x {device.device_kind} ({device.platform}), "
        f"{os.cpu_count()} cores, load average {load():.1f}"
    )


def line(measured: Measured) -> str:
    """The comparison as the table shows it, under :data:`HEADER`."""
    row, pairs = measured
    low, high = spread(pairs)
    loads = [p.load for p in pairs]
    return COLUMNS.format(
        row.workload, row.cohort, row.against, f"{row.ratio:.3g}", f"{low:.3g}-{high:.3g}",
        f"{row.ours:.4g}", f"{row.theirs:.4g}", row.unit, row.runs, f"{min(loads):.1f}-{max(loads):.1f}",
    )  # fmt: skip


class NoFile(ValueError):
    """A path that figures can't be written to."""


def begin(file: pathlib.Path | None = None) -> None:
    """The lines above a table, whose figures go to ``file`` in the end.

    Raises:
      NoFile: they can't; said before anything is measured.
    """
    if file is not None:
        above = next(folder for folder in file.absolute().parents if folder.exists())
        if file.is_dir() or not above.is_dir():
            raise NoFile(
                f"--json {file}: {file if file.is_dir() else above} is {'' if file.is_dir() else 'not '}a folder"
            )
        if not os.access(file if file.exists() else above, os.W_OK):
            raise NoFile(f"--json {file}: {file if file.exists() else above} can't be written to")
    print(machine(), HEADER, sep="\n", flush=True)


def show(measured: Measured) -> Measured:
    """Print the comparison's line, as soon as it is known."""
    print(line(measured), flush=True)
    return measured


def write(results: Sequence[Measured], file: pathlib.Path, title: str) -> None:
    """The rows as a JSON list in ``file``, every pair in ``NAME.runs.json``, and a picture in ``NAME.png``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([m.row._asdict() for m in results], indent=1) + "\n")
    raw = {
        "machine": machine(),
        "rows": [{**m.row._asdict(), "pairs": [p._asdict() for p in m.pairs]} for m in results],
    }
    file.with_suffix(".runs.json").write_text(json.dumps(raw, indent=1) + "\n")
    try:
        picture(results, title).savefig(file.with_suffix(".png"), dpi=120)
    except ImportError as error:
        print(f"no picture: {error}", flush=True)


def picture(results: Sequence[Measured], title: str):
    """The ratios and their quartiles, a line each, on a logarithmic axis with a mark at 1."""
    figure, axes = plots.new_figure(width=7.5, height=1.2 + 0.32 * len(results))
    ax = axes[0, 0]
    for place, measured in enumerate(results):
        low, high = spread(measured.pairs)
        ax.plot([low, high], [place, place], color=plots.COLOURS[0], linewidth=5, alpha=0.35)
        ax.plot(measured.row.ratio, place, "o", color=plots.COLOURS[0])
        ax.annotate(f"{measured.row.ratio:.2g}", (measured.row.ratio, place), (0, 6), textcoords="offset points")
    ax.axvline(1, color="0.4", linewidth=1)
    labels = [f"{m.row.workload}, cohort {m.row.cohort}\nagainst {m.row.against}, {m.row.unit}" for m in results]
    ax.set_yticks(range(len(results)), labels, fontsize=7)
    ax.set_ylim(len(results) - 0.4, -0.8)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("{x:g}")
    ax.set_xlabel("ours / theirs (to the left of 1: ours takes less)")
    ax.set_title(title)
    return figure
