"""FedProx's MNIST (Li et al. 2020): 1,000 clients of two digits and power-law sizes, logistic regression, stragglers.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, appendix C: digits standardised
pixel by pixel, 10 clients a round, batches of 10, learning rate 0.03. Run is what FedML's documentation reports, FedAvg
with one local epoch for 200 rounds; and FedProx's comparison with 90% stragglers, 20 local epochs, 100 rounds. In the
paper's code a fixed number of each round's clients straggles; here each one does with the given probability. FedML's
model squashes its scores by a sigmoid before the softmax; this one doesn't.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.fedprox import fedprox
from experiments import common, pfedme_data

FEDML = "FedML's documentation, MNIST with logistic regression; range of an independent implementation"
STRAGGLERS = "Li et al. 2020, setting of figure 1 on MNIST; an independent implementation"
CLAIM = "Li et al. 2020, section 5.2 and figure 1"
# (epochs, method) -> lowest and highest test accuracy of others' runs
RANGES = {"FedAvg": (0.79, 0.79), "FedProx mu=0": (0.81, 0.85), "FedProx mu=1": (0.88, 0.89)}
SLACK = 0.02


@dataclasses.dataclass(frozen=True)
class Config:
    parts: tuple[str, ...] = ("plain", "stragglers")
    """plain: FedAvg with one local epoch; stragglers: three methods where most clients straggle."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the division of the digits and of training."""
    num_clients: int = 1000
    """Among whom the digits are divided."""
    plain_rounds: int = 200
    """Rounds of FedAvg with one local epoch."""
    straggling_rounds: int = 100
    """Rounds where clients straggle."""
    epochs: int = 20
    """Local epochs where clients straggle, of one that doesn't."""
    stragglers: float = 0.9
    """Probability that a client straggles in a round."""
    mu: float = 1.0
    """FedProx's mu, beside 0."""
    cohort_size: int = 10
    """Clients in a round."""
    batch_size: int = 10
    """Examples in a gradient step."""
    learning_rate: float = 0.03
    """Of the clients' gradient steps."""
    every: int = 10
    """Rounds between evaluations."""
    data_dir: str | None = None
    """Folder with the MNIST files; by default FEDJAX_LAB_DATA, or fetched."""

    def __post_init__(self):
        for name in self.parts:
            if name not in ("plain", "stragglers"):
                raise ValueError(f"there is no part {name!r}{fl.checks.nearest(name, ('plain', 'stragglers'))}")
        for name in ("parts", "seeds"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must name at least one, each once; got {getattr(self, name)}")
        fl.checks.not_negative(self.mu, "mu")
        fl.checks.probability(self.stragglers, "stragglers")
        fl.checks.positive(self.learning_rate, "learning_rate")


PAPER = Config()
QUICK = Config(seeds=(0,), plain_rounds=4, straggling_rounds=2, epochs=2, every=2)


class Cell(NamedTuple):
    """One run: a part of the experiment, a method, a seed."""

    part: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.part} {self.method} seed={self.seed}"


def main(config: Config, out: Path) -> dict[str, Any]:
    """Run every cell, and compare with the published figures."""
    methods = {"plain": ["FedAvg"], "stragglers": ["FedAvg", "FedProx mu=0", f"FedProx mu={config.mu:g}"]}
    cells = [Cell(part, method, seed) for seed in config.seeds for part in config.parts for method in methods[part]]
    data = functools.lru_cache(maxsize=1)(lambda seed: load(config, seed))
    data(config.seeds[0])  # said now, before anything is written, if it can't be had
    trainings = {cell.name: training(config, cell, data) for cell in cells}
    results = common.run_all(trainings, out, describe)
    rows = [row(cell, results[cell.name]) for cell in cells]
    checks = all_checks(config, rows)
    write(out, config, rows, results, checks)
    return common.summary(rows, checks)


def load(config: Config, seed: int) -> fl.Split:
    """The clients' training digits, and all clients' test digits in one piece."""
    deal = fl.datasets.power_law(config.num_clients)
    split = fl.datasets.mnist(deal, seed, config.data_dir, test_fraction=0.1)
    flat = [np.asarray(part.arrays["x"]).reshape(part.num_examples, -1) * np.float32(255) for part in split]
    whole = pfedme_data.standardised(np.concatenate(flat))
    x, y = whole[: len(flat[0])], split.train.arrays["y"]
    train = dataclasses.replace(split.train, arrays={"x": x, "y": y})
    test = {"x": whole[len(flat[0]) :], "y": np.asarray(split.test.arrays["y"])}
    return fl.Split(train, fl.FederatedData.from_clients({"test": test}))


def build(config: Config, cell: Cell, data: fl.FederatedData) -> fl.Process:
    """A cell's process."""
    model, optimizer = fl.models.logistic_regression(10), optax.sgd(config.learning_rate)
    sampler = fl.uniform(config.cohort_size)
    if cell.part == "plain":
        return fl.synchronous(fedavg(model, optimizer, epochs=1, batch_size=config.batch_size), data, sampler)
    if cell.method == "FedAvg":
        algorithm = fedavg(model, optimizer, epochs=config.epochs, batch_size=config.batch_size)
        return fl.synchronous(algorithm, data, fl.drop_stragglers(sampler, config.stragglers))
    epochs = fl.partial_work(config.epochs, config.stragglers)
    mu = 0.0 if cell.method.endswith("=0") else config.mu
    return fl.synchronous(fedprox(model, optimizer, mu=mu, epochs=epochs, batch_size=config.batch_size), data, sampler)


