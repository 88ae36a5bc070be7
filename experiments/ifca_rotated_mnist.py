"""IFCA on rotated MNIST (Ghosh et al. 2020): a model for each cluster against one for all and one for each client.

Ghosh, Chung, Yin and Ramchandran, "An Efficient Framework for Clustered Federated Learning", NeurIPS 2020, table 1,
with the setting of the authors' code. Every digit turned by 0, 90, 180 and 270 degrees; each rotation's 60,000 digits
are dealt to m/4 clients of n digits, a client's all turned alike. 10 full-batch steps of rate 0.1 a round, 300 rounds,
a network of 200 hidden units. With everyone in every round, as in the paper, a run takes hours; by default a sample of
the clients takes part in each round, a larger one in IFCA's first rounds, and a sample of them is trained alone. The
paper's is --participation 1 --early-participation 1 --local-clients 4800. Models alone are trained for 10 rounds, as by
the authors' script for them, whose own default goes before the 300 of its settings.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.ifca import ifca
from algorithms.local_only import local_only
from experiments import common, ifca_rotated_mnist_report
from experiments.ifca_rotated_mnist_data import ROTATIONS, Data, deal, digits
from experiments.starts import pytorch_start
from fedjax_lab import shuffle
from fedjax_lab.evaluation import Evaluation, pooled

METHODS = IFCA, GLOBAL, LOCAL = "IFCA", "global", "local"
# Test accuracy in percent, table 1: (m, n) of IFCA, the global model, and local models.
PUBLISHED = {
    "4800/50": {IFCA: 94.20, GLOBAL: 86.74, LOCAL: 63.32},
    "2400/100": {IFCA: 95.05, GLOBAL: 88.65, LOCAL: 73.66},
    "1200/200": {IFCA: 95.25, GLOBAL: 89.73, LOCAL: 80.05},
}


@dataclasses.dataclass(frozen=True)
class Config:
    settings: tuple[str, ...] = tuple(PUBLISHED)
    """Columns of the table, clients/digits each."""
    methods: tuple[str, ...] = (IFCA, GLOBAL, LOCAL)
    """Which to run."""
    participation: float = 0.01
    """Share of the clients in a round of IFCA and of the global model; the paper has 1."""
    early_participation: float = 0.1
    """Share of the clients in IFCA's first rounds, while its models part: one that nobody chooses then is lost."""
    early_rounds: int = 8
    """How many rounds that is."""
    local_clients: int = 480
    """How many clients, a quarter from each rotation, train a model alone; the paper has all."""
    num_rounds: int = 300
    """Communication rounds."""
    local_rounds: int = 10
    """As many times the local steps for models alone."""
    steps: int = 10
    """Local full-batch gradient steps in a round, the paper's tau."""
    learning_rate: float = 0.1
    """Of these steps."""
    hidden: int = 200
    """Hidden units."""
    every: int = 25
    """Rounds between evaluations."""
    seeds: tuple[int, ...] = (0,)
    """Of who has which digits, the models' start, and who takes part; the paper has 5."""
    train_digits: int = 60000
    """How many of MNIST's training digits are used."""
    test_digits: int = 10000
    """How many of its test digits are used."""
    data_dir: str | None = None
    """Folder with the MNIST files; by default FEDJAX_LAB_DATA, or fetched."""

    def __post_init__(self):
        for name in self.settings:
            if name not in PUBLISHED:
                near = fl.checks.nearest(name, PUBLISHED)
                raise ValueError(f"there is no setting {name!r} in the table{near}; there are {', '.join(PUBLISHED)}")
        for name in self.methods:
            if name not in METHODS:
                near = fl.checks.nearest(name, METHODS)
                raise ValueError(f"there is no method {name!r}{near}; there are {', '.join(METHODS)}")
        for name in ("settings", "methods", "seeds"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must name at least one, each once; got {getattr(self, name)}")
        for name in (
            "local_clients",
            "num_rounds",
            "local_rounds",
            "steps",
            "hidden",
            "every",
            "train_digits",
            "test_digits",
        ):
            fl.checks.positive(getattr(self, name), name, integer=True)
        for name in ("learning_rate", "participation", "early_participation"):
            fl.checks.positive(getattr(self, name), name)
        fl.checks.probability(self.participation, "participation")
        fl.checks.probability(self.early_participation, "early_participation")
        fl.checks.not_negative(self.early_rounds, "early_rounds", integer=True)
        if self.early_participation < self.participation:
            raise ValueError("early_participation must be at least participation")
        for setting in settings_of(self):
            for name in ("train_digits", "test_digits"):
                if getattr(self, name) % setting.n:
                    raise ValueError(f"{name} must be a multiple of a client's {setting.n} digits")


class Setting(NamedTuple):
    """A column of the table: digits of a client ``n``; how many clients ``m`` there are follows from it."""

    name: str
    n: int


def settings_of(config: Config) -> list[Setting]:
    return [Setting(name, int(name.split("/")[1])) for name in config.settings]


PAPER = Config()
QUICK = Config(
    settings=("1200/200",), participation=0.25, early_participation=0.5, early_rounds=1, local_clients=4, num_rounds=3,
    local_rounds=2, steps=2, every=3, train_digits=400, test_digits=200,
)  # fmt: skip


class Run(NamedTuple):
    """One run of a method."""

    setting: Setting
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting.name} {self.method} seed={self.seed}"


