"""What a byte buys: accuracy against bytes and against rounds, over local epochs, compressors and their ratios.

FedAvg on three problems: logistic regression (convex) and a network of 64 hidden units (not convex) on handwritten
digits spread unevenly over 50 clients, and a network of 32 hidden units on FedProx's Synthetic(1,1), whose 30 clients
have unlike models. Ten clients a round. Every combination of epochs and link is run with the same seeds, one sweep
for each link and problem, and none is left out afterwards: what looks good at one number of epochs may not at another.

- accuracy is that of the server's model on all clients' test examples, the mean over seeds;
- bytes are those that clients send, with indices, scales and headers; what they are sent is the whole model in every
  combination (--both adds it to the bytes);
- a point of the frontier is a combination after some round that no other reaches with as few bytes, or rounds.

The report has the frontier drawn and tabled, the bytes and rounds that each combination needs to come near the best
accuracy without compression, and what each link costs in accuracy after the last round. top10 and top1 send a tenth and
a hundredth of the entries, with error feedback; qsgd4 and qsgd2 so many bits an entry; eden1 one bit behind a random
rotation; top10_qsgd4 both. Takes a few minutes; an interrupted run begins anew.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from experiments import common, communication_frontier_report
from fedjax_lab import wire

LINKS: dict[str, Callable[[], wire.Wire]] = {
    "none": wire.identity,
    "qsgd8": lambda: wire.qsgd(8),
    "qsgd4": lambda: wire.qsgd(4),
    "qsgd2": lambda: wire.qsgd(2),
    "eden4": lambda: wire.eden(4),
    "eden1": lambda: wire.eden(1),
    "sign": lambda: wire.error_feedback(wire.sign()),
    "top10": lambda: wire.error_feedback(wire.top_k(0.1)),
    "top1": lambda: wire.error_feedback(wire.top_k(0.01)),
    "top10_qsgd4": lambda: wire.chain(wire.error_feedback(wire.top_k(0.1)), wire.qsgd(4)),
}


class Problem(NamedTuple):
    """Data, a model and a learning rate that suits both without compression; and whether it is convex."""

    load: Callable[[], fl.Split]
    model: Callable[[], fl.Model]
    learning_rate: float
    convex: bool


def digits() -> fl.Split:
    """The digits of scikit-learn at 50 clients, by Dir(.3) for each label."""
    return fl.datasets.digits(fl.datasets.dirichlet(50, 0.3), 0)


def synthetic() -> fl.Split:
    """FedProx's Synthetic(1,1), of which each of 30 clients keeps 60 examples at most, to be quick."""
    split = fl.datasets.synthetic(1.0, 1.0, 30, seed=0)
    return fl.Split(*(_at_most(part, 60) for part in split))


def _at_most(data: fl.FederatedData, most: int) -> fl.FederatedData:
    return fl.FederatedData.from_clients(
        {k: jax.tree.map(lambda a: np.asarray(a)[:most], data.client(k).arrays) for k in data.ids}
    )


PROBLEMS = {
    "digits_linear": Problem(digits, lambda: fl.models.logistic_regression(10), 0.3, True),
    "digits_mlp": Problem(digits, lambda: fl.models.mlp(10, hidden=(64,)), 0.1, False),
    "synthetic_mlp": Problem(synthetic, lambda: fl.models.mlp(10, hidden=(32,)), 0.03, False),
}


