"""Pictures of sweeps: means over the seeds with their confidence bands, over rounds, bytes or a hyper-parameter."""

from typing import Any

import numpy as np

from fedjax_lab import checks, plots
from fedjax_lab.callbacks import lower_is_better
from fedjax_lab.grids import Number
from fedjax_lab.sweep_result import SweepResult

MOST_LINES, MOST_PANELS = 12, 9


def plot_sweep(result: SweepResult, name: str, x: str = "round", *, level: float = 0.95, **values: Number) -> Any:
    """A line for each value of the first grid, a panel for each point of the others.

    Every line is the mean over the seeds, its shade the mean's confidence band (Student's t at every point by
    itself). Losses beyond twice their start, as of diverging runs, leave the picture.

    Args:
      result: of a sweep.
      name: of a metric.
      x: ``"round"``; ``"uplink_bytes"``, ``"downlink_bytes"`` or ``"bytes"`` (both) so far; or the name of a grid:
        then the last point's value over this hyper-parameter, a line for each point of the others.
      level: of the bands.
      **values: draw only this part of the grid, ``mu=0.1``.

    Returns:
      A ``matplotlib.figure.Figure``; save it with ``figure.savefig("picture.png")``.

    Raises:
      ValueError: an unknown metric, x axis, grid or value; more lines or panels than can be told apart.
    """
    axes = (*plots.X_AXES, *result.grids)
    if x not in axes:
        raise ValueError(f"x must be one of {axes}{checks.nearest(x, axes)}; got {x!r}")
    part = _part(result, values)
    part.scores(name, level=level)  # which refuses what can't be drawn
    note = _note(part, level)
    if x in part.grids:
        return _over_values(part, name, x, level, note)
    if x in result.grids:
        raise ValueError(f"{x} can't be the x axis and have the one value {values.get(x)} as well")
    return _over_rounds(part, name, x, level, note)


def _part(result: SweepResult, values: dict[str, Number]) -> SweepResult:
    """The part of a sweep at some hyper-parameters' values, whose axes go."""
    result.cells.known(values)
    place: list[Any] = [slice(None)] * len(result.grids)
    for axis, (name, grid) in enumerate(result.grids.items()):
        if name in values:
            (place[axis],) = result.cells._replace(grids={name: grid}).point_index({name: values[name]})
    metrics = {name: metric[tuple(place)] for name, metric in result.metrics.items()}
    return result._replace(metrics=metrics, grids={n: g for n, g in result.grids.items() if n not in values})


