"""NIID-Bench on MNIST (Li et al. 2022): FedAvg, SCAFFOLD, FedProx and FedNova on alike and unlike clients.

Li et al., "Federated Learning on Non-IID Data Silos: An Experimental Study", ICDE 2022, table 3, with the settings of
its published code: ten clients that all take part in 50 rounds of 10 local epochs, a CNN of 44,426 parameters, SGD
of rate .01, momentum .9 and weight decay 1e-5; digits dealt at random (iid), by Dir(.5) for each label (dirichlet), or
two labels to a client (labels2). FedProx's mu is tuned. The figures are those of Flower's baseline of the paper
(baselines/niid_bench), which counts the best accuracy of a run's rounds; the first version of its table, of one seed,
is compared as well. Its three seeds and four mu are --seeds 0 1 2 --mus 0.001 0.01 0.1 1; by default it is one of each.
Even that is 6,000 passes over MNIST, many hours on a laptop's CPU: --cells runs a part.

Where the algorithms differ from the published code's: SCAFFOLD's correction goes through the momentum and its means
are weighted by examples, FedNova's weights are the clients' examples where the code takes their batches.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.fednova import fednova
from algorithms.fedprox import fedprox
from algorithms.scaffold import scaffold
from experiments import common, niid_bench_report
from experiments.niid_bench_data import PARTITIONS, load, network

ALGORITHMS = ("fedavg", "scaffold", "fedprox", "fednova")
# Best test accuracy of a run's rounds in percent, by algorithm: the mean of three seeds, and one seed's.
PUBLISHED = {
    "iid": (99.09, 99.06, 99.16, 99.05),
    "dirichlet": (98.89, 99.07, 99.02, 98.03),
    "labels2": (96.86, 96.92, 96.85, 96.65),
}
FIRST_VERSION = {
    "iid": (99.1, 99.2, 99.2, 99.0),
    "dirichlet": (98.9, 99.0, 99.0, 98.8),
    "labels2": (96.6, 96.6, 96.7, 96.5),
}


class Cell(NamedTuple):
    """A cell of the table: how digits are dealt, and an algorithm."""

    partition: str
    algorithm: str

    @property
    def name(self) -> str:
        return f"{self.partition}/{self.algorithm}"

    @property
    def published(self) -> float:
        return PUBLISHED[self.partition][ALGORITHMS.index(self.algorithm)]

    @property
    def first_version(self) -> float:
        return FIRST_VERSION[self.partition][ALGORITHMS.index(self.algorithm)]


CELLS = {cell.name: cell for cell in (Cell(p, a) for p in PARTITIONS for a in ALGORITHMS)}


@dataclasses.dataclass(frozen=True)
class Config:
    cells: tuple[str, ...] = ("all",)
    """Cells of the table: (iid, dirichlet or labels2)/(fedavg, scaffold, fedprox or fednova); or all."""
    seeds: tuple[int, ...] = (0,)
    """Of partition, initialisation and training."""
    mus: tuple[float, ...] = (0.01,)
    """FedProx's mu, of which the best counts."""
    num_rounds: int = 50
    """Rounds."""
    epochs: int = 10
    """Local epochs."""
    batch_size: int = 64
    """Examples in a gradient step."""
    learning_rate: float = 0.01
    """Of the clients' gradient steps."""
    momentum: float = 0.9
    """Of the clients' gradient steps."""
    weight_decay: float = 1e-5
    """Of the clients' gradient steps."""
    alpha: float = 0.5
    """The Dirichlet distribution's parameter."""
    examples: int = 60_000
    """Training digits used; fewer for a trial."""
    every: int = 1
    """Rounds between evaluations, of which the best counts."""
    data_dir: str | None = None
    """Folder with the MNIST files; by default FEDJAX_LAB_DATA, or fetched."""

    def __post_init__(self):
        for name in self.cells:
            if name not in CELLS and name != "all":
                raise ValueError(f"there is no cell {name!r} in the table{fl.checks.nearest(name, [*CELLS, 'all'])}")
        for name in ("cells", "seeds", "mus"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must name at least one, each once; got {getattr(self, name)}")
        for mu in self.mus:
            fl.checks.not_negative(mu, "mus")
        for name in ("learning_rate", "alpha"):
            fl.checks.positive(getattr(self, name), name)
        for name in ("num_rounds", "epochs", "batch_size", "examples", "every"):
            fl.checks.positive(getattr(self, name), name, integer=True)
        fl.checks.not_negative(self.weight_decay, "weight_decay")
        fl.checks.probability(self.momentum, "momentum")


PAPER = Config()
QUICK = Config(
    cells=("labels2/fedavg", "labels2/fednova"), num_rounds=2, epochs=1, batch_size=32, learning_rate=0.05,
    examples=1500, every=1,
)  # fmt: skip


class Attempt(NamedTuple):
    """One run: a cell, a seed, and FedProx's mu."""

    cell: Cell
    seed: int
    mu: float | None

    @property
    def name(self) -> str:
        tried = "" if self.mu is None else f" mu={self.mu:g}"
        return f"{self.cell.name}{tried} seed={self.seed}"


def main(config: Config, out: Path) -> dict[str, Any]:
    """Run the cells, and compare their accuracies with the published ones."""
    cells = list(CELLS.values()) if "all" in config.cells else [CELLS[name] for name in config.cells]
    attempts = all_attempts(config, cells)
    data = functools.lru_cache(maxsize=1)(
        lambda partition, seed: load(partition, seed, config.data_dir, config.examples, config.alpha)
    )
    data(attempts[0].cell.partition, attempts[0].seed)  # said now, before anything is written, if it can't be had
    trainings = {attempt.name: training(config, attempt, data) for attempt in attempts}
    results = common.run_all(trainings, out, lambda r: f"test accuracy {common.percent(best(r))}")
    rows = [row(attempt, results[attempt.name]) for attempt in attempts]
    parameters = fl.nbytes(jax.eval_shape(lambda key: network().init(key)[0], jax.random.key(0))) // 4
    checks = niid_bench_report.all_checks(config, PAPER, rows, list(CELLS.values()), parameters)
    niid_bench_report.write(out, config, rows, results, checks, list(CELLS.values()))
    return common.summary(rows, checks, not_run=[name for name in CELLS if CELLS[name] not in cells])


def all_attempts(config: Config, cells: Sequence[Cell]) -> list[Attempt]:
    """What to run, those with the same data one after the other."""
    every = [
        Attempt(cell, seed, mu)
        for cell in cells
        for seed in config.seeds
        for mu in (config.mus if cell.algorithm == "fedprox" else (None,))
    ]
    return sorted(every, key=lambda a: (PARTITIONS.index(a.cell.partition), config.seeds.index(a.seed)))


def algorithm(config: Config, name: str, mu: float | None) -> fl.Round:
    """One of the four, with the benchmark's local work."""
    decay = optax.add_decayed_weights(config.weight_decay)
    optimizer = optax.chain(decay, optax.sgd(config.learning_rate, config.momentum))
    work = {"epochs": config.epochs, "batch_size": config.batch_size}
    if name == "fedprox":
        return fedprox(network(), optimizer, mu=mu, **work)
    return {"fedavg": fedavg, "scaffold": scaffold, "fednova": fednova}[name](network(), optimizer, **work)


def training(config: Config, attempt: Attempt, load: Callable[[str, int], fl.Split]) -> common.Training:
    """How to train a cell with a seed."""

    def start(folder, stop):
        data = load(attempt.cell.partition, attempt.seed)
        round = algorithm(config, attempt.cell.algorithm, attempt.mu)
        process = fl.synchronous(round, data.train, mesh=common.mesh(data.train.num_clients))
        return fl.run(
            process, config.num_rounds, attempt.seed, evaluate=fl.global_metrics(data.test), every=config.every,
            out=folder, callbacks=[stop],
        )  # fmt: skip

    return start


def best(result: fl.Result) -> float:
    """The best test accuracy of the rounds that were evaluated."""
    return max(record["accuracy"] for record in result.metrics if "accuracy" in record)


def row(attempt: Attempt, result: fl.Result) -> dict[str, Any]:
    """A run's line in ``summary.json``; accuracies in percent."""
    cell = attempt.cell
    return {
        "run": attempt.name,
        "cell": cell.name,
        "partition": cell.partition,
        "algorithm": cell.algorithm,
        "seed": attempt.seed,
        "mu": attempt.mu,
        "published": cell.published,
        "accuracy": 100 * best(result),
        "last_accuracy": 100 * common.at(result, "accuracy"),
        "rounds": result.rounds,
        "uplink_bytes": result.uplink_bytes,
        "seconds": result.seconds + result.compile_seconds,
    }
