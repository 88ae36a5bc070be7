"""What the experiment with rotated MNIST shows: checks against IFCA's table 1, the table, a picture, the report."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fedjax_lab as fl
from experiments import common

Row = Mapping[str, Any]
SOURCE = "Ghosh et al. 2020, table 1"
TOLERANCE = 1.0  # in percentage points
_MUST_AGREE = ("num_rounds", "local_rounds", "steps", "learning_rate", "hidden", "train_digits", "test_digits")


def accuracies(rows: Sequence[Row], setting: str, method: str) -> list[float]:
    """A method's accuracy with each seed."""
    return [r["accuracy"] for r in rows if (r["setting"], r["method"]) == (setting, method)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def all_checks(
    config: Any, paper: Any, rows: Sequence[Row], published: Mapping[str, Mapping[str, float]]
) -> list[common.Check]:
    """Every figure of the table and the ordering in each column; those that were not evaluated say why."""
    reason = common.other_settings(config, paper, _MUST_AGREE)
    checks = []
    for setting, figures in published.items():
        for method, figure in figures.items():
            checks.append(_figure(rows, setting, method, figure, reason))
        checks.append(_ordering(rows, setting, figures, reason))
    return checks


def _figure(rows: Sequence[Row], setting: str, method: str, figure: float, reason: str) -> common.Check:
    ours = accuracies(rows, setting, method)
    reason = reason or ("" if ours else f"{method} was not run at {setting}")
    return common.Check(
        name=f"{setting}: test accuracy of {method}, percent",
        paper=figure,
        ours={"mean": mean(ours), "seeds": ours} if ours else None,
        tolerance=f"{TOLERANCE:g} point{_sample(rows, setting, method)}",
        ok=None if reason else abs(mean(ours) - figure) <= TOLERANCE,
        source=SOURCE,
        reason=reason,
    )


def _sample(rows: Sequence[Row], setting: str, method: str) -> str:
    """What of the clients was run, where that isn't all of them."""
    own = next((r for r in rows if (r["setting"], r["method"]) == (setting, method)), None)
    if own is None or own["clients_a_round"] == own["clients"]:
        return ""
    kind = "of the clients alone" if method == "local" else "clients a round"
    return f", with {own['clients_a_round']} of {own['clients']} {kind}"


def _ordering(rows: Sequence[Row], setting: str, figures: Mapping[str, float], reason: str) -> common.Check:
    ours = {method: accuracies(rows, setting, method) for method in figures}
    reason = reason or ("" if all(ours.values()) else f"not all methods were run at {setting}")
    means = [mean(values) for values in ours.values() if values]
    return common.Check(
        name=f"{setting}: IFCA before one model for all, before local models",
        paper=dict(figures),
        ours={method: mean(values) for method, values in ours.items() if values} or None,
        tolerance="ordering of the means",
        ok=None if reason else all(a > b for a, b in itertools.pairwise(means)),
        source=SOURCE,
        reason=reason,
    )


def table(rows: Sequence[Row]) -> common.Table:
    """The runs with the paper's figures beside them."""
    columns = ("clients/digits", "method", "seed", "clients a round", "paper", "accuracy", "up", "down", "s")
    lines = []
    for r in rows:
        who = (r["setting"], r["method"], str(r["seed"]), f"{r['clients_a_round']} of {r['clients']}")
        figures = (f"{r['published']:.2f}", f"{r['accuracy']:.2f}")
        spent = (common.size(r["uplink_bytes"]), common.size(r["downlink_bytes"]), f"{r['seconds']:.0f}")
        lines.append((*who, *figures, *spent))
    return common.Table(columns, lines)


def chosen(rows: Sequence[Row]) -> str:
    """Which models each rotation's test clients choose, in words."""
    lines = []
    for r in rows:
        if r["choices"]:
            turned = ", ".join(f"{90 * k} degrees {counts}" for k, counts in enumerate(r["choices"]))
            lines.append(f"- {r['run']}: test clients by the model that they choose: {turned}")
    return "\n".join(lines)


def picture(rows: Sequence[Row], results: Mapping[str, fl.Result]):
    """Test accuracy over the rounds, the published figures as dotted lines."""
    settings = list(dict.fromkeys(r["setting"] for r in rows))
    figure, (axes,) = fl.plots.new_figure(1, len(settings), width=4.6, height=3.6)
    for axis, setting in zip(axes, settings, strict=True):
        methods = list(dict.fromkeys(r["method"] for r in rows if r["setting"] == setting))
        for r in (r for r in rows if r["setting"] == setting):
            look, first = fl.plots.look(methods.index(r["method"])), r["seed"] == rows[0]["seed"]
            records = [x for x in results[r["run"]].metrics if "accuracy" in x]
            curve = [x["round"] for x in records], [100 * x["accuracy"] for x in records]
            axis.plot(*curve, label=r["method"] if first else None, linewidth=1, **look)
            axis.axhline(r["published"], color=look["color"], linewidth=1, linestyle=(0, (1, 2)))
        axis.set_title(f"{setting.replace('/', ' clients of ')} digits", fontsize="small")
        axis.set_xlabel("round")
        axis.set_ylabel("test accuracy, percent")
        axis.legend(frameon=False, fontsize="small")
    return figure


def write(
    out: Path,
    config: Any,
    rows: Sequence[Row],
    results: Mapping[str, fl.Result],
    checks: Sequence[common.Check],
) -> None:
    """Table, picture and ``report.md``."""
    shown = table(rows)
    common.write_study(
        out,
        "IFCA on rotated MNIST",
        {
            "What was run": "Table 1 of Ghosh et al. 2020 for MNIST: the digits turned by 0, 90, 180 and 270 degrees, "
            "each rotation's dealt to a quarter of the clients. IFCA with four models, one model for all (FedAvg), and "
            f"a model for each client alone; {config.steps} full-batch steps of rate {config.learning_rate:g} a round, "
            f"{config.num_rounds} rounds, {config.local_rounds} of models alone. Accuracies are of the last round. "
            "As in the authors' code, test digits are divided among test clients of as many digits, which choose a "
            "model by its loss on these same digits, "
            "labels included; and local models are tested on all test digits of their rotation. Deviation from the "
            f"paper: {100 * config.participation:g}% of the clients take part in a round, drawn anew each time "
            f"({100 * config.early_participation:g}% in IFCA's first {config.early_rounds}, while its models part), "
            f"and {config.local_clients} train alone; the paper has everyone.",
            "The table": shown.markdown(),
            "Who chose what": chosen(rows) or "Nothing was chosen.",
        },
        shown,
        checks,
        picture(rows, results),
        left=2,
    )
