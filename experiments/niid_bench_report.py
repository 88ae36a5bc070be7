"""What the NIID-Bench experiment shows: checks against the published tables, our table, a picture, the report."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fedjax_lab as fl
from experiments import common
from experiments.niid_bench_data import PARAMETERS

Row = Mapping[str, Any]
SOURCE = "Flower's baseline of Li et al. 2022, table 3 (MNIST): best round, mean of three seeds"
FIRST = "the same baseline's first table: best round, one seed"
TOLERANCE = 0.5
# Other settings of these compute something else than the table's cells; seeds and mus only fewer of them.
_MUST_AGREE = (
    "num_rounds", "epochs", "batch_size", "learning_rate", "momentum", "weight_decay", "alpha", "examples", "every",
)  # fmt: skip


class Accuracy(NamedTuple):
    """A cell's best test accuracy in percent with its best mu: of ``each`` seed, and that ``mu``."""

    each: tuple[float, ...]
    mu: float | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.each)

    def __str__(self) -> str:
        spread = f" ± {statistics.stdev(self.each):.2f}" if len(self.each) > 1 else ""
        return f"{self.mean:.2f}{spread}"


def accuracy_of(rows: Sequence[Row], cell: str) -> Accuracy | None:
    """A cell's accuracy; ``None`` if it was not run."""
    tried: dict[float | None, list[float]] = {}
    for row in rows:
        if row["cell"] == cell:
            tried.setdefault(row["mu"], []).append(row["accuracy"])
    found = [Accuracy(tuple(each), mu) for mu, each in tried.items()]
    return max(found, key=lambda a: a.mean) if found else None


def all_checks(
    config: Any, paper: Any, rows: Sequence[Row], cells: Sequence[Any], parameters: int
) -> list[common.Check]:
    """Every check; those that these settings can't evaluate say why."""
    reason = common.other_settings(config, paper, _MUST_AGREE)
    checks = [
        common.Check("parameters of the CNN", PARAMETERS, parameters, "exact", parameters == PARAMETERS,
                     "Li et al. 2022, section 5 (two 5x5 convolutions of 6 and 16 channels, layers of 120 and 84)"),
    ]  # fmt: skip
    checks += [_near(rows, cell, cell.published, SOURCE, reason) for cell in cells]
    checks += [_near(rows, cell, cell.first_version, FIRST, reason, ", first version") for cell in cells]
    checks += [_ordering(rows, name, reason) for name in dict.fromkeys(cell.algorithm for cell in cells)]
    return checks


def _near(
    rows: Sequence[Row], cell: Any, published: float, source: str, reason: str, version: str = ""
) -> common.Check:
    ours = accuracy_of(rows, cell.name)
    reason = reason or ("" if ours else f"{cell.name} was not run")
    return common.Check(
        name=f"{cell.name}: test accuracy, percent{version}", paper=published,
        ours={"mean": ours.mean, "seeds": list(ours.each)} if ours else None, tolerance=f"+-{TOLERANCE:g}",
        ok=None if reason or ours is None else abs(ours.mean - published) <= TOLERANCE, source=source,
        reason=reason,
    )  # fmt: skip


def _ordering(rows: Sequence[Row], algorithm: str, reason: str) -> common.Check:
    names = (f"labels2/{algorithm}", f"iid/{algorithm}")
    less, more = (accuracy_of(rows, name) for name in names)
    missing = [name for name, found in zip(names, (less, more), strict=True) if found is None]
    reason = reason or (f"{missing[0]} was not run" if missing else "")
    known = less is not None and more is not None
    return common.Check(
        name=f"{algorithm}: two labels to a client do worse than alike clients",
        paper="lower", ours={names[0]: str(less), names[1]: str(more)} if known else None,
        tolerance="ordering of the means", ok=None if reason or not known else less.mean < more.mean, source=SOURCE,
        reason=reason,
    )  # fmt: skip


def table(rows: Sequence[Row], cells: Sequence[Any]) -> common.Table:
    """The paper's table with our figures beside it; cells that were not run say so."""
    lines = []
    for cell in cells:
        ours, own = accuracy_of(rows, cell.name), [r for r in rows if r["cell"] == cell.name]
        where = (cell.partition, cell.algorithm, f"{cell.published:.2f}")
        if ours is None:
            lines.append((*where, "not run", "", ""))
            continue
        mu = "" if ours.mu is None else f"{ours.mu:g}"
        lines.append((*where, str(ours), mu, f"{sum(r['seconds'] for r in own):.0f}"))
    return common.Table(("clients", "algorithm", "paper", "ours", "mu", "s"), lines)


def picture(rows: Sequence[Row], results: Mapping[str, fl.Result]):
    """Test accuracy by round, a panel for each partition."""
    partitions = list(dict.fromkeys(row["partition"] for row in rows))
    algorithms = list(dict.fromkeys(row["algorithm"] for row in rows))
    figure, (panels,) = fl.plots.new_figure(1, len(partitions), width=4.2, height=3.6)
    for panel, partition in zip(panels, partitions, strict=True):
        for row in (r for r in rows if r["partition"] == partition):
            best = accuracy_of(rows, row["cell"])
            if best is None or row["mu"] != best.mu:
                continue
            records = [r for r in results[row["run"]].metrics if "accuracy" in r]
            rounds, accuracy = [r["round"] for r in records], [100 * r["accuracy"] for r in records]
            look = fl.plots.look(algorithms.index(row["algorithm"]))
            panel.plot(
                rounds, accuracy, linewidth=1, label=row["algorithm"] if row is _first(rows, row) else None, **look
            )
        panel.set_title(partition)
        panel.set_xlabel("round")
        panel.set_ylabel("test accuracy, percent")
        panel.legend(frameon=False, fontsize="small")
    return figure


def _first(rows: Sequence[Row], row: Row) -> Row:
    """The first row that is drawn like this one."""
    return next(r for r in rows if r["cell"] == row["cell"] and r["mu"] == row["mu"])


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
        "NIID-Bench on MNIST",
        {
            "What was run": f"Table 3 of Li et al. 2022 for MNIST: 10 clients, {config.num_rounds} rounds of "
            f"{config.epochs} local epochs with batches of {config.batch_size}, {config.examples:,} training digits, "
            f"seeds {', '.join(map(str, config.seeds))}. Best test accuracy of a run's rounds in percent, mean over "
            "seeds; FedProx with the best of the mu tried "
            f"({', '.join(f'{mu:g}' for mu in config.mus)}).",
            "The table": shown.markdown(),
        },
        shown,
        checks,
        picture(rows, results),
        left=2,
    )
