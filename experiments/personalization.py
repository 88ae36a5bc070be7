"""Personalisation: what single clients gain by methods that give each a model of its own.

Local training, FedAvg, FedAvg with fine-tuning, and the methods that personalise, on partitions of generated and of
real data. Reported for every method: the accuracy of the participants on their own test examples (the mean client
and the worst tenth), and what clients get that come when training is over: with the model as it is sent to them,
personalised on their own examples at first contact, and after some rounds of their own that leave the server as it
is. All over several seeds of training on one partition.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fedjax_lab as fl
from experiments import common, personalization_report
from experiments.personalization_checks import all_checks
from experiments.personalization_data import Study, load, signed
from experiments.personalization_methods import LOCAL, MOCHA, methods

Data = Literal["synthetic", "clusters", "digits", "rotated", "mnist", "mnist_rotated", "ratings"]
Method = Literal[
    "local", "FedAvg", "fine-tuned", "Ditto", "pFedMe", "APFL", "FedPer", "FedRep", "LG-FedAvg", "FedRecon",
    "Per-FedAvg", "kNN-Per", "pFedHN", "coupled", "IFCA", "FedEM", "VIRTUAL", "MOCHA",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    data_sets: tuple[Data, ...] = ("digits",)
    """Partitions: generated, by linear rules of every client's own (synthetic) or of three clusters; digits by labels
    or rotated by client, MNIST likewise; lecture ratings by student. Of several, those whose files are missing are
    left out."""
    methods: tuple[Method, ...] = ()
    """Which methods; all by default. MOCHA runs where there are two classes (clusters, ratings)."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of initialisation and training, on the same partition."""
    num_clients: int = 50
    """Clients in all; those with fewer than four training examples are left out."""
    newcomers: float = 0.2
    """Share of the clients that come when training is over."""
    alpha: float = 0.1
    """Of the Dirichlet distribution over labels: the smaller, the fewer kinds of examples each client has."""
    cohort_size: int = 10
    """Participants in a round."""
    num_rounds: int = 40
    """Rounds. In local training, where everybody trains in every round, as many as a participant has on average."""
    epochs: int = 3
    """Passes over its own examples that a client makes in a round."""
    batch_size: int = 10
    """Examples in a gradient step."""
    learning_rate: float = 0.1
    """Of the clients' gradient steps, and of Per-FedAvg's adaptation."""
    hidden: int = 32
    """Units of the model's hidden layer."""
    joining: int = 5
    """Rounds of the newcomers' own, after which they are evaluated again."""
    ditto_lam: float = 0.3
    """Pull of personal models to the global one, in Ditto and in mean-regularised multi-task learning (coupled)."""
    pfedme_lam: float = 15.0
    """pFedMe's lambda."""
    clusters: int = 3
    """Models of IFCA, components of FedEM."""
    most_examples: int = 60
    """Training examples of a client, at most, where data sets are large (MNIST, synthetic)."""
    every: int = 20
    """Rounds between evaluations."""
    data_seed: int = 0
    """Of the partition, and of who comes later."""
    data_dir: str | None = None
    """Folder with mnist/ and insteval/; by default FEDJAX_LAB_DATA."""

    def __post_init__(self):
        for name in ("learning_rate", "pfedme_lam", "newcomers"):
            fl.checks.positive(getattr(self, name), name)
        if self.newcomers >= 1:
            raise ValueError(f"newcomers must be a share below 1; got {self.newcomers}")
        for name in ("num_clients", "cohort_size", "num_rounds", "epochs", "hidden", "joining", "clusters", "every"):
            fl.checks.positive(getattr(self, name), name, integer=True)
        for name in ("data_sets", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        for name in ("data_sets", "seeds", "methods"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must name each once; got {getattr(self, name)}")


PAPER = Config(data_sets=("synthetic", "clusters", "digits", "rotated", "mnist", "mnist_rotated", "ratings"))
QUICK = Config(
    methods=("FedAvg", "FedRecon", "kNN-Per"), seeds=(0,), num_clients=10, cohort_size=3, num_rounds=2, epochs=1,
    hidden=8, joining=1, every=2,
)  # fmt: skip


class Cell(NamedTuple):
    """One run: a partition, a method, a seed."""

    data: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data} {self.method} seed={self.seed}"


class Setting(NamedTuple):
    """A method on a partition: its process, its rounds, and what is measured during training and at the end."""

    process: fl.Process
    rounds: int
    evaluate: Any
    at_the_end: Any


def main(config: Config, out: Path) -> dict[str, Any]:
    """Run every cell, and compare participants and newcomers."""
    studies, missing = available(config)
    settings = {(d, m): build(config, m, studies[d]) for d in studies for m in chosen(config, studies[d])}
    cells = in_order(list(settings), config.seeds, common.default_workers())
    ends: dict[str, dict[str, float]] = {}
    trainings = {c.name: training(config, c, settings[c.data, c.method], ends) for c in cells}
    results = common.run_all(trainings, out, describe, common.default_workers())
    rows = [row(c, ends[c.name], results[c.name]) for c in cells]
    checks = all_checks(config, PAPER, rows, missing)
    personalization_report.write(out, config, studies, rows, checks)
    return common.summary(rows, checks)


def available(config: Config) -> tuple[dict[str, Study], dict[str, str]]:
    """The partitions, and why some of several can't be had: MNIST and the ratings lie in files."""
    studies, missing = {}, {}
    for name in config.data_sets:
        try:
            studies[name] = load(name, config)
        except FileNotFoundError as error:
            if len(config.data_sets) == 1:
                raise
            missing[name] = "its files are not there"
            print(f"without {name}: {error}", flush=True)
    if not studies:
        raise ValueError("none of the data sets is there")
    return studies, missing


def in_order(keys: Sequence[tuple[str, str]], seeds: Sequence[int], workers: int) -> list[Cell]:
    """What to run: as many methods side by side as there are workers, so that each compiles a program of its own."""
    groups = [keys[i : i + workers] for i in range(0, len(keys), workers)]
    return [Cell(*key, seed) for group in groups for seed in seeds for key in group]


def chosen(config: Config, study: Study) -> list[str]:
    """The methods to run on a partition."""
    possible = list(methods(config, study.classes))
    return [m for m in possible if not config.methods or m in config.methods]


def build(config: Config, method: str, study: Study) -> Setting:
    """A method on a partition; all seeds share what is compiled."""
    if method == MOCHA:
        parts = [signed(part) for part in (study.train, study.test, study.support, study.newcomers)]
        study = Study(parts[0], parts[1], parts[2], parts[3], study.classes)
    round = methods(config, study.classes)[method]()
    alone = method == LOCAL
    sampler = fl.everyone() if alone else fl.uniform(config.cohort_size)
    share = config.cohort_size / study.train.num_clients if alone else 1
    return Setting(
        fl.synchronous(round, study.train, sampler),
        max(int(config.num_rounds * share + 0.5), 1),
        fl.per_client_accuracy(study.test),
        fl.cold_start(study.newcomers, study.support, study.test, rounds=config.joining, names=("accuracy",)),
    )


def training(config: Config, cell: Cell, setting: Setting, ends: dict[str, dict[str, float]]) -> common.Training:
    """How to train one cell; what is measured at its end goes to ``ends``."""

    def start(folder, stop):
        result = fl.run(
            setting.process, setting.rounds, cell.seed, evaluate=setting.evaluate,
            every=min(config.every, setting.rounds), out=folder, callbacks=[stop], progress=False,
        )  # fmt: skip
        ends[cell.name] = setting.at_the_end(setting.process, result.state)
        return result

    return start


def describe(result: fl.Result) -> str:
    """The participants' accuracy at the end, in words."""
    name = "personal_accuracy_mean" if "personal_accuracy_mean" in result.metrics[-1] else "accuracy_mean"
    return f"the mean participant's accuracy {common.percent(common.at(result, name))}"


def row(cell: Cell, found: dict[str, float], result: fl.Result) -> dict[str, Any]:
    """A run's line in ``summary.json``; ``None`` for what a method doesn't have."""
    own = "personal_" if "personal_accuracy" in found else ""
    return {
        "run": cell.name,
        **cell._asdict(),
        "accuracy_mean": found[f"{own}accuracy_mean"],
        "accuracy_worst10": found[f"{own}accuracy_worst10"],
        "shared_model_mean": found.get("accuracy_mean"),
        "newcomers_received": found.get("unseen_accuracy_mean"),
        "newcomers_personal": found.get("unseen_personal_accuracy_mean"),
        "newcomers_joined": found.get("unseen_joined_accuracy_mean"),
        "rounds": result.rounds,
        "uplink_bytes": result.uplink_bytes,
        "downlink_bytes": result.downlink_bytes,
        "seconds": result.seconds + result.compile_seconds,
    }
