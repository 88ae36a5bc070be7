"""Ditto on point estimation (Li et al. 2021): the best lambda in closed form, and the errors that training comes to.

Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, section 3.3 and appendix.
Client k sees 30 points around a w_k of its own, and the w_k lie around one centre; those of attacked clients, more
widely. Local estimates are the clients' own means, the global one is the mean of all, Ditto's lie between. How far,
lambda says; the best one is known, and so is every error. Coordinates are independent: each is a trial, and one
training makes them all.
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
from experiments import common

SOURCE = "Li et al. 2021, theorem on point estimation, and the authors' notebook"


class Setting(NamedTuple):
    """The paper's K, K_a, tau_a; n, sigma and tau are the same in both of its settings."""

    clients: int
    attacked: int
    tau_attacked: float
    n: int = 30
    sigma: float = 0.8
    tau: float = 0.1

    @property
    def best_lambda(self) -> float:
        """The paper's lambda*."""
        others = self.attacked * (self.tau_attacked**2 - self.tau**2) / (self.clients - 1)
        return self.sigma**2 / self.n * self.clients / (self.clients * self.tau**2 + others)

    def error(self, lam: float) -> float:
        """Mean squared error of a benign client's estimate, ``(x_k + lam x) / (1 + lam)`` with all means' mean x."""
        K, towards = self.clients, lam / (1 + lam) if np.isfinite(lam) else 1.0
        noise = ((1 - towards) + towards / K) ** 2 + (K - 1) * (towards / K) ** 2
        others = (K - 1 - self.attacked) * self.tau**2 + self.attacked * self.tau_attacked**2
        truths = (1 - 1 / K) ** 2 * self.tau**2 + others / K**2
        return self.sigma**2 / self.n * noise + towards**2 * truths


SETTINGS = {"benign": Setting(8, 0, 0.1), "attacked": Setting(16, 8, 0.5)}
# lambda*, and the mean squared errors of Ditto with it, of local and of global estimates; None: not published
PUBLISHED = {"benign": (2.1333, 0.008624, 0.0213, 0.0114), "attacked": (1.1852, 0.010486, None, None)}


