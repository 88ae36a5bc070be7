"""Pictures of runs: curves over rounds or bytes, several runs side by side, bands over seeds.

Figures are made without pyplot: they need no display, hold no global state, and show themselves in
notebooks. Colours are those of Okabe and Ito, which colour-blind readers tell apart.
"""

import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_lab import checks
from fedjax_lab.records import Record, check_name, known_names

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
X_AXES = ("round", "uplink_bytes", "downlink_bytes", "bytes")
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))


def new_figure(rows: int = 1, columns: int = 1, width: float = 5.0, height: float = 3.4):
    """A matplotlib Figure and its axes ``[rows, columns]``, with quiet grids; no pyplot involved.

    Args:
      rows, columns: of panels.
      width, height: of one panel, in inches.

    Raises:
      ImportError: matplotlib isn't installed.
    """
    figure = checks.optional("matplotlib.figure", "plotting", "plots").Figure(
        figsize=(width * columns, height * rows), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.grid(True, color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return shows_itself(figure), axes


def shows_itself(figure: Any) -> Any:
    """The same figure, which notebooks now show when it is a cell's last value."""
    figure._repr_png_ = functools.partial(_png, figure)
    return figure


def look(index: int) -> dict[str, Any]:
    """Colour and line style of the curve number ``index``: distinct for 28 of them."""
    style = STYLES[index // len(COLOURS) % len(STYLES)]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": style}


def plot_metrics(records: Sequence[Record], *names: str, x: str = "round"):
    """Curves of one run's metrics, a panel each.

    Args:
      records: ``Result.metrics``.
      names: which metrics; by default the loss and those that evaluations added.
      x: ``"round"``, or ``"uplink_bytes"``, ``"downlink_bytes"`` or ``"bytes"`` (both) so far.

    Returns:
      A ``matplotlib.figure.Figure``; save it with ``figure.savefig("picture.png")``.

    Raises:
      ValueError: a metric or an x axis that isn't there, with the nearest name.
    """
    names = names or _default_names(records)
    for name in names:
        check_name(name, records)
    columns = min(len(names), 3)
    figure, axes = new_figure(-(-len(names) // columns), columns)
    for ax, name in zip(axes.flat, names, strict=False):
        draw_runs(ax, {name: records}, name, x)
    for ax in list(axes.flat)[len(names) :]:
        ax.remove()
    return figure


def plot_runs(runs: Mapping[str, Any], *names: str, x: str = "round", target: float | None = None):
    """Several runs in one picture, a panel for each metric.

    Args:
      runs: label -> a Result, its metrics, or a list of either: one for each seed, drawn as their mean
        with a band of one standard deviation to both sides.
      names: the metrics.
      x: as in :func:`plot_metrics`.
      target: a value of the first metric to reach, drawn as a line.

    Returns:
      A ``matplotlib.figure.Figure``.
    """
    if not runs or not names:
        raise ValueError("plot_runs needs at least one run and the name of a metric")
    figure, axes = new_figure(1, len(names))
    for ax, name in zip(axes.flat, names, strict=True):
        draw_runs(ax, runs, name, x)
    first = axes.flat[0]
    if target is not None:
        first.axhline(target, color="0.4", linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        first.annotate(
            f"{target:g}", (0, target), (4, 2), xycoords=("axes fraction", "data"),
            textcoords="offset points", color="0.4", fontsize="small",
        )  # fmt: skip
    counts = {len(_seeds(run)) for run in runs.values()}
    title = f"mean ± s.d. over {max(counts)} seeds" if len(counts) == 1 and max(counts) > 1 else None
    if len(runs) > 1 or title:
        first.legend(title=title, frameon=False, fontsize="small", title_fontsize="small")
    return figure


def draw_runs(ax: Any, runs: Mapping[str, Any], name: str, x: str = "round") -> None:
    """Draw one metric of several runs into given axes, with labels on both; see :func:`plot_runs`."""
    seeds = {label: [_records(run) for run in _seeds(runs[label])] for label in runs}
    curves = {label: curve(each, name, x) for label, each in seeds.items()}
    largest = max(xs[-1] for xs, _, _ in curves.values())
    scale, unit = unit_of(largest, x)
    unequal = len({len(each) for each in seeds.values()}) > 1
    for index, (label, (xs, mean, spread)) in enumerate(curves.items()):
        several = len(seeds[label]) > 1
        told = f"{label} ({len(seeds[label])} seeds, ± s.d.)" if several and unequal else label
        marker = "o" if len(xs) <= 25 else None
        ax.plot(xs / scale, mean, label=told, marker=marker, markersize=3, **look(index))
        if several:
            low, high, colour = mean - spread, mean + spread, look(index)["color"]
            ax.fill_between(xs / scale, low, high, color=colour, alpha=0.18, linewidth=0)
    label_axes(ax, name, x, unit)


def unit_of(largest: float, x: str = "round") -> tuple[float, str]:
    """The scale and the unit in which an x axis up to ``largest`` reads best; rounds have none."""
    return next(u for u in _UNITS if largest >= u[0] or u[0] == 1) if x != "round" else (1, "")


def label_axes(ax: Any, name: str, x: str, unit: str) -> None:
    """Label both axes of a curve of the metric ``name``."""
    words = {"round": "round", "bytes": "uplink and downlink"}.get(x, x.removesuffix("_bytes"))
    ax.set_xlabel("round" if x == "round" else f"{words} so far ({unit})")
    ax.set_ylabel(name.replace("_", " "))
    if x == "round":
        ax.xaxis.get_major_locator().set_params(integer=True)


def curve(seeds: Sequence[Sequence[Record]], name: str, x: str = "round") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One metric over the rounds in which every seed has it.

    Returns:
      x, mean and standard deviation over the seeds, each ``float64[points]``.
    """
    if x not in X_AXES:
        raise ValueError(f"x must be one of {X_AXES}{checks.nearest(x, X_AXES)}; got {x!r}")
    series = []
    for records in seeds:
        check_name(name, records)
        so_far, points = 0.0, {}
        for record in records:
            so_far += 0 if x == "round" else _travelled(record, x)
            if isinstance(record.get(name), int | float):
                points[record["round"]] = (record["round"] if x == "round" else so_far, record[name])
        series.append(points)
    shared = sorted(set.intersection(*(set(points) for points in series)))
    if not shared:
        raise ValueError(f"the metric {name!r} has no round that all {len(series)} seeds recorded")
    values = np.array([[points[round] for round in shared] for points in series], np.float64)
    return values[..., 0].mean(0), values[..., 1].mean(0), values[..., 1].std(0)


def _travelled(record: Record, x: str) -> float:
    """A round's bytes in one direction or both, probes included."""
    ending = "link_bytes" if x == "bytes" else x
    return sum(value for name, value in record.items() if name.endswith(ending))


def _seeds(run: Any) -> list[Any]:
    """A run as a list of seeds: a Result and a list of records are one seed each."""
    if hasattr(run, "metrics") or not run or isinstance(run[0], Mapping):
        return [run]
    return list(run)


def _records(run: Any) -> Sequence[Record]:
    records = getattr(run, "metrics", run)
    if not records:
        raise ValueError("a run without records can't be drawn")
    return records


def _default_names(records: Sequence[Record]) -> tuple[str, ...]:
    names = known_names(records)
    evaluated = [n for n in records[0] if n != "round"] if records and records[0]["round"] == 0 else []
    families = [n for n in evaluated if not any(n.startswith(f"{m}_") for m in evaluated if m != n)]
    chosen = [n for n in ("loss", "train_loss") if n in names and n not in families] + families
    counts = ("invited", "survivors", "non_finite")
    rest = [n for n in names if not n.endswith("_bytes") and n not in counts]
    if not (chosen := chosen or rest[:1]):
        raise ValueError("there is no metric to draw")
    return tuple(chosen[:6])


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
