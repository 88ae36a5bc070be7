"""pFedMe on MNIST (Dinh et al. 2020): test accuracy of the global model and of personal ones, round by round.

Dinh, Tran and Nguyen, "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020, section 5 (MCLR), with
the settings of the authors' repository, and its published curves as the reference. 20 clients of two digits each
(experiments/pfedme_data.py), 5 of which are averaged in a round; multinomial logistic regression. As in the authors'
code (experiments/pfedme_authors.py) and not told in the paper, theta goes on from mini-batch to mini-batch, is pulled
to zero a little (mu), and the personal models that are evaluated are the clients' w after the round's local steps.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from experiments import common, pfedme_data
from experiments.pfedme_authors import continued
from fedjax_lab.transforms.pfedme import prox

SOURCE = "results of the authors' repository (means of their runs), multinomial logistic regression"
ROUNDS = (10, 50, 100, 200, 400, 799)
# (R, personal learning rate) and the test accuracy after ROUNDS
PUBLISHED = {
    "global": ((10, 0.09), (0.7145, 0.8714, 0.8965, 0.9122, 0.9210, 0.9286)),
    "personal": ((20, 0.1), (0.9057, 0.9260, 0.9332, 0.9366, 0.9412, 0.9454)),
}
TOLERANCE, FROM_ROUND = 0.015, 50


@dataclasses.dataclass(frozen=True)
class Config:
    curves: tuple[str, ...] = ("global", "personal")
    """Which of the published curves: global (R=10, personal learning rate 0.09), personal (R=20, 0.1)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initialisation, batches and who takes part."""
    num_rounds: int = 799
    """Rounds."""
    cohort_size: int = 5
    """Clients that are averaged in a round."""
    lam: float = 15.0
    """lambda, how closely theta stays to w."""
    inner_steps: int = 5
    """K, gradient steps to theta."""
    learning_rate: float = 0.005
    """eta, of w."""
    beta: float = 1.0
    """How far the server moves to the mean."""
    batch_size: int = 20
    """Examples in a mini-batch."""
    theta_from: Literal["theta", "w"] = "theta"
    """Where the search for theta begins in a mini-batch: where it ended in the last one, as in the authors' code, or at
    w, as in this framework's transform, whose personal models are theta."""
    mu: float = 0.001
    """The pull of theta to zero in the authors' optimizer."""
    every: int = 10
    """Rounds between evaluations; a divisor of 10 meets the published rounds."""
    data_dir: str | None = None
    """Folder with the MNIST files; by default FEDJAX_LAB_DATA, or fetched."""

    def __post_init__(self):
        for name in self.curves:
            if name not in PUBLISHED:
                raise ValueError(f"there is no curve {name!r}{fl.checks.nearest(name, PUBLISHED)}")
        for name in ("curves", "seeds"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must name at least one, each once; got {getattr(self, name)}")
        fl.checks.positive(self.learning_rate, "learning_rate")
        for name in ("num_rounds", "every"):
            fl.checks.positive(getattr(self, name), name, integer=True)


PAPER = Config()
QUICK = Config(curves=("personal",), seeds=(0,), num_rounds=4, every=2)


class Cell(NamedTuple):
    """One run: a curve and a seed."""

    curve: str
    seed: int

    @property
    def name(self) -> str:
        (R, rate), _ = PUBLISHED[self.curve]
        return f"{self.curve} R={R} rate={rate:g} seed={self.seed}"


def main(config: Config, out: Path) -> dict[str, Any]:
    """Run both settings, and compare the curves with the published ones."""
    data = pfedme_data.load(config.data_dir)
    cells = [Cell(curve, seed) for curve in config.curves for seed in config.seeds]
    processes = {curve: build(config, curve, data.train) for curve in config.curves}
    evaluate = accuracies(data.test)
    trainings = {cell.name: training(config, cell, processes[cell.curve], evaluate) for cell in cells}
    results = common.run_all(trainings, out, describe)
    rows = [row(cell, results[cell.name]) for cell in cells]
    checks = all_checks(config, rows, results, np.asarray(data.train.sizes))
    write(out, config, rows, results, checks)
    return common.summary(rows, checks)


def build(config: Config, curve: str, data: fl.FederatedData) -> fl.Process:
    """pFedMe over FedAvg: R local steps, each by a Moreau envelope of its mini-batch."""
    (R, rate), _ = PUBLISHED[curve]
    pull = fl.shift(lambda params: jax.tree.map(lambda w: config.mu * w, params))
    inner: dict[str, Any] = {"inner_learning_rate": rate, "inner_steps": config.inner_steps}
    algorithm = fedavg(
        fl.models.logistic_regression(10), optax.sgd(config.learning_rate), steps=R, batch_size=config.batch_size,
        server_optimizer=optax.sgd(config.beta),
    )  # fmt: skip
    if config.theta_from == "theta":
        own = continued(config.lam, learning_rate=config.learning_rate, pull=pull, **inner)
        algorithm = fl.compose(algorithm, own)
    else:
        algorithm = fl.compose(
            algorithm,
            fl.transforms.tilted(lambda received, client: pull),
            fl.transforms.pfedme(config.lam, **inner),
            after_training(config, rate, pull),
        )
    return fl.synchronous(algorithm, data, fl.uniform(config.cohort_size))


def after_training(config: Config, rate: float, pull: fl.Tilt) -> fl.Transform:
    """Personal models as the paper has them: theta, of one mini-batch, at the end of the local steps."""

    def transform(round: fl.Round) -> fl.Round:
        assert round.loss is not None
        oracle = pull(fl.gradient_oracle(round.loss))

        def personalize(message, state, client, key):
            w = round.client_update(message, state, client, key).trained.variables

            def theta(_, batch, mask, positions, step_key):
                gradient = lambda params: oracle(params, (w.model_state, batch, mask), step_key)[0]
                return prox(gradient, w.params, config.lam, rate, config.inner_steps)

            last = jax.random.fold_in(key, 0x1A57)
            return w._replace(params=client.fold(theta, w.params, steps=1, batch_size=config.batch_size, key=last))

        return round._replace(personalize=personalize)

    return transform


def accuracies(test: fl.FederatedData):
    """Over all clients' test digits: of the global model, and of each client's own."""
    both = fl.per_client_accuracy(test)

    def evaluate(process, state):
        found = both(process, state)
        return {"global_accuracy": found["accuracy"], "personal_accuracy": found["personal_accuracy"]}

    return evaluate


def training(config: Config, cell: Cell, process: fl.Process, evaluate: Any) -> common.Training:
    """How to train one cell; its curve's seeds share a program."""

    def start(folder, stop):
        return fl.run(
            process, config.num_rounds, cell.seed, params=initial(process, cell.seed), evaluate=evaluate,
            every=config.every, out=folder, callbacks=[stop], progress=False,
        )  # fmt: skip

    return start


def initial(process: fl.Process, seed: int) -> Any:
    """Where the authors' framework lets a linear layer begin: evenly within one over the root of its inputs."""
    rng, bound = np.random.default_rng(seed), 1 / np.sqrt(pfedme_data.PIXELS)
    like = process.params(process.init(jax.random.key(0)))
    return jax.tree.map(lambda p: rng.uniform(-bound, bound, p.shape).astype(p.dtype), like)


def describe(result: fl.Result) -> str:
    """Where a run ended, in words."""
    own, shared = (common.percent(common.at(result, name)) for name in ("personal_accuracy", "global_accuracy"))
    return f"test accuracy of the global model {shared}, of personal ones {own}"


def row(cell: Cell, result: fl.Result) -> dict[str, Any]:
    """A run's line in ``summary.json``; its curve at the published rounds."""
    records = {r["round"]: r[f"{cell.curve}_accuracy"] for r in result.metrics if "global_accuracy" in r}
    return {
        "run": cell.name,
        **cell._asdict(),
        "at": {str(r): records[r] for r in ROUNDS if r in records},
        "accuracy": common.at(result, f"{cell.curve}_accuracy", result.rounds),
        "rounds": result.rounds,
        "uplink_bytes": result.uplink_bytes,
        "seconds": result.seconds + result.compile_seconds,
    }


# ---- what came out ----


def all_checks(
    config: Config, rows: Sequence[Mapping[str, Any]], results: Mapping[str, fl.Result], sizes: np.ndarray
) -> list[common.Check]:
    """Every published figure; those that these settings can't evaluate say why."""
    may = ("curves", "seeds", "every", "data_dir", "num_rounds")
    reason = common.other_settings(config, PAPER, (n for n in vars(PAPER) if n not in may))
    found = [int(sizes.min()), int(sizes.max())]
    checks = [
        common.Check("training digits of the smallest and the largest client", [1165, 3834], found, "exact",
                     found == [1165, 3834], "Dinh et al. 2020, section 5.1"),
    ]  # fmt: skip
    for curve, (_, published) in PUBLISHED.items():
        for r, paper in zip(ROUNDS, published, strict=True):
            ours = [row["at"][str(r)] for row in rows if row["curve"] == curve and str(r) in row["at"]]
            missing = "" if ours else f"round {r} of {curve} was not run"
            early = f"+-{TOLERANCE} holds from round {FROM_ROUND} only" if r < FROM_ROUND else ""
            mean = float(np.mean(ours)) if ours else None
            figures = {"mean": mean, "seeds": ours} if ours else None
            why = reason or missing or early
            ok = mean is not None and abs(mean - paper) <= TOLERANCE
            name = f"{curve} model: test accuracy after round {r}"
            checks.append(common.Check(name, paper, figures, f"{TOLERANCE}", None if why else ok, SOURCE, why))
    return checks


def table(rows: Sequence[Mapping[str, Any]]) -> common.Table:
    """Published and our accuracy at the published rounds."""
    lines = []
    for curve, (_, published) in PUBLISHED.items():
        for r, paper in zip(ROUNDS, published, strict=True):
            ours = [row["at"][str(r)] for row in rows if row["curve"] == curve and str(r) in row["at"]]
            if ours:
                each = " ".join(f"{x:.4f}" for x in ours)
                lines.append((curve, str(r), f"{paper:.4f}", f"{np.mean(ours):.4f}", each))
    return common.Table(("model", "round", "paper", "ours", "each seed"), lines)


def picture(config: Config, rows: Sequence[Mapping[str, Any]], results: Mapping[str, fl.Result]):
    """Both curves, with the published points."""
    figure, axes = fl.plots.new_figure(1, len(config.curves), width=4.6, height=3.4)
    for ax, curve in zip(axes[0], config.curves, strict=True):
        runs = {"ours": [results[row["run"]] for row in rows if row["curve"] == curve]}
        fl.plots.draw_runs(ax, runs, f"{curve}_accuracy")
        ax.plot(ROUNDS, PUBLISHED[curve][1], "o", color="black", markersize=4, label="published")
        ax.set_ylim(0.6, 1)
        ax.set_ylabel(f"test accuracy, {curve} model")
    axes[0][-1].legend(frameon=False, fontsize="small")
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
        "pFedMe on MNIST",
        {
            "What was run": f"Multinomial logistic regression on the authors' own division of MNIST among 20 clients; "
            f"{config.cohort_size} clients are averaged in each of {config.num_rounds} rounds, lambda={config.lam:g}, "
            f"K={config.inner_steps}, beta={config.beta:g}. Accuracy is over all clients' test digits. Clients that "
            "share a label share images there, as in the authors' data: accuracies are not those on unseen digits.",
            "Accuracy": shown.markdown(),
        },
        shown,
        checks,
        picture(config, rows, results),
    )