@dataclasses.dataclass(frozen=True)
class Config:
    settings: tuple[str, ...] = ("benign", "attacked")
    """Which: benign, 8 alike clients; attacked, 8 of 16 clients lie further out."""
    factors: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)
    """Ditto's lambdas, as multiples of the best one."""
    trials: int = 20_000
    """Coordinates of a point, each a trial of its own."""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """Of the data."""
    num_rounds: int = 8
    """Rounds."""
    steps: int = 2
    """Full-batch steps of a client in a round, for the global model and for its own."""
    learning_rate: float = 0.5
    """Of the global model; a client's own has this over 1 + lambda."""

    def __post_init__(self):
        for name in self.settings:
            if name not in SETTINGS:
                raise ValueError(f"there is no setting {name!r}{fl.checks.nearest(name, SETTINGS)}")
        for name in ("settings", "factors", "seeds"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must name at least one, each once; got {getattr(self, name)}")
        for factor in self.factors:
            fl.checks.not_negative(factor, "factors")
        for name in ("trials", "num_rounds", "steps"):
            fl.checks.positive(getattr(self, name), name, integer=True)
        fl.checks.positive(self.learning_rate, "learning_rate")


PAPER = Config()
QUICK = Config(factors=(0.0, 1.0), trials=400, seeds=(0,))


class Cell(NamedTuple):
    """One run: a setting, lambda as a multiple of the best one, a seed."""

    setting: str
    factor: float
    seed: int

    @property
    def lam(self) -> float:
        return self.factor * SETTINGS[self.setting].best_lambda

    @property
    def name(self) -> str:
        return f"{self.setting} lambda={self.lam:.4g} seed={self.seed}"


def main(config: Config, out: Path) -> dict[str, Any]:
    """Train with every lambda, and compare the errors with the published ones."""
    cells = [Cell(s, f, seed) for s in config.settings for f in config.factors for seed in config.seeds]
    data = functools.lru_cache(maxsize=1)(lambda setting, seed: load(config, setting, seed))
    programs: dict[tuple[str, float], fl.Process] = {}
    trainings = {cell.name: training(config, cell, data, programs) for cell in cells}
    results = common.run_all(trainings, out, describe)
    rows = [row(cell, results[cell.name]) for cell in cells]
    checks = all_checks(config, rows)
    write(out, config, rows, checks)
    return common.summary(rows, checks)


def load(config: Config, setting: str, seed: int) -> tuple[fl.FederatedData, fl.FederatedData]:
    """What clients see, and the benign ones' truths: one row each, which their estimates are compared with."""
    s = SETTINGS[setting]
    points = fl.datasets.point_estimation(
        s.clients, s.n, sigma=s.sigma, tau=s.tau, num_attacked=s.attacked, tau_attacked=s.tau_attacked,
        dim=config.trials, seed=seed,
    )  # fmt: skip
    benign = ~np.asarray(points.attrs["attacked"])
    truth = {k: {"x": np.asarray(points.attrs["w"])[i : i + benign[i]]} for i, k in enumerate(points.ids)}
    return points, fl.FederatedData.from_clients(truth)


def build(config: Config, lam: float, data: fl.FederatedData) -> fl.Process:
    """Ditto over FedAvg with everyone."""
    work: dict[str, Any] = {"steps": config.steps, "batch_size": None}
    model = fl.datasets.point_model(config.trials)
    base = fedavg(model, optax.sgd(config.learning_rate), weighting="uniform", **work)
    own = optax.sgd(config.learning_rate / (1 + lam))
    return fl.synchronous(fl.compose(base, fl.transforms.personal_model(lam, own, **work)), data)


def training(config: Config, cell: Cell, load: Any, programs: dict[tuple[str, float], fl.Process]) -> common.Training:
    """How to train one cell; all seeds of a lambda share its program."""

    def start(folder, stop):
        points, truth = load(cell.setting, cell.seed)
        key = (cell.setting, cell.factor)
        programs.setdefault(key, build(config, cell.lam, points))
        process = programs[key]._replace(data=points.on_device())
        return fl.run(
            process, config.num_rounds, cell.seed, evaluate=errors(config, truth), every=config.num_rounds,
            out=folder, callbacks=[stop], progress=False,
        )  # fmt: skip

    return start


def errors(config: Config, truth: fl.FederatedData):
    """Mean squared errors of the global model and of the clients' own."""
    losses = fl.per_client(truth, names=("loss",))  # |w - w_k|^2 / 2, over all trials

    def evaluate(process, state):
        found = losses(process, state)
        scale = 2 / config.trials
        return {"global_error": scale * found["loss"], "personal_error": scale * found["personal_loss"]}

    return evaluate


def describe(result: fl.Result) -> str:
    """Where a run ended, in words."""
    personal, shared = common.at(result, "personal_error"), common.at(result, "global_error")
    return f"mean squared error {personal:.6f}, of the global model {shared:.6f}"


def row(cell: Cell, result: fl.Result) -> dict[str, Any]:
    """A run's line in ``summary.json``, after its last round."""
    return {
        "run": cell.name,
        **cell._asdict(),
        "lambda": cell.lam,
        "personal_error": common.at(result, "personal_error", result.rounds),
        "global_error": common.at(result, "global_error", result.rounds),
        "closed_form": SETTINGS[cell.setting].error(cell.lam),
        "rounds": result.rounds,
        "uplink_bytes": result.uplink_bytes,
        "seconds": result.seconds + result.compile_seconds,
    }


# ---- what came out ----


def mean_error(rows: Sequence[Mapping[str, Any]], setting: str, factor: float, name: str) -> float | None:
    """Over the seeds; ``None`` if it was not run."""
    found = [r[name] for r in rows if (r["setting"], r["factor"]) == (setting, factor)]
    return float(np.mean(found)) if found else None


def all_checks(config: Config, rows: Sequence[Mapping[str, Any]]) -> list[common.Check]:
    """Every published figure; those that these settings can't evaluate say why."""
    # The sampling error of a mean over so many trials must be well below the tolerance.
    few = "" if config.trials * len(config.seeds) >= 80_000 else f"{config.trials * len(config.seeds)} trials are few"
    checks = []
    for setting, (lam, ditto, local, shared) in PUBLISHED.items():
        s = SETTINGS[setting]
        checks.append(_close(f"{setting}: lambda*", lam, s.best_lambda, ""))
        for name, paper, factor, entry in (
            ("Ditto with lambda*", ditto, 1.0, "personal_error"),
            ("local", local, 0.0, "personal_error"),
            ("global", shared, 1.0, "global_error"),
        ):
            if paper is not None:
                ours = mean_error(rows, setting, factor, entry)
                missing = "" if ours is not None else f"{setting} was not run with {factor:g} lambda*"
                checks.append(_close(f"{setting}: mean squared error, {name}", paper, ours, missing or few))
        checks.append(_best(rows, setting, few))
    return checks


def _close(name: str, paper: float, ours: float | None, reason: str) -> common.Check:
    ok = ours is not None and abs(ours - paper) <= 0.01 * paper
    return common.Check(name, paper, ours, "1%", None if reason else ok, SOURCE, reason)


def _best(rows: Sequence[Mapping[str, Any]], setting: str, reason: str) -> common.Check:
    """Whether no other lambda does better than lambda*."""
    found = {f: mean_error(rows, setting, f, "personal_error") for f in dict.fromkeys(r["factor"] for r in rows)}
    ours = {f"{factor:g} lambda*": error for factor, error in found.items() if error is not None}
    missing = "" if "1 lambda*" in ours and len(ours) > 2 else f"{setting} was run with few lambdas"
    best = min(ours, key=ours.__getitem__) if ours else None
    return common.Check(
        name=f"{setting}: the lambda of the smallest error", paper="lambda*", ours=ours or None,
        tolerance="of those tried", ok=None if reason or missing else best == "1 lambda*", source=SOURCE,
        reason=missing or reason,
    )  # fmt: skip


def table(config: Config, rows: Sequence[Mapping[str, Any]]) -> common.Table:
    """Errors by lambda, beside those in closed form."""
    lines = []
    for setting in config.settings:
        s = SETTINGS[setting]
        for factor in config.factors:
            lam = factor * s.best_lambda
            ours = mean_error(rows, setting, factor, "personal_error")
            lines.append((setting, f"{lam:.4f}", f"{factor:g}", f"{ours:.6f}", f"{s.error(lam):.6f}"))
        ours = np.mean([r["global_error"] for r in rows if r["setting"] == setting])
        lines.append((setting, "infinite", "global", f"{ours:.6f}", f"{s.error(np.inf):.6f}"))
    return common.Table(("setting", "lambda", "over lambda*", "mean squared error", "in closed form"), lines)


def picture(config: Config, rows: Sequence[Mapping[str, Any]]):
    """The error by lambda: the closed form as a line, what training came to as points."""
    figure, axes = fl.plots.new_figure(1, len(config.settings), width=4.4, height=3.4)
    for ax, setting in zip(axes[0], config.settings, strict=True):
        s, look = SETTINGS[setting], fl.plots.look(0)
        grid = np.concatenate([[0.0], np.geomspace(0.02, 50, 200)])
        ax.plot(grid, [s.error(lam) for lam in grid], label="closed form", linewidth=1.2, **look)
        own = [r for r in rows if r["setting"] == setting]
        ax.plot([r["lambda"] for r in own], [r["personal_error"] for r in own], "o", color="black", markersize=4,
                label="trained")  # fmt: skip
        ax.axhline(s.error(np.inf), color="0.5", linewidth=1, linestyle=(0, (2, 2)), label="global model")
        ax.axvline(s.best_lambda, color="0.5", linewidth=1)
        ax.set_xscale("symlog", linthresh=0.2)
        ax.set_xlim(0, 50)
        ax.set_xlabel("lambda (the vertical line: lambda*)")
        ax.set_ylabel("mean squared error")
        ax.set_title(setting)
    axes[0][-1].legend(frameon=False, fontsize="small")
    return figure


def write(out: Path, config: Config, rows: Sequence[Mapping[str, Any]], checks: Sequence[common.Check]) -> None:
    """Table, picture and ``report.md``."""
    shown = table(config, rows)
    common.write_study(
        out,
        "Ditto on point estimation",
        {
            "What was run": f"Ditto over FedAvg with everyone, {config.num_rounds} rounds of {config.steps} full-batch "
            f"steps; {config.trials} trials with each of {len(config.seeds)} seeds. lambda = 0 is local training. "
            "Errors are those of benign clients.",
            "Errors": shown.markdown(),
        },
        shown,
        checks,
        picture(config, rows),
        "errors",
        left=2,
    )
