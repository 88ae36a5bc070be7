"""What the MNIST experiment shows: checks against table 1, the table itself, a picture, the report."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fedjax_lab as fl
from experiments import common

Row = Mapping[str, Any]
SOURCE = "McMahan et al. 2017, table 1 (2NN, E=1)"
# What a fair reader would accept for C = 0.1, B = 10, with another partition, initialisation and learning rate.
BANDS = {"iid/0.1/10": (35, 100), "shards/0.1/10": (180, 700)}
_MUST_AGREE = ("target",)


def fewest(rows: Sequence[Row], cell: str) -> float | None:
    """The rounds that the best learning rate took; ``None`` if none reached the target or none was run."""
    return min((r["rounds_to_target"] for r in rows if r["cell"] == cell and r["rounds_to_target"]), default=None)


def at_least(rows: Sequence[Row], cell: str) -> float | None:
    """A lower bound of the same: where none reached the target, the rounds after which the first was given up."""
    found = fewest(rows, cell)
    return min((r["rounds"] for r in rows if r["cell"] == cell), default=None) if found is None else found


def all_checks(config: Any, paper: Any, rows: Sequence[Row], parameters: int) -> list[common.Check]:
    """Every check; those that these settings can't evaluate say why."""
    other = [n for n in _MUST_AGREE if getattr(config, n) != getattr(paper, n)]
    reason = "".join(f"{n} is {getattr(config, n):g} instead of {getattr(paper, n):g}" for n in other[:1])
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
    published = next((r["published"] for r in rows if r["cell"] == cell), None)
    ours = fewest(rows, cell)
    reason = reason or ("" if published else f"{cell} was not run")
    return common.Check(
        name=f"{cell}: rounds to 97%", paper=published, ours=ours, tolerance=f"{low} to {high}",
        ok=None if reason else ours is not None and low <= ours <= high, source=SOURCE, reason=reason,
    )  # fmt: skip


def _ordering(rows: Sequence[Row], more: str, fewer: str, why: str, reason: str) -> common.Check:
    published = {cell: r["published"] for cell in (more, fewer) for r in rows if r["cell"] == cell}
    missing = [cell for cell in (more, fewer) if cell not in published]
    reason = reason or (f"{missing[0]} was not run" if missing else "")
    # The second must have reached the target; of the first a lower bound is enough.
    a, b = at_least(rows, more), fewest(rows, fewer)
    unreached = fewest(rows, more) is None
    ours = {more: f"over {a}" if unreached else a, fewer: b}
    return common.Check(
        name=why, paper=published, ours=ours, tolerance="ordering",
        ok=None if reason else a is not None and b is not None and a >= b, source=SOURCE, reason=reason,
    )  # fmt: skip


def table(rows: Sequence[Row], cells: Sequence[Any]) -> common.Table:
    """The paper's table with our figures beside it; cells that were not run say so."""
    columns = ("clients", "C", "B", "paper", "ours", "learning rate", "others tried", "seconds")
    lines = []
    for cell in sorted(cells, key=lambda c: (c.partition, -c.batch, c.fraction)):
        own = [r for r in rows if r["cell"] == cell.name]
        where = (cell.partition, "1 client" if not cell.fraction else f"{cell.fraction:g}", f"{cell.batch:g}")
        paper = str(cell.published or "")
        if not own:
            lines.append((*where, paper, "not run", "", "", ""))
            continue
        best = min(own, key=lambda r: r["rounds_to_target"] or math.inf)
        others = ", ".join(f"{r['learning_rate']:g}: {_rounds(r)}" for r in own if r is not best)
        seconds = f"{sum(r['seconds'] for r in own):.0f}"
        lines.append((*where, paper, _rounds(best), f"{best['learning_rate']:g}", others, seconds))
    return common.Table(columns, lines)


def _rounds(row: Row) -> str:
    reached = row["rounds_to_target"]
    return f"over {row['rounds']}" if reached is None else f"{reached:.1f}"


def picture(config: Any, rows: Sequence[Row], results: Mapping[str, fl.Result]):
    """Test accuracy of each cell's best learning rate, and rounds to the target beside the paper's."""
    figure, ((left, right),) = fl.plots.new_figure(1, 2, width=5.6, height=4.0)
    best = {}
    for row in rows:
        kept = best.setdefault(row["cell"], row)
        if (row["rounds_to_target"] or math.inf) < (kept["rounds_to_target"] or math.inf):
            best[row["cell"]] = row
    for i, (cell, row) in enumerate(best.items()):
        records = [r for r in results[row["run"]].metrics if "accuracy" in r]
        rounds, accuracy = [r["round"] for r in records], [r["accuracy"] for r in records]
        left.plot(rounds, accuracy, label=f"{cell}, lr {row['learning_rate']:g}", linewidth=1, **fl.plots.look(i))
    left.axhline(config.target, color="0.4", linewidth=1, linestyle=(0, (1, 2)))
    left.set_xscale("log")
    left.set_xlim(left=1)
    left.set_ylim(bottom=max(left.get_ylim()[0], 0.7) if config.target > 0.9 else None)
    left.set_xlabel("round")
    left.set_ylabel("test accuracy")
    left.legend(title="clients/C/B", frameon=False, fontsize="small", title_fontsize="small")
    for i, row in enumerate(best.values()):
        reached, colour = row["rounds_to_target"], fl.plots.look(i)["color"]
        right.plot(reached or row["rounds"], i, marker="o" if reached else ">", color=colour, markersize=7)
        if row["published"]:
            right.plot(row["published"], i, marker="|", color="black", markersize=14)
    right.set_yticks(range(len(best)), list(best))
    right.set_ylim(len(best) - 0.5, -0.5)
    right.set_xscale("log")
    right.set_xlabel(f"rounds to {config.target:.0%}: dot: ours; arrow: ours, not by then; bar: the paper's, to 97%")
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
    shown.show(left=3)
    common.save(picture(config, rows, results), out / "rounds.png")
    common.write_report(
        out,
        "FedAvg on MNIST: rounds to 97%",
        {
            "What was run": "Table 1 of McMahan et al. 2017 for the 2NN with one local epoch: 100 clients of 600 "
            "digits, dealt at random (iid) or as two shards of label-sorted digits (shards); the share C of the "
            "clients takes part in a round, B is the batch size. Counted are rounds until the test accuracy reaches "
            f"{config.target:.0%}, on the curve made monotone and interpolated. The learning rate is the best of "
            "those tried. *Over* a number: not reached when the run was ended there, because its cell's limit was met "
            "or another learning rate had been quicker.",
            "The table": shown.markdown(),
            "Against the published figures": common.check_table(checks).markdown(),
            "The picture": "![rounds](rounds.png)",
        },
    )
