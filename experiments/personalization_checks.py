"""What the personalisation study holds against the papers' claims: orderings, of means over the seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.common import Check, other_settings

Row = Mapping[str, Any]
SKEW = "where labels are skewed, clients are served better by personal models than by one for all"
SPLITS = "where clients fall into clusters, a model for each cluster serves them better than one for all"
CLAIMS = [  # partition, method, against, metric, what is claimed, and whose experiments show it
    ("digits", "fine-tuned", "FedAvg", "accuracy_mean", SKEW, "Wang et al. 2019"),
    ("digits", "Ditto", "FedAvg", "accuracy_mean", SKEW, "Li et al., ICML 2021"),
    ("digits", "APFL", "FedAvg", "accuracy_mean", SKEW, "Deng et al. 2020"),
    ("digits", "FedPer", "FedAvg", "accuracy_mean", SKEW, "Arivazhagan et al. 2019"),
    ("digits", "FedRep", "FedAvg", "accuracy_mean", SKEW, "Collins et al., ICML 2021"),
    ("digits", "FedRep", "local", "accuracy_mean", "a shared representation helps", "Collins et al., ICML 2021"),
    ("digits", "kNN-Per", "FedAvg", "accuracy_mean", SKEW, "Marfoq et al., ICML 2022"),
    ("digits", "Per-FedAvg", "FedAvg", "accuracy_mean", SKEW, "Fallah et al., NeurIPS 2020"),
    ("digits", "kNN-Per", "FedAvg", "newcomers_personal", "those who come later gain too", "Marfoq et al., ICML 2022"),
    ("digits", "fine-tuned", "local", "newcomers_joined", "more than a newcomer learns alone", "Wang et al. 2019"),
    ("mnist", "fine-tuned", "FedAvg", "accuracy_mean", SKEW, "Wang et al. 2019"),
    ("mnist", "Ditto", "FedAvg", "accuracy_mean", SKEW, "Li et al., ICML 2021"),
    ("mnist", "pFedMe", "FedAvg", "accuracy_mean", SKEW, "Dinh et al., NeurIPS 2020"),
    ("mnist", "FedRep", "FedAvg", "accuracy_mean", SKEW, "Collins et al., ICML 2021"),
    ("clusters", "IFCA", "FedAvg", "accuracy_mean", SPLITS, "Ghosh et al., NeurIPS 2020"),
    ("clusters", "FedEM", "FedAvg", "accuracy_mean", SPLITS, "Marfoq et al., NeurIPS 2021"),
    ("clusters", "MOCHA", "FedAvg", "accuracy_mean", "related models beat one for all", "Smith et al., NIPS 2017"),
    ("rotated", "IFCA", "FedAvg", "accuracy_mean", SPLITS, "Ghosh et al., NeurIPS 2020"),
    ("mnist_rotated", "IFCA", "FedAvg", "accuracy_mean", SPLITS, "Ghosh et al., NeurIPS 2020"),
    ("synthetic", "Ditto", "FedAvg", "accuracy_mean", SKEW, "Li et al., ICML 2021"),
    ("synthetic", "pFedMe", "FedAvg", "accuracy_mean", SKEW, "Dinh et al., NeurIPS 2020"),
]
_MAY_DIFFER = ("data_sets", "methods", "seeds", "data_dir", "every")


def all_checks(config: Any, paper: Any, rows: Sequence[Row], missing: Mapping[str, str]) -> list[Check]:
    """Every claim about the partitions that were asked for; those that can't be judged say why."""
    reason = other_settings(config, paper, (n for n in vars(paper) if n not in _MAY_DIFFER))
    return [_check(rows, missing.get(claim[0], reason), *claim) for claim in CLAIMS if claim[0] in config.data_sets]


def _check(rows: Sequence[Row], reason: str, data: str, method: str, against: str, metric: str, claim, source) -> Check:
    ours, theirs = (values(rows, data, m, metric) for m in (method, against))
    # One model for all has nothing personal: newcomers use it as they receive it.
    theirs = theirs if len(theirs) else values(rows, data, against, "newcomers_received")
    reason = reason or ("" if len(ours) == len(theirs) >= 5 else f"it needs {method} and {against} with 5 seeds")
    found = None if reason else {method: float(ours.mean()), against: float(theirs.mean())}
    who = "newcomers" if metric.startswith("newcomers") else "participants"
    return Check(
        name=f"{data}, {who}: {method} above {against}", paper=claim, ours=found, tolerance="the mean over the seeds",
        ok=None if reason else bool(ours.mean() > theirs.mean()), source=source, reason=reason,
    )  # fmt: skip


def values(rows: Sequence[Row], data: str, method: str, metric: str) -> np.ndarray:
    """A metric, one value for each seed; empty if the method doesn't have it."""
    found = [r[metric] for r in rows if (r["data"], r["method"]) == (data, method)]
    return np.array([v for v in found if v is not None], np.float64)