@dataclasses.dataclass(frozen=True)
class Config:
    problems: tuple[str, ...] = tuple(PROBLEMS)
    """Which: digits_linear, digits_mlp, synthetic_mlp."""
    links: tuple[str, ...] = ("none", "qsgd4", "qsgd2", "eden1", "top10", "top1", "top10_qsgd4")
    """Which: none, qsgd8, qsgd4, qsgd2, eden4, eden1, sign, top10, top1, top10_qsgd4."""
    epochs: tuple[int, ...] = (1, 4, 16)
    """Local epochs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initialisation, sampling and compression; the data stay."""
    num_rounds: int = 60
    """Rounds."""
    cohort_size: int = 10
    """Clients in a round."""
    batch_size: int = 10
    """Examples in a gradient step."""
    every: int = 5
    """Rounds between evaluations, the frontier's points."""
    near: tuple[float, ...] = (0.9, 0.97, 0.99)
    """Shares of the best accuracy without compression, to which bytes and rounds are counted."""
    both: bool = False
    """Count what clients are sent, too."""

    def __post_init__(self):
        for name, known in (("problems", PROBLEMS), ("links", LINKS)):
            for value in getattr(self, name):
                if value not in known:
                    near = fl.checks.nearest(value, known) or f"; there are {', '.join(known)}"
                    raise ValueError(f"{name}: there is no {value!r}{near}")
        for name in ("problems", "links", "epochs", "seeds", "near"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must name at least one, each once; got {getattr(self, name)}")
        if "none" not in self.links:
            raise ValueError('links must have "none" among them, with which the others are compared')
        for value in self.epochs:
            fl.checks.positive(value, "epochs", integer=True)
        for value in self.near:
            fl.checks.probability(value, "near")
        for name in ("num_rounds", "cohort_size", "batch_size", "every"):
            fl.checks.positive(getattr(self, name), name, integer=True)


QUICK = Config(problems=("digits_linear",), links=("none", "top10"), epochs=(1, 2), seeds=(0, 1), num_rounds=4, every=2)


class Cell(NamedTuple):
    """One run."""

    problem: str
    link: str
    epochs: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.problem} {self.link} E={self.epochs} seed={self.seed}"


def main(config: Config, out: Path) -> dict[str, Any]:
    """Sweep all combinations, find the frontier of each problem, and write the report."""
    cells = [
        Cell(problem, link, epochs, seed)
        for problem in config.problems
        for link in config.links
        for epochs in config.epochs
        for seed in config.seeds
    ]
    swept = functools.lru_cache(maxsize=1)(functools.partial(sweep, config))
    data = functools.lru_cache(maxsize=1)(lambda problem: PROBLEMS[problem].load())

    def training(cell: Cell) -> common.Training:
        def start(folder, stop):
            found = swept(cell.problem, cell.link, data)
            return found.cell(seed=cell.seed, **({} if len(config.epochs) == 1 else {"epochs": cell.epochs}))

        return start

    describe = lambda result: f"test accuracy {common.percent(common.at(result, 'accuracy'))}"
    results = common.run_all({cell.name: training(cell) for cell in cells}, out, describe)
    rows = [row(cell, results[cell.name]) for cell in cells]
    found = communication_frontier_report.write(out, config, rows, results, PROBLEMS)
    return common.summary(rows, **found)


def sweep(config: Config, problem: str, link: str, data: Callable[[str], fl.Split]) -> fl.SweepResult:
    """All epochs and seeds of a link on a problem, in one program."""
    chosen, split = PROBLEMS[problem], data(problem)

    def make_process(epochs: Any = config.epochs[0]) -> fl.Process:
        base = fedavg(chosen.model(), optax.sgd(chosen.learning_rate), epochs=epochs, batch_size=config.batch_size)
        algorithm = fl.compose(base, fl.uplink(LINKS[link]()))
        return fl.synchronous(algorithm, split.train, fl.uniform(config.cohort_size))

    grid: dict[str, Any] = {} if len(config.epochs) == 1 else {"epochs": config.epochs}
    return fl.sweep(
        make_process, config.num_rounds, config.seeds, evaluate=fl.global_metrics(split.test), every=config.every,
        progress=False, **grid,
    )  # fmt: skip


def row(cell: Cell, result: fl.Result) -> dict[str, Any]:
    """A run's line in ``summary.json``."""
    return {
        "run": cell.name,
        **cell._asdict(),
        "rounds": result.rounds,
        "accuracy": common.at(result, "accuracy"),
        "uplink_bytes": result.uplink_bytes,
        "downlink_bytes": result.downlink_bytes,
        "seconds": result.seconds + result.compile_seconds,
    }
