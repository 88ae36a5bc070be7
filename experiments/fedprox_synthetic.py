"""FedProx on synthetic data (Li et al. 2020): less divergence on unlike clients, and stragglers put to use.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, section 5 and figures 1 and 2. Thirty
clients with power-law sizes, softmax regression from zero, 10 clients a round, 20 local epochs of SGD. Where
clients straggle, FedAvg leaves them out and FedProx takes the 1 to 19 epochs that they managed. In the paper's code
a fixed number of each round's clients straggles; here each one does with the given probability. (Seed 3 is left out
by default: it draws a client of 37,867 examples, which would take most of the time.)
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.fedprox import fedprox
from experiments import common, fedprox_report
from experiments.fedprox_checks import all_checks
from experiments.fedprox_data import Measure, load

DataSet = Literal["iid", "0", "0.5", "1"]


@dataclasses.dataclass(frozen=True)
class Config:
    data_sets: tuple[DataSet, ...] = ("iid", "0", "0.5", "1")
    """Which data sets: iid, or alpha = beta, how much the clients' models and inputs differ."""
    mu: float = 1.0
    """FedProx's mu, beside 0."""
    stragglers: tuple[float, ...] = (0.0, 0.5, 0.9)
    """Probabilities that a client straggles in a round."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of data and training; with more than half of the clients straggling, those of many_seeds."""
    many_seeds: tuple[int, ...] = (0, 1, 2, 4, 5)
    """Seeds where most clients straggle, which is noisier."""
    more_seeds: tuple[int, ...] = (4, 5, 6, 7, 8, 9, 10, 11, 12)
    """Further seeds without stragglers: enough to tell whether the published ranges are of draws like ours."""
    num_rounds: int = 200
    """Rounds."""
    cohort_size: int = 10
    """Clients in a round, of 30."""
    epochs: int = 20
    """Local epochs of a client that doesn't straggle."""
    batch_size: int = 10
    """Examples in a gradient step."""
    learning_rate: float = 0.01
    """Of the clients' gradient steps."""
    every: int = 10
    """Rounds between evaluations."""

    def __post_init__(self):
        fl.checks.positive(self.learning_rate, "learning_rate")
        fl.checks.not_negative(self.mu, "mu")
        for name in ("data_sets", "stragglers", "seeds", "many_seeds"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must name at least one, each once; got {getattr(self, name)}")
        if len(set(self.more_seeds)) < len(self.more_seeds):
            raise ValueError(f"more_seeds must name each seed once; got {self.more_seeds}")


PAPER = Config()
QUICK = Config(data_sets=("iid", "1"), stragglers=(0.5,), seeds=(7,), more_seeds=(), num_rounds=4, epochs=2, every=2)


class Cell(NamedTuple):
    """One run: a data set, a method, how many clients straggle, a seed."""

    data: str
    stragglers: float
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data} stragglers={self.stragglers:g} {self.method} seed={self.seed}"


def main(config: Config, out: Path) -> dict[str, Any]:
    """Run every cell, draw the paper's figures, and compare with its figures."""
    cells = all_cells(config)
    data = load(sorted({(c.data, c.seed) for c in cells}))
    measure = Measure(fl.models.logistic_regression(10))
    template = next(iter(data.values())).train
    processes = {key: build(config, *key, template) for key in {(c.method, c.stragglers): None for c in cells}}
    trainings = {c.name: training(config, c, processes[c.method, c.stragglers], data, measure) for c in cells}
    results = common.run_all(trainings, out, describe, common.default_workers())
    rows = [row(cell, results[cell.name]) for cell in cells]
    checks = all_checks(config, PAPER, rows, results)
    fedprox_report.write(out, config, rows, results, checks)
    return common.summary(rows, checks)


def methods(config: Config, stragglers: float) -> list[str]:
    """Without stragglers FedAvg and FedProx with mu = 0 are the same."""
    partial = ["FedProx mu=0"] if stragglers else []
    return ["FedAvg", f"FedProx mu={config.mu:g}", *partial]


def all_cells(config: Config) -> list[Cell]:
    """What to run, the runs of one program one after the other."""
    return [
        Cell(data, stragglers, method, seed)
        for stragglers in config.stragglers
        for method in methods(config, stragglers)
        for data in config.data_sets
        for seed in seeds_of(config, stragglers)
    ]


def seeds_of(config: Config, stragglers: float) -> tuple[int, ...]:
    """The seeds that are run with so many stragglers."""
    if stragglers > 0.5:
        return config.many_seeds
    return config.seeds if stragglers else tuple(dict.fromkeys((*config.seeds, *config.more_seeds)))


def build(config: Config, method: str, stragglers: float, data: fl.FederatedData) -> fl.Process:
    """A method's process on any of the data sets, which all have the same shapes."""
    model, optimizer = fl.models.logistic_regression(10), optax.sgd(config.learning_rate)
    work: dict[str, Any] = {"batch_size": config.batch_size}
    sampler = fl.uniform(config.cohort_size)
    if method == "FedAvg":
        algorithm = fedavg(model, optimizer, epochs=config.epochs, **work)
        sampler = fl.drop_stragglers(sampler, stragglers) if stragglers else sampler
    else:
        epochs = fl.partial_work(config.epochs, stragglers) if stragglers else config.epochs
        algorithm = fedprox(model, optimizer, mu=0.0 if method.endswith("=0") else config.mu, epochs=epochs, **work)
    return fl.synchronous(algorithm, data, sampler)


def training(config: Config, cell: Cell, process: fl.Process, data: Any, measure: Measure) -> common.Training:
    """How to train one cell, with its own data and seed in a process that all seeds share."""
    split = data[cell.data, cell.seed]

    def start(folder, stop):
        own = process._replace(data=split.train.on_device())
        evaluate = measure.on(split.test.on_device())
        return fl.run(
            own, config.num_rounds, cell.seed, evaluate=evaluate, every=config.every, out=folder,
            callbacks=[stop], progress=False,
        )  # fmt: skip

    return start


def describe(result: fl.Result) -> str:
    """Where a run ended, in words."""
    return f"training loss {common.at(result, 'global_loss'):.3f}, test accuracy {common.at(result, 'accuracy'):.3f}"


def row(cell: Cell, result: fl.Result) -> dict[str, Any]:
    """A run's line in ``summary.json``, after its last round."""
    return {
        "run": cell.name,
        **cell._asdict(),
        "rounds": result.rounds,
        "train_loss": common.at(result, "global_loss", result.rounds),
        "test_accuracy": common.at(result, "accuracy", result.rounds),
        "dissimilarity": common.at(result, "dissimilarity", result.rounds),
        "uplink_bytes": result.uplink_bytes,
        "downlink_bytes": result.downlink_bytes,
        "seconds": result.seconds + result.compile_seconds,
    }
