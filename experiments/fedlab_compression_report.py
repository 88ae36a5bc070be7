"""What FedLab's compression benchmark shows: checks against its table, the table itself, a picture, the report."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fedjax_lab as fl
from experiments import common

Row = Mapping[str, Any]
SOURCE = "FedLab's repository, README, Communication Efficiency"
PARAMETERS = 199_210  # 157,000 + 40,200 + 2,010
TOLERANCE = 1.5  # points of accuracy
SHARE = 0.05  # of the published share of the baseline's bytes
_MUST_AGREE = ("num_rounds", "cohort_size", "steps", "learning_rate", "alpha", "examples")
_ORDER = ("top5", "top10", "top20", "none")


def values(rows: Sequence[Row], what: str, setting: str, name: str) -> list[float]:
    """A figure of every seed. Without compression it doesn't matter what is compressed."""
    return [r[name] for r in rows if r["setting"] == setting and (r["what"] == what or setting == "none")]


def all_checks(
    config: Any, paper: Any, rows: Sequence[Row], settings: Mapping[str, Any], parameters: int
) -> list[common.Check]:
    """Every check; those that these settings can't evaluate say why."""
    reason = common.other_settings(config, paper, _MUST_AGREE)
    checks = [
        common.Check("parameters of the network", PARAMETERS, parameters, "exact", parameters == PARAMETERS,
                     "FedLab's repository, fedlab/models/mlp.py"),
    ]  # fmt: skip
    checks += [_near(rows, n, s.accuracy, reason) for n, s in settings.items() if not s.ordering]
    checks += [_between(rows, less, more, settings, reason) for less, more in itertools.pairwise(_ORDER)]
    return checks + [_share(rows, n, settings) for n, s in settings.items() if not s.ordering and n != "none"]


def _near(rows: Sequence[Row], setting: str, published: float, reason: str) -> common.Check:
    ours = values(rows, "models", setting, "accuracy")
    reason = reason or ("" if ours else f"{setting} was not run")
    return common.Check(
        name=f"{setting}: test accuracy, percent", paper=published,
        ours={"mean": statistics.fmean(ours), "seeds": ours} if ours else None, tolerance=f"+-{TOLERANCE:g}, the mean",
        ok=None if reason else abs(statistics.fmean(ours) - published) <= TOLERANCE, source=SOURCE, reason=reason,
    )  # fmt: skip


def _between(rows: Sequence[Row], less: str, more: str, settings: Mapping[str, Any], reason: str) -> common.Check:
    a, b = (values(rows, "models", name, "accuracy") for name in (less, more))
    missing = [name for name, found in ((less, a), (more, b)) if not found]
    reason = reason or (f"{missing[0]} was not run" if missing else "")
    ours = {less: statistics.fmean(a), more: statistics.fmean(b)} if a and b else None
    return common.Check(
        name=f"{less} of the models is less accurate than {more}",
        paper={less: settings[less].accuracy, more: settings[more].accuracy}, ours=ours,
        tolerance=f"ordering of the means over {len(a) or 5} seeds",
        ok=None if reason or not ours else ours[less] < ours[more], source=SOURCE, reason=reason,
    )  # fmt: skip


def _share(rows: Sequence[Row], setting: str, settings: Mapping[str, Any]) -> common.Check:
    """Bytes don't depend on how training goes: any settings can be compared."""
    published = settings[setting].megabytes / settings["none"].megabytes
    found = [values(rows, "models", name, "uplink_bytes") for name in (setting, "none")]
    ours = statistics.fmean(found[0]) / statistics.fmean(found[1]) if all(found) else None
    return common.Check(
        name=f"{setting}: share of the bytes without compression", paper=round(published, 4), ours=ours,
        tolerance=f"{SHARE:.0%}", ok=None if ours is None else abs(ours / published - 1) <= SHARE, source=SOURCE,
        reason="" if ours is not None else "it needs that setting and none",
    )  # fmt: skip


def table(rows: Sequence[Row], settings: Mapping[str, Any]) -> common.Table:
    """FedLab's table with our figures beside it."""
    lines = []
    for what, name in dict.fromkeys((r["what"], r["setting"]) for r in rows):
        ours = values(rows, what, name, "accuracy")
        published = [f"{settings[name].accuracy:.2f}", f"{settings[name].megabytes:.2f}"]
        spread = f"{min(ours):.2f} to {max(ours):.2f}" if len(ours) > 1 else ""
        sent = statistics.fmean(values(rows, what, name, "uplink_bytes"))
        lines.append((
            "" if name == "none" else what, name, str(len(ours)), *(published if what == "models" else ["", ""]),
            f"{statistics.fmean(ours):.2f}", spread, f"{sent / 1e6:.2f}",
            f"{statistics.fmean(values(rows, what, name, 'seconds')):.0f}",
        ))  # fmt: skip
    columns = ("compressed", "by", "seeds", "FedLab %", "FedLab MB", "ours %", "lowest to highest", "MB up", "s a run")
    return common.Table(columns, lines)


def picture(rows: Sequence[Row], results: Mapping[str, fl.Result], settings: Mapping[str, Any]):
    """Test accuracy by round, a panel for what is compressed; mean and spread over seeds."""
    whats = list(dict.fromkeys(row["what"] for row in rows))
    figure, (panels,) = fl.plots.new_figure(1, len(whats), width=4.6, height=3.6)
    for panel, what in zip(panels, whats, strict=True):
        runs: dict[str, list[fl.Result]] = {}
        for row in rows:
            if row["what"] == what or row["setting"] == "none":
                runs.setdefault(row["setting"], []).append(results[row["run"]])
        fl.plots.draw_runs(panel, {name: runs[name] for name in settings if name in runs}, "accuracy")
        panel.set_title(f"{what} compressed")
        panel.legend(frameon=False, fontsize="small")
    return figure


def write(
    out: Path,
    config: Any,
    rows: Sequence[Row],
    results: Mapping[str, fl.Result],
    checks: Sequence[common.Check],
    settings: Mapping[str, Any],
) -> None:
    """Table, picture and ``report.md``."""
    shown = table(rows, settings)
    common.write_study(
        out,
        "FedLab's compression benchmark on MNIST",
        {
            "What was run": f"{config.examples:,} digits at 100 clients by Dir({config.alpha:g}), {config.cohort_size} "
            f"of them a round, {config.num_rounds} rounds of {config.steps} steps on all of a client's digits at rate "
            f"{config.learning_rate:g}. *Models*: what is compressed are the trained weights themselves, as in "
            "FedLab; *updates*: how they changed, without error feedback.",
            "The table": f"{shown.markdown()}\n\nMB up are all uploads of a run, with indices, scales and headers. "
            "FedLab's megabytes can't be these: its baseline's 302.45 MiB are 398 models, where "
            "200 rounds of 10 clients are 2,000 uploads; shares of the baseline can be compared for QSGD.",
        },
        shown,
        checks,
        picture(rows, results, settings),
        left=2,
    )
