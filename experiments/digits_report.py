"""What the digits experiment shows: its picture, its table, and the figures put into words."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fedjax_lab as fl
from experiments import common

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> common.Table:
    """One line for each method."""
    columns = (
        "method", "accuracy, mean client", "worst 10% of clients", "on everybody's digits",
        "sent up", "sent down", "seconds",
    )  # fmt: skip
    cells = [
        (
            row["run"],
            common.percent(row["accuracy_mean"]),
            common.percent(row["accuracy_worst10"]),
            common.percent(row["accuracy_everybody"]),
            common.size(row["uplink_bytes"]),
            common.size(row["downlink_bytes"]),
            f"{row['seconds']:.1f}",
        )
        for row in rows
    ]
    return common.Table(columns, cells)


def picture(outcomes: Mapping[str, Any], data: fl.Split, local: str):
    """Accuracy against rounds, accuracies of single clients, and who has what."""
    figure, axes = fl.plots.new_figure(1, 3, width=5.2, height=4.0)
    left, middle, right = axes[0]
    shared = {name: o.result for name, o in outcomes.items() if name != local}
    fl.plots.draw_runs(left, shared, "accuracy_mean")
    looks = {name: fl.plots.look(i) for i, name in enumerate([*shared, local])}
    left.axhline(np.nanmean(outcomes[local].own), label=f"{local}, at its end", **looks[local])
    left.set_ylabel("accuracy on a client's own digits, mean")
    left.legend(frameon=False, loc="lower right")
    left.set_title("The mean client, round by round")
    for name, outcome in outcomes.items():
        own = np.sort(outcome.own[np.isfinite(outcome.own)])
        middle.plot(np.arange(1, len(own) + 1), own, drawstyle="steps-mid", label=name, **looks[name])
    middle.set_xlabel("clients, from the worst served to the best")
    middle.set_ylabel("accuracy on the client's own digits")
    middle.legend(frameon=False, loc="lower right")
    middle.set_title("Every client, at the end")
    _who_has_what(right, data.train)
    return figure


def _who_has_what(ax: Any, train: fl.FederatedData) -> None:
    labels, counts = fl.datasets.label_counts(train)
    counts = counts[np.argsort(-counts.sum(1), kind="stable")]
    bottom = np.zeros(len(counts))
    for j, label in enumerate(labels):
        ax.bar(np.arange(len(counts)), counts[:, j], 1.0, bottom, color=f"C{j}", label=str(label))
        bottom += counts[:, j]
    ax.set_xlabel("clients, from most digits to fewest")
    ax.set_ylabel("digits to train on")
    ax.legend(title="digit", frameon=False, ncols=2, fontsize="small")
    ax.set_title("Who has what")


def write(out: Path, config: Any, data: fl.Split, rows: Mapping[str, Row], chance: float) -> None:
    """The report for a newcomer.

    Args:
      out: the folder.
      config: the settings.
      data: what was trained and tested on.
      rows: the methods' figures, under ``fedavg``, ``fedprox`` and ``local``.
      chance: how far apart FedAvg and local training may be for the mean client by chance.
    """
    common.write_report(
        out,
        "Learning to read digits together, without sharing them",
        {
            "The question": question(data),
            "What was tried": methods(config, rows["local"]["rounds"]),
            "What happened": findings(rows["fedavg"], rows["fedprox"], rows["local"], data, chance),
            "The figures": f"{table(list(rows.values())).markdown()}\n\n{EXPLANATION}",
            "The picture": "![comparison](comparison.png)",
            "To do it again": "`config.json` holds the settings, `metrics.jsonl` every round's figures and "
            "`summary.json` those of the table. `python -m experiments run digits --help` lists what can be "
            "changed; a larger `--alpha` makes the clients more alike.",
        },
    )


EXPLANATION = """Accuracy is the share of test digits that are read correctly; test digits were kept out of training.
*Mean client* averages over clients, each tested on its own digits. *Worst 10%* is the mean of the tenth of the
clients that are served worst. *Everybody's digits* are the test digits of all clients; for local training it is the
mean over the clients' models. Seconds include compiling. Where a difference is put down to chance, it is smaller
than two standard errors."""


def question(data: fl.Split) -> str:
    """How the digits are spread."""
    _, counts = fl.datasets.label_counts(data.train)
    sizes, kinds = counts.sum(1), (counts > 0).sum(1)
    return (
        f"{len(sizes)} clients (think of phones, or of schools) hold {sizes.sum()} small pictures of handwritten "
        f"digits between them: the smallest client {sizes.min()}, the largest {sizes.max()}, {sizes.mean():.0f} on "
        f"average. They are spread unevenly, too: a client has {kinds.mean():.1f} of the "
        f"{counts.shape[1]} kinds of digits on average, and {(kinds <= 3).sum()} clients have three kinds or fewer. "
        "Each wants a model that reads digits. None wants to hand its pictures over."
    )


def methods(config: Any, local_rounds: int) -> str:
    """What each method does, with this run's settings."""
    sparse = "" if config.top_k is None else (
        f" Of a change only the largest {common.percent(config.top_k)} of its entries are sent, with their places; a "
        "client remembers the others and adds them to its next change (top-k with error feedback)."
    )  # fmt: skip
    return (
        f"- **FedAvg.** In each of {config.num_rounds} rounds, {config.cohort_size} clients drawn at random get the "
        f"shared model, train it on their own digits ({_times(config.epochs)} over), and send back how it changed. "
        f"The server averages the changes. Pictures never leave a client; models do.{sparse}\n"
        "- **FedProx.** The same, but a client that trains is also pulled back towards the shared model (with strength "
        f"mu = {config.mu:g}), so that clients with unusual digits drag it less far from the others.\n"
        f"- **Local training.** Each client trains a model of its own and talks to nobody. It makes "
        f"{local_rounds * config.epochs} passes over its digits, as a client of FedAvg does on average."
    )


