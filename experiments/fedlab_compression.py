"""FedLab's compression benchmark on MNIST: quantization costs no accuracy, top-k of the models themselves does.

Zeng et al., "FedLab: A Flexible Federated Learning Framework", JMLR 2023, and the table "Communication Efficiency" of
its repository: MNIST dealt to 100 clients by Dir(.5) for each label, 10 of them a round, 200 rounds of 5 local steps on
all of a client's digits at rate .1, a network of two hidden layers of 200 units, clients averaged alike. What FedLab
compresses is the trained model, not how it changed: of 5% of the weights no first layer is left, and the network says
"1" to everything. Here both can be had: --what models is the benchmark's, --what updates what one would do.

FedLab's QSGD of b bits has 2^b levels of the largest entry beside a sign; here one level fewer, for b + 1 bits in all.
Its megabytes are those of 398 packages (the baseline's 302.45 MiB are 398 models), 32 bits for a weight and 9 for
"8 bit", and a sixteenth of k/d of that for top-k, in which indices can't be contained; ours are all uploads, with what
really travels. So shares of the baseline's bytes are compared, and only for QSGD.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from experiments import common, fedlab_compression_report
from experiments.niid_bench_data import some, uniform

What = Literal["models", "updates"]
CLIENTS = 100


class Setting(NamedTuple):
    """A column of FedLab's table: the link, and the published accuracy in percent and megabytes."""

    link: Callable[[], fl.wire.Wire]
    accuracy: float
    megabytes: float
    ordering: bool  # only its place among the others is compared


def _quantized(bits: int) -> fl.wire.Wire:
    return fl.wire.qsgd(levels=2**bits - 1, norm="max")


SETTINGS = {
    "none": Setting(fl.wire.identity, 93.14, 302.45, False),
    "qsgd4": Setting(lambda: _quantized(4), 93.03, 45.59, False),
    "qsgd8": Setting(lambda: _quantized(8), 93.27, 85.06, False),
    "top5": Setting(lambda: fl.wire.top_k(0.05), 11.35, 0.94, True),
    "top10": Setting(lambda: fl.wire.top_k(0.10), 61.25, 1.89, True),
    "top20": Setting(lambda: fl.wire.top_k(0.20), 89.96, 3.79, True),
}


@dataclasses.dataclass(frozen=True)
class Config:
    settings: tuple[str, ...] = ("all",)
    """Which: none, qsgd4, qsgd8, top5, top10, top20; or all."""
    what: tuple[What, ...] = ("models",)
    """What is compressed: the trained models, as in FedLab, or how they changed."""
    seeds: tuple[int, ...] = (0,)
    """Of partition, initialisation and training."""
    many_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of top-k of the models, of which only the ordering is compared, and of what it is compared with."""
    num_rounds: int = 200
    """Rounds."""
    cohort_size: int = 10
    """Clients in a round."""
    steps: int = 5
    """Local steps on all of a client's digits."""
    learning_rate: float = 0.1
    """Of the clients' gradient steps."""
    alpha: float = 0.5
    """The Dirichlet distribution's parameter."""
    examples: int = 60_000
    """Training digits used; fewer for a trial."""
    every: int = 10
    """Rounds between evaluations."""
    data_dir: str | None = None
    """Folder with the MNIST files; by default FEDJAX_LAB_DATA, or fetched."""

    def __post_init__(self):
        for name in self.settings:
            if name not in SETTINGS and name != "all":
                near = fl.checks.nearest(name, [*SETTINGS, "all"])
                raise ValueError(f"there is no setting {name!r} in FedLab's table{near}")
        for name in ("settings", "what", "seeds", "many_seeds"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must name at least one, each once; got {getattr(self, name)}")
        for name in ("learning_rate", "alpha"):
            fl.checks.positive(getattr(self, name), name)
        for name in ("num_rounds", "cohort_size", "steps", "examples", "every"):
            fl.checks.positive(getattr(self, name), name, integer=True)


PAPER = Config(what=("models", "updates"))
QUICK = Config(
    settings=("none", "qsgd8", "top10"), seeds=(0,), many_seeds=(0,), num_rounds=2, cohort_size=4, steps=2,
    examples=1500, every=1,
)  # fmt: skip


class Attempt(NamedTuple):
    """One run."""

    what: What
    setting: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.what}/{self.setting} seed={self.seed}"


