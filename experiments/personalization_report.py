"""What the personalisation study shows: its table, its picture, and the figures in words."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fedjax_lab as fl
from experiments import common
from experiments.personalization_checks import values
from experiments.personalization_data import PARTITIONS, Study

Row = Mapping[str, Any]
COLUMNS = {
    "accuracy_mean": "mean participant",
    "accuracy_worst10": "worst 10%",
    "shared_model_mean": "with the shared model",
    "newcomers_received": "newcomers, as received",
    "newcomers_personal": "personalised",
    "newcomers_joined": "after rounds of their own",
}
LOOKS = (  # metric, label, marker, color
    ("accuracy_mean", "mean participant", "o", "C0"),
    ("accuracy_worst10", "worst 10% of them", "|", "C0"),
    ("newcomers_received", "newcomer, as received", "x", "C3"),
    ("newcomers_joined", "newcomer, after own rounds", "s", "C2"),
    ("newcomers_personal", "newcomer, personalised", "^", "C1"),
)


def ran(rows: Sequence[Row], data: str) -> list[str]:
    """The methods that were run on a partition, in their order."""
    return list(dict.fromkeys(r["method"] for r in rows if r["data"] == data))


def table(rows: Sequence[Row], data: str) -> common.Table:
    """One line for each method, means over seeds, with one standard deviation for the first."""

    def cell(method: str, metric: str) -> str:
        found = values(rows, data, method, metric)
        if not len(found):
            return "-"
        spread = f" ± {100 * found.std():.1f}" if metric == "accuracy_mean" and len(found) > 1 else ""
        return common.percent(found.mean()) + spread

    lines = [
        (method, *(cell(method, m) for m in COLUMNS), common.size(values(rows, data, method, "uplink_bytes").mean()))
        for method in ran(rows, data)
    ]
    return common.Table(("method", *COLUMNS.values(), "sent up"), lines)


def picture(rows: Sequence[Row], data_sets: Sequence[str]):
    """For each partition, the participants' and the newcomers' accuracy by method."""
    most = max(len(ran(rows, d)) for d in data_sets)
    figure, axes = fl.plots.new_figure(1, len(data_sets), width=4.8, height=1.8 + 0.27 * most)
    for ax, data in zip(axes[0], data_sets, strict=True):
        names = ran(rows, data)
        for metric, label, marker, color in LOOKS:
            found = [(i, values(rows, data, m, metric)) for i, m in enumerate(names)]
            found = [(i, v) for i, v in found if len(v)]
            if found:
                at, each = zip(*found, strict=True)
                means, spread = [v.mean() for v in each], [v.std() for v in each]
                ax.errorbar(means, at, xerr=spread, fmt=marker, color=color, label=label, markersize=5, lw=1)
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.grid(axis="y", alpha=0.3)
        ax.set_xlabel("accuracy on a client's own test examples")
        ax.set_title(data)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize="small", loc="outside lower center", ncols=2)
    return figure


def write(
    out: Path, config: Any, studies: Mapping[str, Study], rows: Sequence[Row], checks: Sequence[common.Check]
) -> None:
    """Tables, picture and ``report.md``."""
    parts = []
    for data, study in studies.items():
        shown = table(rows, data)
        shown.show(title=data)
        about = (PARTITIONS[data].__doc__ or "").strip()
        sizes = np.asarray(study.train.sizes)
        who = (
            f"{study.train.num_clients} participants with {sizes.min()} to {sizes.max()} training examples, "
            f"{study.support.num_clients} newcomers."
        )
        parts.append(f"### {data}\n\n{about} {who}\n\n{shown.markdown()}\n\n{findings(rows, data)}")
    common.save(picture(rows, list(studies)), out / "comparison.png")
    sections = {
        "The question": "One model for everybody serves a client badly whose data are unlike the others'. What does a "
        "model of its own gain it, and what is left of that for a client that was not there during training?",
        "What was run": _settings(config),
        "What came out": "\n\n".join(parts),
        "How to read the tables": EXPLANATION,
        "The picture": "![comparison](comparison.png)\n\nMeans over the seeds, with one standard deviation.",
    }
    if checks:
        sections["Against the papers' claims"] = common.check_table(checks).markdown()
    common.write_report(out, "Personalisation: a model of one's own", sections)


def findings(rows: Sequence[Row], data: str) -> str:
    """This partition's figures in words."""
    lines = []
    for metric, who in (("accuracy_mean", "the mean participant"), ("accuracy_worst10", "the worst tenth")):
        mean = {m: values(rows, data, m, metric).mean() for m in ran(rows, data)}
        best = max(mean, key=lambda m: mean[m])
        base = f", FedAvg's one model {common.percent(mean['FedAvg'])}" if "FedAvg" in mean else ""
        lines.append(f"- Best for {who}: {best} with {common.percent(mean[best])}{base}.")
    late = {}
    for m in ran(rows, data):
        for metric in ("newcomers_received", "newcomers_personal", "newcomers_joined"):
            found = values(rows, data, m, metric)
            if len(found):
                late[m, COLUMNS[metric]] = found.mean()
    (method, when), accuracy = max(late.items(), key=lambda item: item[1])
    when = when.removeprefix("newcomers, ")
    lines.append(f"- Best for the mean newcomer: {method}, {when}, with {common.percent(accuracy)}.")
    return "\n".join(lines)


def _settings(config: Any) -> str:
    seeds = "one seed" if len(config.seeds) == 1 else f"{len(config.seeds)} seeds"
    return (
        f"A network with one hidden layer of {config.hidden} units (MOCHA: a linear model), {config.num_rounds} rounds "
        f"of {config.cohort_size} participants, {config.epochs} local epochs in batches of {config.batch_size}, a "
        f"learning rate of {config.learning_rate:g} for all methods; {seeds}. "
        f"{config.newcomers:.0%} of the clients come when training is over, and then have {config.joining} "
        "rounds of their own. No method was tuned, but for VIRTUAL's prior: a scale of 0.5 at full weight left it at "
        "19.5% on the digits by labels, so it has 0.1 at a tenth of the weight (a colder posterior)."
    )


EXPLANATION = """Accuracy is on clients' own test examples, each client counted alike; *worst 10%* is the mean of the
tenth of the participants that fare worst. A participant uses what the method gives it, which for FedAvg is the one
shared model; *with the shared model* is how that does where there is one. A newcomer has training examples of its own,
but was in no round. *As received*: with the shared model. *Personalised*: with what the method makes of that on the
newcomer's examples at first contact (fine-tuned, adapted, reconstructed, with neighbours looked up; for methods that
train personal models during the rounds, where these begin). *After rounds of their own*: the newcomers have gone
through the method's local part that often, with everything that is shared held as it is. *Sent up* is by all
participants in all rounds."""
