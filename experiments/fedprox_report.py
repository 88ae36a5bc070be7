"""What the FedProx experiment shows: its table, its pictures, and the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fedjax_lab as fl
from experiments import common

Row = Mapping[str, Any]


def title(data: str) -> str:
    """A data set's name as the paper writes it."""
    return "Synthetic-IID" if data == "iid" else f"Synthetic({data},{data})"


def values(rows: Sequence[Row], metric: str, data: str, stragglers: float, method: str) -> np.ndarray:
    """A metric after the last round, one value for each seed in their order."""
    wanted = (data, stragglers, method)
    return np.array([r[metric] for r in rows if (r["data"], r["stragglers"], r["method"]) == wanted])


def groups(rows: Sequence[Row]) -> list[tuple[str, float, str]]:
    """The combinations that were run: data set, stragglers, method."""
    return list(dict.fromkeys((r["data"], r["stragglers"], r["method"]) for r in rows))


def table(rows: Sequence[Row]) -> common.Table:
    """One line for each combination, over its seeds."""
    columns = (
        "data set", "stragglers", "method", "seeds", "training loss", "lowest to highest", "test accuracy",
        "dissimilarity",
    )  # fmt: skip
    lines = []
    for data, stragglers, method in sorted(groups(rows), key=lambda g: (g[0] != "iid", g[0], g[1])):
        loss, accuracy, apart = (
            values(rows, metric, data, stragglers, method)
            for metric in ("train_loss", "test_accuracy", "dissimilarity")
        )
        spread = f"{loss.min():.2f} to {loss.max():.2f}"
        numbers = (f"{loss.mean():.3f}", spread, common.percent(accuracy.mean()), f"{apart.mean():.3g}")
        lines.append((title(data), f"{stragglers:.0%}", method, str(len(loss)), *numbers))
    return common.Table(columns, lines)


def pictures(out: Path, config: Any, rows: Sequence[Row], results: Mapping[str, fl.Result]) -> None:
    """The paper's figures: training loss and test accuracy by stragglers, and loss beside dissimilarity."""
    for metric, words, file in (("global_loss", "training loss", "loss"), ("accuracy", "test accuracy", "accuracy")):
        panels = [(stragglers, metric, words, f"{stragglers:.0%} stragglers") for stragglers in config.stragglers]
        common.save(_grid(config, rows, results, panels), out / f"{file}.png")
    least = min(config.stragglers)
    metrics = (("global_loss", "training loss"), ("dissimilarity", "variance of local gradients"))
    panels = [(least, metric, words, f"{least:.0%} stragglers") for metric, words in metrics]
    common.save(_grid(config, rows, results, panels), out / "dissimilarity.png")


def _grid(config: Any, rows: Sequence[Row], results: Mapping[str, fl.Result], panels: Sequence[tuple]):
    """A column for each data set, a row for each of ``(stragglers, metric, words, note)``."""
    figure, axes = fl.plots.new_figure(len(panels), len(config.data_sets), width=3.6, height=2.7)
    for line, (stragglers, metric, words, note) in zip(axes, panels, strict=True):
        for ax, data in zip(line, config.data_sets, strict=True):
            runs: dict[str, list] = {}
            for row in rows:
                if (row["data"], row["stragglers"]) == (data, stragglers):
                    runs.setdefault(row["method"], []).append(results[row["run"]])
            fl.plots.draw_runs(ax, runs, metric)
            ax.set_ylabel(f"{words}\n{note}")
            if metric == "global_loss":
                ax.set_ylim(0, min(ax.get_ylim()[1], 4.0))
        line[-1].legend(frameon=False, fontsize="small")
    for ax, data in zip(axes[0], config.data_sets, strict=True):
        ax.set_title(title(data))
    figure.suptitle("mean over seeds, with one standard deviation to both sides", fontsize="small", color="0.4")
    return figure


def write(
    out: Path, config: Any, rows: Sequence[Row], results: Mapping[str, fl.Result], checks: Sequence[common.Check]
) -> None:
    """Table, pictures and ``report.md``."""
    shown = table(rows)
    shown.show(left=3)
    pictures(out, config, rows, results)
    common.write_report(
        out,
        "FedProx on synthetic data",
        {
            "What was run": f"Softmax regression on the synthetic data of Li et al. 2020; {config.cohort_size} of 30 "
            f"clients a round, {config.epochs} local epochs, {config.num_rounds} rounds. A straggler does 1 to "
            f"{config.epochs - 1} epochs: FedAvg leaves it out, FedProx takes what it did. Without stragglers FedAvg "
            "and FedProx with mu = 0 are the same.",
            "What came out": findings(config, rows),
            "Against the published figures": common.check_table(checks).markdown(),
            "After the last round": f"{shown.markdown()}\n\nTraining loss is over all clients' training examples. "
            "Dissimilarity is the mean over clients of the squared distance of their gradient to the global one.",
            "The pictures": "\n\n".join(f"![{p.stem}]({p.name})" for p in sorted(out.glob("*.png"))),
        },
    )


def findings(config: Any, rows: Sequence[Row]) -> str:
    """This run's figures in words."""
    prox = f"FedProx mu={config.mu:g}"
    lines = []
    for data, stragglers, method in groups(rows):
        if method != "FedAvg":
            continue
        ours = values(rows, "train_loss", data, stragglers, prox)
        theirs = values(rows, "train_loss", data, stragglers, "FedAvg")
        apart = [values(rows, "dissimilarity", data, stragglers, m).mean() for m in (prox, "FedAvg")]
        lines.append(
            f"- {title(data)}, {stragglers:.0%} stragglers: {prox} ends at a training loss of {ours.mean():.3f}, "
            f"FedAvg at {theirs.mean():.3f}; FedProx's is lower for {(ours < theirs).sum()} of {len(ours)} seeds. "
            f"The clients' gradients are {'closer together' if apart[0] < apart[1] else 'further apart'} with FedProx "
            f"({apart[0]:.3g} against {apart[1]:.3g})."
        )
    return "\n".join(lines)
