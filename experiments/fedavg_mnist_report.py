"""What the MNIST experiment shows: checks against table 1, the table itself, a picture, the report."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fedjax_lab as fl
from experiments import common

Row = Mapping[str, Any]
SOURCE = "McMahan et al. 2017, table 1 (2NN, E=1)"
# What a fair reader would accept for C = 0.1, B = 10, with another partition, initialisation and learning rate.
BANDS = {"iid/0.1/10": (35, 100), "shards/0.1/10": (180, 700)}
_MUST_AGREE = ("target",)


class Rounds(NamedTuple):
    """The rounds that a cell took with each seed's best learning rate.

    Attributes:
      each: by seed; where no learning rate reached the target, the rounds after which they were given up.
      reached: whether the target was reached with every seed; if not, ``each`` are lower bounds.
    """

    each: tuple[float, ...]
    reached: bool

    @property
    def mean(self) -> float:
        return sum(self.each) / len(self.each)

    def __str__(self) -> str:
        return f"{'' if self.reached else 'over '}{self.mean:.1f}"


def rounds_of(rows: Sequence[Row], cell: str) -> Rounds | None:
    """A cell's rounds; ``None`` if it was not run."""
    seeds: dict[int, list[Row]] = {}
    for row in rows:
        if row["cell"] == cell:
            seeds.setdefault(row["seed"], []).append(row)
    if not seeds:
        return None
    found = [[r["rounds_to_target"] for r in own if r["rounds_to_target"] is not None] for own in seeds.values()]
    given_up = [min(r["rounds"] for r in own) for own in seeds.values()]
    each = tuple(min(f) if f else g for f, g in zip(found, given_up, strict=True))
    return Rounds(each, all(found))


def all_checks(config: Any, paper: Any, rows: Sequence[Row], parameters: int) -> list[common.Check]:
    """Every check; those that these settings can't evaluate say why."""
    reason = common.other_settings(config, paper, _MUST_AGREE)
    checks = [
        common.Check("parameters of the 2NN", 199210, parameters, "exact", parameters == 199210,
                     "McMahan et al. 2017, section 3"),
    ]  # fmt: skip
    checks += [_band(rows, cell, *BANDS[cell], reason) for cell in BANDS]
    for more, fewer, why in (
        ("iid/0/10", "iid/0.1/10", "one client a round needs more rounds than 10 (C)"),
        ("iid/0.1/10", "iid/0.2/10", "10 clients a round need no fewer rounds than 20 (C)"),
        ("iid/0.1/inf", "iid/0.1/10", "the full batch needs more rounds than B=10 (B)"),
        ("shards/0.1/10", "iid/0.1/10", "unlike clients need more rounds than alike ones"),
    ):
        checks.append(_ordering(rows, more, fewer, why, reason))
    return checks


def _band(rows: Sequence[Row], cell: str, low: int, high: int, reason: str) -> common.Check:
    ours, published = rounds_of(rows, cell), _published(rows, cell)
    reason = reason or ("" if ours else f"{cell} was not run")
    met = ours is not None and ours.reached and low <= ours.mean <= high
    figures = {"mean": ours.mean if ours.reached else str(ours), "seeds": list(ours.each)} if ours else None
    return common.Check(
        name=f"{cell}: rounds to 97%", paper=published, ours=figures, tolerance=f"mean of {low} to {high}",
        ok=None if reason else met, source=SOURCE, reason=reason,
    )  # fmt: skip


def _ordering(rows: Sequence[Row], more: str, fewer: str, why: str, reason: str) -> common.Check:
    a, b = rounds_of(rows, more), rounds_of(rows, fewer)
    missing = [cell for cell, found in ((more, a), (fewer, b)) if found is None]
    reason = reason or (f"{missing[0]} was not run" if missing else "")
    # The second must have reached the target; of the first a lower bound is enough.
    met = a is not None and b is not None and b.reached and a.mean >= b.mean
    return common.Check(
        name=why, paper={cell: _published(rows, cell) for cell in (more, fewer)},
        ours={more: str(a), fewer: str(b)} if a and b else None, tolerance="ordering of the means",
        ok=None if reason else met, source=SOURCE, reason=reason,
    )  # fmt: skip


def _published(rows: Sequence[Row], cell: str) -> int | None:
    return next((r["published"] for r in rows if r["cell"] == cell), None)