def main(config: Config, out: Path) -> dict[str, Any]:
    """Run the table's settings, and compare accuracies and bytes with the published ones."""
    attempts = all_attempts(config)
    data = functools.lru_cache(maxsize=1)(lambda seed: load(config, seed))
    data(attempts[0].seed)  # said now, before anything is written, if it can't be had
    trainings = {attempt.name: training(config, attempt, data) for attempt in attempts}
    results = common.run_all(trainings, out, lambda r: f"test accuracy {common.percent(common.at(r, 'accuracy'))}")
    rows = [row(attempt, results[attempt.name]) for attempt in attempts]
    parameters = fl.nbytes(network().init(jax.random.key(0))[0]) // 4
    checks = fedlab_compression_report.all_checks(config, PAPER, rows, SETTINGS, parameters)
    fedlab_compression_report.write(out, config, rows, results, checks, SETTINGS)
    return common.summary(rows, checks)


def all_attempts(config: Config) -> list[Attempt]:
    """What to run, those with the same data one after the other, the benchmark's own first.

    Without compression models and updates are the same.
    """
    names = list(SETTINGS) if "all" in config.settings else [n for n in SETTINGS if n in config.settings]
    found = []
    for seed in dict.fromkeys((*config.seeds, *config.many_seeds)):
        for what in config.what:
            for name in names:
                many = what == "models" and (SETTINGS[name].ordering or name == "none")
                wanted = seed in config.seeds or (many and seed in config.many_seeds)
                if wanted and (name != "none" or what == config.what[0]):
                    found.append(Attempt(what, name, seed))
    return found


def load(config: Config, seed: int) -> fl.Split:
    """MNIST dealt to the clients, and its test digits in one piece."""
    deal = some(fl.datasets.dirichlet(CLIENTS, config.alpha, min_size=10), config.examples)
    split = fl.datasets.mnist(deal, seed, config.data_dir)
    return fl.Split(split.train, fl.FederatedData.from_clients({"test": split.test.arrays}))


class Network(nn.Module):
    """Two hidden layers of 200 ReLU units with PyTorch's initialisation, on which depends what top-k leaves of each."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for i, units in enumerate((200, 200, 10)):
            start = uniform(x.shape[-1])
            x = nn.Dense(units, kernel_init=start, bias_init=start, name=f"fc{i + 1}")(x if i == 0 else nn.relu(x))
        return x


def network() -> fl.Model:
    """FedLab's MLP, of 199,210 parameters."""
    return fl.models.from_flax(Network(), (1, 28, 28, 1), num_classes=10)


def whole_models(round: fl.Round) -> fl.Round:
    """Clients upload what they trained, rather than how it changed; without compression it is the same."""

    def client_update(message, state, client, key, tilt=fl.identity):
        out = round.client_update(message, state, client, key, tilt=tilt)
        assert out.trained is not None
        return out._replace(upload=out.trained.variables)

    def server_update(server, mean, key):
        assert round.model is not None
        return round.server_update(server, fl.difference(mean, round.model.get(server)), key)

    return round._replace(client_update=client_update, server_update=server_update)


def algorithm(config: Config, what: What, setting: str) -> fl.Round:
    """FedAvg through the setting's link."""
    base = fedavg(network(), optax.sgd(config.learning_rate), steps=config.steps, batch_size=None, weighting="uniform")
    whole = [whole_models] if what == "models" and setting != "none" else []
    return fl.compose(base, *whole, fl.uplink(SETTINGS[setting].link()))


def training(config: Config, attempt: Attempt, load: Callable[[int], fl.Split]) -> common.Training:
    """How to train with a setting and a seed."""

    def start(folder, stop):
        data = load(attempt.seed)
        process = fl.synchronous(
            algorithm(config, attempt.what, attempt.setting), data.train, fl.uniform(config.cohort_size),
            mesh=common.mesh(config.cohort_size),
        )  # fmt: skip
        return fl.run(
            process, config.num_rounds, attempt.seed, evaluate=fl.global_metrics(data.test), every=config.every,
            out=folder, callbacks=[stop], progress=False,
        )  # fmt: skip

    return start


def row(attempt: Attempt, result: fl.Result) -> dict[str, Any]:
    """A run's line in ``summary.json``; accuracies in percent."""
    return {
        "run": attempt.name,
        **attempt._asdict(),
        "published": SETTINGS[attempt.setting].accuracy,
        "accuracy": 100 * common.at(result, "accuracy"),
        "rounds": result.rounds,
        "uplink_bytes": result.uplink_bytes,
        "downlink_bytes": result.downlink_bytes,
        "seconds": result.seconds + result.compile_seconds,
    }


def accuracies(rows: Sequence[dict[str, Any]], what: str, setting: str) -> list[float]:
    """Test accuracies in percent after the last round, of each seed."""
    return fedlab_compression_report.values(rows, what, setting, "accuracy")
