"""The published figures of the FedProx experiment, and how ours compare."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import fedjax_lab as fl
from experiments.common import Check, other_settings
from experiments.fedprox_report import Row, title, values

FIGURES = "Li et al. 2020, setting of figure 2; range of 3 data seeds of an independent implementation"
CLAIM = "Li et al. 2020, section 5.3 and figures 1 and 2"

# (data set, mu): training loss and test accuracy after 200 rounds without stragglers, lowest and highest seed
RANGES = {
    ("iid", 0): ((0.20, 0.37), (0.90, 0.93)),
    ("iid", 1): ((0.69, 0.97), (0.68, 0.79)),
    ("0", 0): ((0.62, 1.49), (0.71, 0.82)),
    ("0", 1): ((0.43, 0.46), (0.84, 0.84)),
    ("0.5", 0): ((0.71, 1.25), (0.77, 0.84)),
    ("0.5", 1): ((0.36, 0.43), (0.82, 0.85)),
    ("1", 0): ((0.44, 1.06), (0.85, 0.90)),
    ("1", 1): ((0.28, 0.50), (0.82, 0.92)),
}
DRAWS = 3  # seeds behind each range
ENOUGH = 10  # seeds of ours: a range above or below all of them has a chance of 1 in C(13, 3) = 286
_MUST_AGREE = ("num_rounds", "cohort_size", "epochs", "batch_size", "learning_rate", "mu")


def all_checks(config: Any, paper: Any, rows: Sequence[Row], results: Mapping[str, fl.Result]) -> list[Check]:
    """Every check; those that these settings can't evaluate say why."""
    reason = other_settings(config, paper, _MUST_AGREE)
    checks = [_start(results)]
    for (data, mu), ranges in RANGES.items():
        for metric, range_ in zip(("train_loss", "test_accuracy"), ranges, strict=True):
            checks.append(_in_range(rows, config.seeds, data, mu, metric, range_, reason))
            checks.append(_like_ours(rows, data, mu, metric, range_, reason))
    for data in dict.fromkeys(data for data, _ in RANGES):
        for metric in ("train_loss", "dissimilarity"):
            checks.append(_ordering(rows, data, metric, 0.0, 3, reason))
        if data != "iid":
            checks.append(_ordering(rows, data, "train_loss", 0.9, 5, reason))
    return checks


def _start(results: Mapping[str, fl.Result]) -> Check:
    worst = max((r.metrics[0]["global_loss"] for r in results.values()), key=lambda x: abs(x - math.log(10)))
    return Check(
        name="loss of the zero model", paper=round(math.log(10), 6), ours=worst, tolerance="1e-5",
        ok=abs(worst - math.log(10)) < 1e-5, source="ln 10, in closed form",
    )  # fmt: skip


def _in_range(
    rows, seeds: Sequence[int], data: str, mu: int, metric: str, wanted: tuple[float, float], reason: str
) -> Check:
    """Whether each of ``seeds`` lies inside the published range.

    A strict reading: that range is of three draws of the data, and a fourth draw of the same would lie
    outside it half of the time. :func:`_like_ours` is the other.
    """
    ours = _ours([r for r in rows if r["seed"] in seeds], data, mu, metric)
    reason = reason or ("" if len(ours) >= DRAWS else f"it needs {DRAWS} seeds without stragglers")
    low, high = wanted
    return Check(
        name=f"{title(data)} mu={mu}: {metric.replace('_', ' ')}", paper=f"{low:.2f} to {high:.2f}",
        ours=[float(v) for v in ours], tolerance="every seed inside",
        ok=None if reason else all(low <= _rounded(v) <= high for v in ours), source=FIGURES, reason=reason,
    )  # fmt: skip


def _like_ours(rows, data: str, mu: int, metric: str, wanted: tuple[float, float], reason: str) -> Check:
    """Whether the published range can be that of three draws of the same as ours."""
    ours = [_rounded(v) for v in _ours(rows, data, mu, metric)]
    few = f"it needs {ENOUGH} seeds without stragglers"
    reason = reason or ("" if len(ours) >= ENOUGH else few)
    chance = 1.0 if reason else chance_of_range(ours, *wanted)
    spread = {} if reason else {"lowest": min(ours), "median": float(np.median(ours)), "highest": max(ours)}
    return Check(
        name=f"{title(data)} mu={mu}: {metric.replace('_', ' ')} of more seeds",
        paper=f"{wanted[0]:.2f} to {wanted[1]:.2f}", ours={"seeds": len(ours), **spread, "chance": round(chance, 4)},
        tolerance="a chance of .01 or more", ok=None if reason else chance >= 0.01, source=FIGURES, reason=reason,
    )  # fmt: skip


def chance_of_range(ours: Sequence[float], low: float, high: float, draws: int = DRAWS) -> float:
    """How likely a published range lies as far above ours, or as far below, if both are draws of the same.

    If so, every order of ours and theirs is equally likely: all of theirs come behind the ``m`` lowest of
    our ``n`` with probability ``C(n - m + draws, draws) / C(n + draws, draws)``. Of the two sides, the smaller
    probability: a sound implementation falls short of .01 with a probability of .02 at most.

    Args:
      ours: values of as many seeds.
      low, high: the lowest and the highest of the published values.
      draws: of how many seeds those are.
    """
    n, beyond = len(ours), max(sum(v < low for v in ours), sum(v > high for v in ours))
    return math.comb(n - beyond + draws, draws) / math.comb(n + draws, draws)


def _ours(rows, data: str, mu: int, metric: str) -> np.ndarray:
    return values(rows, metric, data, 0.0, "FedProx mu=1" if mu else "FedAvg")


def _rounded(value: float) -> float:
    return round(float(value), 2)  # as the published figures are


def _ordering(rows, data: str, metric: str, stragglers: float, seeds: int, reason: str) -> Check:
    prox, avg = (values(rows, metric, data, stragglers, m) for m in ("FedProx mu=1", "FedAvg"))
    both = len(prox) if len(prox) == len(avg) else 0
    reason = reason or ("" if both >= seeds else f"it needs {seeds} seeds with {stragglers:.0%} stragglers")
    lower = data != "iid"
    ours, ok = None, False
    if not reason:
        as_claimed = int(np.sum(prox < avg) if lower else np.sum(prox > avg))
        ours = {"mu=1": float(prox.mean()), "FedAvg": float(avg.mean()), "seeds": f"{as_claimed} of {both}"}
        ok = bool((prox.mean() < avg.mean()) == lower)
    return Check(
        name=f"{title(data)}, {stragglers:.0%} stragglers: {metric.replace('_', ' ')}",
        paper=f"{'lower' if lower else 'higher'} with mu=1 than with FedAvg",
        ours=ours, tolerance=f"the mean over {both or seeds} seeds",
        ok=None if reason else ok, source=CLAIM, reason=reason,
    )  # fmt: skip