def _over_rounds(part: SweepResult, name: str, x: str, level: float, note: str | None):
    grids = list(part.grids)
    lines, panels = part.grids.get(grids[0], ()) if grids else (), part.cells._replace(grids=_rest(part, 1)).points()
    _few(len(panels), MOST_PANELS, "panels", grids[1:])
    _few(len(lines), MOST_LINES, "lines", grids[:1])
    shape = (max(len(lines), 1), len(panels), -1)
    mean, (low, high) = part.mean(name).reshape(shape), _ends(part, name, level, shape)
    along = _along(part, name, x).reshape(shape)
    scale, unit = plots.unit_of(along.max(), x)
    columns = min(len(panels), 3)
    shown = _shown(part, name, mean)
    limits = _limits(mean[shown], low[shown], high[shown])  # of all panels, which are there to be compared
    figure, axes = plots.new_figure(-(-len(panels) // columns), columns)
    for panel, (ax, point) in enumerate(zip(axes.flat, panels, strict=False)):
        for line in range(shape[0]):
            look = plots.look(line)
            at = along[line, panel] / scale
            label = f"{lines[line]:g}" if lines else None
            marker = "o" if len(at) <= 25 else None
            ax.plot(at, mean[line, panel], label=label, marker=marker, markersize=3, **look)
            _band(ax, at, low[line, panel], high[line, panel], shown[line, panel], look["color"])
        plots.label_axes(ax, name, x, unit)
        ax.set_title(_told(point), fontsize="medium")
        ax.set_ylim(*limits)
    for ax in list(axes.flat)[len(panels) :]:
        ax.remove()
    _legend(axes.flat[0], "\n".join(filter(None, (_words(grids[0]) if grids else None, note))))
    return figure


def _over_values(part: SweepResult, name: str, x: str, level: float, note: str | None):
    axis = list(part.grids).index(x)
    others = {n: g for n, g in part.grids.items() if n != x}
    points = part.cells._replace(grids=others).points()
    _few(len(points), MOST_LINES, "lines", list(others))
    score, low, high = part.scores(name, level=level)
    last = [score if end is None else end for end in (score, low, high)]
    mean, low, high = (np.moveaxis(each, axis, -1).reshape(len(points), -1) for each in last)
    shown, order = _shown(part, name, mean), np.argsort(part.grids[x])
    at = np.asarray(part.grids[x], np.float64)[order]
    figure, axes = plots.new_figure()
    ax = axes[0, 0]
    for index, point in enumerate(points):
        look = plots.look(index)
        ax.plot(at, mean[index, order], label=_told(point) or None, marker="o", markersize=3, **look)
        _band(ax, at, low[index, order], high[index, order], shown[index, order], look["color"])
    if at[0] > 0 and at[-1] / at[0] >= 20:
        ax.set_xscale("log")
    ax.set_xlabel(_words(x))
    ax.set_ylabel(f"{_words(name)} after {part.points[name][-1]} rounds")
    ax.set_ylim(*_limits(mean[shown], low[shown], high[shown]))
    _legend(ax, note or "")
    return figure


def _band(ax: Any, at: np.ndarray, low: np.ndarray, high: np.ndarray, where: np.ndarray, colour: str) -> None:
    ax.fill_between(at, low, high, where=where, color=colour, alpha=0.18, linewidth=0)


def _rest(part: SweepResult, first: int) -> dict[str, tuple[Number, ...]]:
    return dict(list(part.grids.items())[first:])


def _ends(part: SweepResult, name: str, level: float, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The band's ends in a shape; the mean itself where one seed gives no band."""
    ends = part.band(name, level) if len(part.seeds) > 1 else (part.mean(name),) * 2
    return ends[0].reshape(shape), ends[1].reshape(shape)


def _along(part: SweepResult, name: str, x: str) -> np.ndarray:
    """Each line's x values ``[*grids, points]``: rounds, or the seeds' mean of the bytes so far."""
    rounds = part.points[name]
    if x == "round":
        return np.broadcast_to(rounds, (*part.cells.shape[:-1], len(rounds))).astype(np.float64)
    ending = "link_bytes" if x == "bytes" else x
    each = [values for n, values in part.metrics.items() if n.endswith(ending)]
    if not each:
        raise ValueError(f"no metric of the sweep counts {x}")
    total = np.cumsum(sum(each), axis=-1).mean(-2)
    return np.concatenate([np.zeros((*total.shape[:-1], 1)), total], axis=-1)[..., rounds]


def _shown(part: SweepResult, name: str, mean: np.ndarray) -> np.ndarray:
    """Where a mean is worth room in the picture: not where a loss is beyond twice its start, as of diverging runs."""
    shown = np.isfinite(mean)
    first = np.abs(part.mean(name)[..., 0])
    if lower_is_better(name) and np.isfinite(first).any():
        near = shown & (np.abs(mean) <= 2 * np.median(first[np.isfinite(first)]))  # most runs don't diverge at once
        shown = near if near.any() else shown
    return shown


def _limits(mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[float, float]:
    """The y axis' ends for means with bands; a band much wider than all means together is cut off."""
    if not mean.size:
        return 0.0, 1.0
    bottom, top = mean.min(), mean.max()
    room = 0.75 * (top - bottom) or 0.1 * abs(top) or 1.0
    bottom, top = max(low.min(), bottom - room), min(high.max(), top + room)
    return bottom - 0.05 * room, top + 0.05 * room


def _note(part: SweepResult, level: float) -> str | None:
    count = len(part.seeds)
    return f"mean of {count} seeds, {level:.0%} band" if count > 1 else None


def _legend(ax: Any, title: str) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(title=title or None, frameon=False, fontsize="small", title_fontsize="small")
    elif title:
        ax.set_title(title, fontsize="small", color="0.3")


def _few(count: int, most: int, what: str, grids: list[str]) -> None:
    if count > most:
        raise ValueError(
            f"{count} {what} can't be told apart in one picture (at most {most}): draw a part of the grid by giving "
            f"values, {grids[0]}=..., or put the hyper-parameter on the x axis, x={grids[0]!r}"
        )


def _told(point: dict[str, Number]) -> str:
    return ", ".join(f"{_words(name)} {value:g}" for name, value in point.items())


def _words(name: str) -> str:
    return name.replace("_", " ")