def main(config: Config, out: Path) -> dict[str, Any]:
    """Run every method in every setting, and compare test accuracies with the published ones."""
    runs = [Run(s, method, seed) for s in settings_of(config) for seed in config.seeds for method in config.methods]
    raw = functools.lru_cache(maxsize=1)(lambda: digits(config.train_digits, config.test_digits, config.data_dir))
    raw()  # said now, before anything is written, if it can't be had
    data = functools.lru_cache(maxsize=1)(lambda setting, seed: deal(raw(), setting.n, seed))
    found: dict[str, dict[str, Any]] = {}
    trainings = {run.name: training(config, run, data, found) for run in runs}
    results = common.run_all(trainings, out, lambda result: common.percent(common.at(result, "accuracy")))
    rows = [row(config, run, results[run.name], found.get(run.name, {})) for run in runs]
    checks = ifca_rotated_mnist_report.all_checks(config, PAPER, rows, PUBLISHED)
    ifca_rotated_mnist_report.write(out, config, rows, results, checks)
    return common.summary(rows, checks)


# ---- training ----


def network(hidden: int) -> fl.Model:
    """One hidden layer, drawn as the authors' PyTorch does."""
    return pytorch_start(fl.models.mlp(10, (hidden,)))


def training(config: Config, run: Run, load: Callable[[Setting, int], Data], found: dict) -> common.Training:
    """How to train one of the methods; what is known of it besides its records goes into ``found``."""
    work: dict[str, Any] = {"steps": config.steps, "batch_size": None}
    model, optimizer = network(config.hidden), optax.sgd(config.learning_rate)

    def start(folder, stop):
        data = load(run.setting, run.seed)
        cohort = max(round(config.participation * data.train.num_clients), 1)
        sampler, mesh = fl.uniform(cohort), common.mesh(cohort)
        early = max(round(config.early_participation * data.train.num_clients), cohort)
        if run.method == LOCAL:
            process, evaluate = alone(config, data, local_only(model, optimizer, **work))
        elif run.method == GLOBAL:
            algorithm = fedavg(model, optimizer, weighting="uniform", **work)
            process = fl.synchronous(algorithm, data.train, sampler, mesh=mesh)
            evaluate = fl.global_metrics(data.test)
        else:
            algorithm = ifca(model, optimizer, k=ROTATIONS, **work)
            sampler = fewer_later(early, config.early_rounds, cohort) if config.early_rounds else sampler
            process = fl.synchronous(algorithm, data.train, sampler, mesh=mesh)
            # As the authors' code does, a test client chooses by the loss on its test digits.
            evaluate = Evaluation(fl.client_metrics(data.test, data.test, personal=True).arrays, pooled)
        rounds = config.local_rounds if run.method == LOCAL else config.num_rounds
        every = min(config.every, rounds)
        result = fl.run(process, rounds, run.seed, evaluate=evaluate, every=every, out=folder, callbacks=[stop])
        found[run.name] = {"m": data.train.num_clients, "cohort": process.data.num_clients}
        if run.method != LOCAL:
            found[run.name]["cohort"] = cohort
        if run.method == IFCA:
            found[run.name]["choices"] = choices(process, result.state, data.test)
        return result

    return start