def table(rows: Sequence[Row], cells: Sequence[Any]) -> common.Table:
    """The paper's table with our figures beside it; cells that were not run say so."""
    columns = ("clients", "C", "B", "paper", "ours", "each seed", "learning rates: seeds for which they were best", "s")
    lines = []
    for cell in sorted(cells, key=lambda c: (c.partition, -c.batch, c.fraction)):
        own, ours = [r for r in rows if r["cell"] == cell.name], rounds_of(rows, cell.name)
        where = (cell.partition, "1 client" if not cell.fraction else f"{cell.fraction:g}", f"{cell.batch:g}")
        paper = str(cell.published or "")
        if ours is None:
            lines.append((*where, paper, "not run", "", "", ""))
            continue
        won = [r["learning_rate"] for r in best_rows(own)]
        rates = ", ".join(f"{rate:g}: {won.count(rate)}" for rate in dict.fromkeys(r["learning_rate"] for r in own))
        each = " ".join(f"{x:.1f}" for x in ours.each)
        lines.append((*where, paper, str(ours), each, rates, f"{sum(r['seconds'] for r in own):.0f}"))
    return common.Table(columns, lines)


def best_rows(rows: Sequence[Row]) -> list[Row]:
    """The row of the best learning rate for each cell and seed."""
    best: dict[tuple[str, int], Row] = {}
    reached = lambda row: row["rounds_to_target"] if row["rounds_to_target"] is not None else math.inf
    for row in rows:
        key = (row["cell"], row["seed"])
        if key not in best or reached(row) < reached(best[key]):
            best[key] = row
    return list(best.values())


def picture(config: Any, rows: Sequence[Row], results: Mapping[str, fl.Result]):
    """Test accuracy of each cell at its best learning rate, and rounds to the target beside the paper's."""
    figure, ((left, right),) = fl.plots.new_figure(1, 2, width=5.6, height=4.0)
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    for i, cell in enumerate(cells):
        look = fl.plots.look(i)
        for j, row in enumerate(best_rows([r for r in rows if r["cell"] == cell])):
            records = [r for r in results[row["run"]].metrics if "accuracy" in r]
            rounds, accuracy = [r["round"] for r in records], [r["accuracy"] for r in records]
            left.plot(rounds, accuracy, label=None if j else cell, linewidth=1, **look)
        ours = rounds_of(rows, cell)
        assert ours is not None
        right.plot(ours.each, [i] * len(ours.each), "o" if ours.reached else ">", color=look["color"], markersize=6)
        if published := _published(rows, cell):
            right.plot(published, i, marker="|", color="black", markersize=14)
    left.axhline(config.target, color="0.4", linewidth=1, linestyle=(0, (1, 2)))
    left.set_xscale("log")
    left.set_xlim(left=1)
    left.set_ylim(bottom=max(left.get_ylim()[0], 0.7) if config.target > 0.9 else None)
    left.set_xlabel("round")
    left.set_ylabel("test accuracy")
    left.legend(title="clients/C/B", frameon=False, fontsize="small", title_fontsize="small")
    right.set_yticks(range(len(cells)), cells)
    right.set_ylim(len(cells) - 0.5, -0.5)
    right.set_xscale("log")
    right.set_xlabel(f"rounds to {config.target:.0%}, each seed's (bars: the paper's, to 97%)")
    return figure


def write(
    out: Path,
    config: Any,
    rows: Sequence[Row],
    results: Mapping[str, fl.Result],
    checks: Sequence[common.Check],
    cells: Sequence[Any],
) -> None:
    """Table, picture and ``report.md``."""
    shown = table(rows, cells)
    common.write_study(
        out,
        "FedAvg on MNIST: rounds to 97%",
        {
            "What was run": "Table 1 of McMahan et al. 2017 for the 2NN with one local epoch: 100 clients of 600 "
            "digits, dealt at random (iid) or as two shards of label-sorted digits (shards); the share C of the "
            "clients takes part in a round, B is the batch size. Counted are rounds until the test accuracy reaches "
            f"{config.target:.0%}, on the curve made monotone and interpolated, with each seed's best learning rate "
            "of those tried; a learning rate is given up once another one has been quicker. *Over* a number: not "
            "reached when the cell's limit was met there; an arrow in the picture.",
            "The table": shown.markdown(),
        },
        shown,
        checks,
        picture(config, rows, results),
        "rounds",
        left=3,
    )