def findings(fedavg: Row, fedprox: Row, local: Row, data: fl.Split, chance: float) -> str:
    """What this run's figures say; every sentence is made from them."""
    tests = data.test.num_examples
    return "\n".join(
        f"- {sentence}"
        for sentence in (
            _own_digits(fedavg, local, chance),
            _everybody(fedavg, local, tests),
            _worst(fedavg, local),
            _prox(fedavg, fedprox, tests),
            _cost(fedavg, local, data),
        )
    )


def _own_digits(fedavg: Row, local: Row, chance: float) -> str:
    a, b = fedavg["accuracy_mean"], local["accuracy_mean"]
    text = (
        f"Tested on its own kinds of digits, the mean client reads {common.percent(a)} of them with the model that "
        f"FedAvg trained, and {common.percent(b)} with the one it trained alone: "
    )
    if abs(a - b) <= chance:
        return text + "a difference that chance alone could make with so few test digits."
    if a > b:
        return text + f"training together gained {100 * (a - b):.1f} points."
    return text + (
        f"alone it did better, by {100 * (b - a):.1f} points. A client with few kinds of digits has an easier "
        "task than the shared model, which must tell all ten apart."
    )


def _everybody(fedavg: Row, local: Row, tests: int) -> str:
    a, b = fedavg["accuracy_everybody"], local["accuracy_everybody"]
    text = (
        f"On everybody's digits the shared model reads {common.percent(a)}, a model trained alone "
        f"{common.percent(b)} on average"
    )
    if a - b > noise(a, b, tests):
        return text + ": what a client has never seen it can't learn alone, and here the others had it."
    return text + ": with this spread of digits, training together taught little that clients couldn't learn alone."


def _worst(fedavg: Row, local: Row) -> str:
    a, b = fedavg["accuracy_worst10"], local["accuracy_worst10"]
    who = "FedAvg" if a > b else "local training" if b > a else "neither"
    return (
        f"For the tenth of the clients that fare worst the figures are {common.percent(a)} with FedAvg and "
        f"{common.percent(b)} alone; {who} serves them better. A mean hides this, which is why it is in the table."
    )


def _prox(fedavg: Row, fedprox: Row, tests: int) -> str:
    a, b = fedavg["accuracy_everybody"], fedprox["accuracy_everybody"]
    text = f"FedProx ends at {common.percent(b)} on everybody's digits, FedAvg at {common.percent(a)}: "
    if abs(a - b) <= noise(a, b, tests):
        return text + f"no difference that {tests} test digits could show."
    return text + f"the pull {'helped' if b > a else 'held it back'} by {100 * abs(b - a):.1f} points here."


def _cost(fedavg: Row, local: Row, data: fl.Split) -> str:
    sent = fedavg["uplink_bytes"] + fedavg["downlink_bytes"]
    pictures = sum(a.nbytes for a in data.train.arrays.values())
    times = sent / pictures
    return (
        f"FedAvg moved {common.size(sent)} of models ({common.size(fedavg['uplink_bytes'])} up, the rest down), "
        f"{f'{times:.0f} times' if times >= 2 else f'{times:.1f} times'} the size of all the training pictures "
        f"({common.size(pictures)}); local training moved {common.size(local['uplink_bytes'])}. What federated "
        "training buys is that pictures stay where they are, and not that little is sent (--top-k 0.01 makes it less "
        "than a fiftieth of a model on the way up)."
    )


def noise(a: float, b: float, tests: int) -> float:
    """Two standard errors of the difference of two accuracies on ``tests`` examples, taken as independent."""
    return 2 * ((a * (1 - a) + b * (1 - b)) / tests) ** 0.5


def chance_of_mean(differences: np.ndarray) -> float:
    """Two standard errors of the mean difference over clients, NaN left out."""
    found = differences[np.isfinite(differences)]
    return float(2 * found.std(ddof=1) / len(found) ** 0.5) if len(found) > 1 else float("inf")


def _times(n: int) -> str:
    return {1: "once", 2: "twice"}.get(n, f"{n} times")