def training(config: Config, cell: Cell, load: Any) -> common.Training:
    """How to train one cell."""

    def start(folder, stop):
        data = load(cell.seed)
        rounds = config.plain_rounds if cell.part == "plain" else config.straggling_rounds
        return fl.run(
            build(config, cell, data.train), rounds, cell.seed, evaluate=fl.global_metrics(data.test),
            every=config.every, out=folder, callbacks=[stop], progress=False,
        )  # fmt: skip

    return start


def describe(result: fl.Result) -> str:
    """Where a run ended, in words."""
    return f"test accuracy {common.percent(common.at(result, 'accuracy'))}"


def row(cell: Cell, result: fl.Result) -> dict[str, Any]:
    """A run's line in ``summary.json``, after its last round."""
    return {
        "run": cell.name,
        **cell._asdict(),
        "rounds": result.rounds,
        "test_accuracy": common.at(result, "accuracy", result.rounds),
        "survivors": float(np.mean([r["survivors"] for r in result.metrics[1:]])),
        "uplink_bytes": result.uplink_bytes,
        "seconds": result.seconds + result.compile_seconds,
    }


# ---- what came out ----


def accuracy(rows: Sequence[Mapping[str, Any]], part: str, method: str) -> list[float]:
    """After the last round, by seed."""
    return [r["test_accuracy"] for r in rows if (r["part"], r["method"]) == (part, method)]


def all_checks(config: Config, rows: Sequence[Mapping[str, Any]]) -> list[common.Check]:
    """Every check; those that these settings can't evaluate say why."""
    may = ("parts", "seeds", "every", "data_dir")
    reason = common.other_settings(config, PAPER, (n for n in vars(PAPER) if n not in may))

    def check(name, paper, ours, tolerance, met, source, seeds, enough):
        few = "" if seeds >= enough else f"it needs {enough} seeds"
        why = reason or few
        return common.Check(name, paper, ours, tolerance, None if why else bool(met), source, why)

    plain = accuracy(rows, "plain", "FedAvg")
    figures = {"mean": float(np.mean(plain)), "seeds": plain} if plain else None
    met = plain and 0.80 <= np.mean(plain) <= 0.91
    checks = [
        check("FedAvg, one epoch: test accuracy after 200 rounds", 0.819, figures, "mean of 0.80 to 0.91", met,
              FEDML, len(plain), 3),
    ]  # fmt: skip
    straggling = {method: accuracy(rows, "stragglers", method) for method in RANGES}
    seeds = min(map(len, straggling.values()))
    for method, (low, high) in RANGES.items():
        own = straggling[method]
        figures = {"mean": float(np.mean(own)), "seeds": own} if own else None
        paper = f"{low:.2f} to {high:.2f}" if low < high else low
        met = own and low - SLACK <= np.mean(own) <= high + SLACK
        checks.append(
            check(f"{method}, 90% stragglers: test accuracy after 100 rounds", paper, figures,
                  f"mean within {SLACK} of it", met, STRAGGLERS, len(own), 5)
        )  # fmt: skip
    means = {method: float(np.mean(own)) for method, own in straggling.items() if own}
    ordered = list(means.values()) == sorted(means.values()) and len(means) == len(RANGES)
    checks.append(
        check("90% stragglers: what helps", "FedAvg below FedProx mu=0 below FedProx mu=1", means or None,
              "ordering of the means", ordered, CLAIM, seeds, 5)
    )  # fmt: skip
    return checks


def table(rows: Sequence[Mapping[str, Any]]) -> common.Table:
    """One line for each method, over its seeds."""
    lines = []
    for part, method in dict.fromkeys((r["part"], r["method"]) for r in rows):
        own = [r for r in rows if (r["part"], r["method"]) == (part, method)]
        found = accuracy(rows, part, method)
        survivors = f"{np.mean([r['survivors'] for r in own]):.1f}"
        each = " ".join(f"{x:.3f}" for x in found)
        lines.append((part, method, str(own[0]["rounds"]), survivors, common.percent(float(np.mean(found))), each))
    return common.Table(("part", "method", "rounds", "clients a round", "test accuracy", "each seed"), lines)


def picture(config: Config, rows: Sequence[Mapping[str, Any]], results: Mapping[str, fl.Result]):
    """Test accuracy by round."""
    figure, axes = fl.plots.new_figure(1, len(config.parts), width=4.6, height=3.4)
    for ax, part in zip(axes[0], config.parts, strict=True):
        runs: dict[str, list] = {}
        for own in rows:
            if own["part"] == part:
                runs.setdefault(own["method"], []).append(results[own["run"]])
        fl.plots.draw_runs(ax, runs, "accuracy")
        ax.set_ylabel("test accuracy")
        ax.set_title("one epoch" if part == "plain" else f"{config.stragglers:.0%} stragglers")
        ax.legend(frameon=False, fontsize="small")
    return figure


def write(
    out: Path,
    config: Config,
    rows: Sequence[Mapping[str, Any]],
    results: Mapping[str, fl.Result],
    checks: Sequence[common.Check],
) -> None:
    """Table, picture and ``report.md``."""
    shown = table(rows)
    common.write_study(
        out,
        "FedProx's MNIST",
        {
            "What was run": f"Softmax regression on MNIST divided among {config.num_clients} clients of two digits; "
            f"{config.cohort_size} clients a round. One epoch: FedAvg, {config.plain_rounds} rounds. Stragglers: a "
            f"client straggles with probability {config.stragglers:g} and does 1 to {config.epochs - 1} of "
            f"{config.epochs} epochs; FedAvg leaves it out, FedProx takes what it did; {config.straggling_rounds} "
            "rounds.",
            "Test accuracy": shown.markdown(),
        },
        shown,
        checks,
        picture(config, rows, results),
        left=2,
    )