def fewer_later(first: int, rounds: int, then: int) -> fl.Sampler:
    """``first`` clients at random for some rounds, and ``then`` clients, no more than those, after them."""

    def sample(state, key, data, probe):
        slots = jnp.arange(first)
        ids = shuffle.permute(slots, data.num_clients, shuffle.seed_of(key))
        count = jnp.where(state < rounds, first, then)
        return jnp.where(slots < count, ids, data.num_clients), jnp.ones(first, bool), state + 1

    return fl.Sampler(lambda data: jnp.int32(0), sample)


def alone(config: Config, data: Data, algorithm: fl.Round) -> tuple[fl.Process, Any]:
    """A process of some clients that train alone, and the mean accuracy of their models on their rotation's digits."""
    each = data.train.num_clients // ROTATIONS
    count = max(min(config.local_clients // ROTATIONS, each), 1)
    chosen = np.concatenate([k * each + np.arange(count) for k in range(ROTATIONS)])
    process = fl.synchronous(algorithm, data.train.select(chosen), mesh=common.mesh(len(chosen)))
    turned = jax.tree.map(jnp.asarray, data.turned)

    @jax.jit
    def arrays(table):
        def one(client):
            variables, k = client
            batch = jax.tree.map(lambda x: x[k], turned)
            return jnp.mean(process.round.metrics(*variables, batch)["accuracy"])

        return jax.lax.map(one, (table.variables, jnp.repeat(jnp.arange(ROTATIONS), count)))

    own = lambda process, state: {"accuracy": float(jnp.mean(arrays(process.clients(state).table)))}
    return process, own


def choices(process: fl.Process, state: Any, test: fl.FederatedData) -> list[list[int]]:
    """How many of each rotation's test clients choose each model, ``[rotations][models]``."""
    models = process.server(state).models.variables
    batches = jax.tree.map(lambda a: jnp.asarray(a).reshape(test.num_clients, -1, *a.shape[1:]), test.arrays)
    loss: Any = process.round.metrics

    @jax.jit
    def chosen(batches):
        of = lambda batch: jax.vmap(lambda v: jnp.mean(loss(*v, batch)["loss"]))(models)
        return jax.lax.map(lambda batch: jnp.argmin(of(batch)), batches)

    number = np.asarray(chosen(batches))
    return [np.bincount(number[test.attrs["rotation"] == k], minlength=ROTATIONS).tolist() for k in range(ROTATIONS)]


def row(config: Config, run: Run, result: fl.Result, found: dict[str, Any]) -> dict[str, Any]:
    """A run's line in ``summary.json``; ``accuracy`` in percent, after the last round."""
    m = ROTATIONS * config.train_digits // run.setting.n
    cohort = max(round(config.participation * m), 1)
    return {
        "run": run.name,
        "setting": run.setting.name,
        "method": run.method,
        "seed": run.seed,
        "clients": m,
        "digits": run.setting.n,
        "clients_a_round": found.get("cohort", cohort),
        "accuracy": 100 * common.at(result, "accuracy"),
        "published": PUBLISHED[run.setting.name][run.method],
        "choices": found.get("choices"),
        "rounds": result.rounds,
        "uplink_bytes": result.uplink_bytes,
        "downlink_bytes": result.downlink_bytes,
        "seconds": result.seconds + result.compile_seconds,
    }
