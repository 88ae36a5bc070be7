"""SweepResult: what a sweep came to, with one axis for each grid and one for the seeds."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_lab import checks
from fedjax_lab.callbacks import lower_is_better
from fedjax_lab.grids import Cells, Number
from fedjax_lab.records import Record, plain
from fedjax_lab.result import Result

PyTree = Any
REDUCTIONS = ("last", "best", "mean")


class Best(NamedTuple):
    """The best point of a grid.

    Attributes:
      values: its hyper-parameters.
      mean: the metric's mean over the seeds there.
      low, high: the mean's confidence band; ``None`` with one seed.
    """

    values: dict[str, Number]
    mean: float
    low: float | None
    high: float | None


class SweepResult(NamedTuple):
    """What a sweep came to.

    Attributes:
      params: of the server's model, leaves ``[*grids, seeds, ...]``.
      state: the processes' whole states, leaves likewise.
      metrics: ``{name: array[*grids, seeds, points]}``; a point is a round, or a logging point for what the
        evaluation measured. NaN where there is no finite value. Byte counts are exact (``int64``).
      points: ``{name: int[points]}``, the number of rounds done at each point.
      grids: ``{name: values}``, in the order of the axes.
      seeds: the last of these axes.
      rounds: rounds done in each run.
      seconds: wall time of all rounds and evaluations.
      compile_seconds: wall time of tracing, compiling and building the states, first evaluations included.
    """

    params: PyTree
    state: PyTree
    metrics: dict[str, np.ndarray]
    points: dict[str, np.ndarray]
    grids: dict[str, tuple[Number, ...]]
    seeds: tuple[int, ...]
    rounds: int
    seconds: float
    compile_seconds: float

    @property
    def cells(self) -> Cells:
        """The grids and seeds as :class:`fedjax_lab.grids.Cells`."""
        return Cells(self.grids, self.seeds)

    @property
    def uplink_bytes(self) -> np.ndarray:
        """Exact totals of every run, probes included: ``int64[*grids, seeds]``."""
        return self._bytes("uplink_bytes")

    @property
    def downlink_bytes(self) -> np.ndarray:
        """Exact totals of every run, probes included: ``int64[*grids, seeds]``."""
        return self._bytes("downlink_bytes")

    def mean(self, name: str) -> np.ndarray:
        """A metric's mean over the seeds, ``float64[*grids, points]``; NaN where a seed has no finite value."""
        return np.mean(self._metric(name), axis=len(self.grids))

    def band(self, name: str, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """The two ends of the mean's confidence band, each ``float64[*grids, points]``.

        Student's t interval, ``mean +- t s / sqrt(n)`` over ``n`` seeds, at every point by itself. It says how well
        the seeds determine the mean, and not how far single runs scatter.

        Raises:
          ValueError: one seed, an unknown metric, a level outside 0..1.
        """
        from scipy.special import stdtrit

        checks.probability(level, "level")
        n = len(self.seeds)
        if n < 2:
            raise ValueError("a confidence band needs at least two seeds, such as seeds=range(8)")
        values, axis = self._metric(name), len(self.grids)
        with np.errstate(invalid="ignore"):  # of runs that diverged
            half = stdtrit(n - 1, (1 + level) / 2) * np.std(values, axis=axis, ddof=1) / np.sqrt(n)
            mean = np.mean(values, axis=axis)
        return mean - half, mean + half

    def cell(self, *, seed: int | None = None, **values: Number) -> Result:
        """One cell as the :class:`fedjax_lab.result.Result` that its own run would give.

        Its ``seconds`` and ``compile_seconds`` are its share of the sweep's.

        Args:
          seed: one of the seeds; may be left out if there is one only.
          **values: of the hyper-parameters, as they were given; likewise.

        Raises:
          ValueError: a name, value or seed that the sweep doesn't have, with those that it has.
        """
        place, count = self.cells.index(seed, values), self.cells.count
        one = lambda tree: jax.tree.map(lambda leaf: leaf[place], tree)
        return Result(
            params=one(self.params), state=one(self.state), metrics=self._records(place),
            uplink_bytes=int(self.uplink_bytes[place]), downlink_bytes=int(self.downlink_bytes[place]),
            rounds=self.rounds, stopped="all rounds done",
            seconds=self.seconds / count, compile_seconds=self.compile_seconds / count,
        )  # fmt: skip

    def runs(self, **values: Number) -> list[Result]:
        """The runs of all seeds at one point of the grid, as ``fl.plots.plot_runs`` takes them for one curve."""
        return [self.cell(seed=seed, **values) for seed in self.seeds]

    def best(self, name: str, by: str = "last", below: bool | None = None, level: float = 0.95) -> Best:
        """The point of the grid that is best in a metric's mean over the seeds.

        Points whose value isn't finite (some seed diverged) are left out.

        Args:
          name: of the metric.
          by: which number of a run counts: the ``"last"`` point's, the ``"best"`` one, or the ``"mean"`` of all.
          below: whether lower is better; by default so for losses, errors and perplexities.
          level: of the confidence band.

        Raises:
          ValueError: an unknown metric or ``by``; no point with a finite value.
        """
        lower = lower_is_better(name) if below is None else below
        score, low, high = self.scores(name, by, lower, level)
        if not np.isfinite(score).any():
            raise ValueError(f"{name} is not finite at any point of the grid: every run diverged, or nobody took part")
        place = np.nanargmin(np.where(np.isfinite(score), score if lower else -score, np.nan))
        at = lambda ends: None if ends is None else float(ends.flat[place])
        return Best(self.cells.points()[place], float(score.flat[place]), at(low), at(high))

    def scores(
        self, name: str, by: str = "last", below: bool | None = None, level: float = 0.95
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """One number for each point of the grid: its mean over the seeds and the band's ends, ``float64[*grids]``.

        Each run is reduced first, as :meth:`best` says, then the seeds. The ends are ``None`` with one seed.
        """
        if by not in REDUCTIONS:
            raise ValueError(f"by must be one of {REDUCTIONS}{checks.nearest(str(by), REDUCTIONS)}; got {by!r}")
        values = self._metric(name)
        if values.ndim != len(self.grids) + 2:
            raise ValueError(f"{name} has several numbers a round, shape {values.shape[len(self.grids) + 2 :]}")
        lower = lower_is_better(name) if below is None else below
        if by == "last":
            values = values[..., -1:]
        elif by == "best":
            values = (np.min if lower else np.max)(values, axis=-1, keepdims=True)
        else:
            values = values.mean(-1, keepdims=True)
        one = self._replace(metrics={name: values})
        if len(self.seeds) < 2:
            return one.mean(name)[..., 0], None, None
        low, high = one.band(name, level)
        return one.mean(name)[..., 0], low[..., 0], high[..., 0]

    def plot(self, name: str, x: str = "round", *, level: float = 0.95, **values: Number):
        """Mean and confidence band of a metric; see :func:`fedjax_lab.sweep_plots.plot_sweep`."""
        from fedjax_lab.sweep_plots import plot_sweep

        return plot_sweep(self, name, x, level=level, **values)

    def _metric(self, name: str) -> np.ndarray:
        if name not in self.metrics:
            near = checks.nearest(name, self.metrics)
            raise ValueError(f"the sweep has no metric {name!r}{near or f'; there are {list(self.metrics)}'}")
        if not self.metrics[name].shape[len(self.grids) + 1]:
            raise ValueError(f"the sweep has no round, so {name!r} has no value")
        return np.asarray(self.metrics[name], np.float64)

    def _records(self, place: tuple[int, ...]) -> list[Record]:
        records: Mapping[int, Record] = {r: {"round": r} for r in range(1, self.rounds + 1)}
        if any(0 in points for points in self.points.values()):
            records = {0: {"round": 0}, **records}
        for name, values in self.metrics.items():
            for round, value in zip(self.points[name].tolist(), values[place], strict=True):
                if (number := plain(name, value)) is not None:
                    records[round][name] = number
        return list(records.values())

    def _bytes(self, ending: str) -> np.ndarray:
        own = [values.sum(-1) for name, values in self.metrics.items() if name.endswith(ending)]
        return sum(own, np.zeros(self.cells.shape, np.int64))

    def __repr__(self) -> str:
        grids = "".join(f"{name}={checks.shown(list(values), 40)}, " for name, values in self.grids.items())
        return (
            f"SweepResult({grids}{len(self.seeds)} seeds: {self.cells.count} runs of {self.rounds} rounds, "
            f"{self.seconds:.1f} s after {self.compile_seconds:.1f} s of compiling, metrics {list(self.metrics)})"
        )
