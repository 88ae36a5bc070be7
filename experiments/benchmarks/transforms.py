"""``transforms``: a round of what is built around FedAvg, against FedAvg."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

import fedjax_lab as fl
from algorithms.fedrep import fedrep
from algorithms.scaffold import scaffold
from experiments.benchmarks import engine, pairs
from experiments.benchmarks.workloads import W1, UnknownWorkload, Workload, chosen, cohorts

ROUNDS = 3  # in a dispatch, as a run makes them: a step called by itself copies all clients' states


class Added(NamedTuple):
    """What is timed, and FedAvg's local epochs that it is timed against.

    Attributes:
      name: in the table.
      build: ``(workload) -> Round``.
      epochs: of FedAvg.
    """

    name: str
    build: Callable[[Workload], fl.Round]
    epochs: int = 1


def _local(work: Workload) -> dict:
    return {"epochs": work.epochs, "batch_size": work.batch_size}


def last_layer(path: str) -> bool:
    """The predicate of the model's last layer, which has the same name in all workloads."""
    return "output" in path


ADDED = (
    Added("SCAFFOLD", lambda w: scaffold(w.model(), optax.sgd(w.learning_rate), **_local(w))),
    Added("Ditto", lambda w: fl.compose(w.algorithm(), fl.transforms.personal_model(0.1))),
    Added("private layer", lambda w: fl.compose(w.algorithm(), fl.transforms.private(last_layer))),
    # An epoch of the head and one of the representation: as many steps as two epochs.
    Added(
        "FedRep",
        lambda w: fedrep(w.model(), optax.sgd(w.learning_rate), head=last_layer, head_epochs=w.epochs, **_local(w)),
        epochs=2,
    ),
)


def main(
    workloads: str = "w2", quick: bool = False, json: pathlib.Path | None = None, cohort: int | None = None
) -> None:
    """Time a round of SCAFFOLD, Ditto and of models with a private layer, against FedAvg's of as many steps.

    ``private layer`` is what FedBN and FedPer are made of; ``FedRep`` trains it alone for an epoch first, and is timed
    against two epochs of FedAvg.

    Args:
      workloads: which ones, separated by commas: w2, w3, w4.
      quick: three pairs of timings instead of fifteen.
      json: a file to write the figures to; a picture and all timings go beside it.
      cohort: clients a round, instead of the workload's own.
    """
    works = chosen(workloads)
    if W1 in works:
        raise UnknownWorkload("w1 has a single layer, of which nothing could be private: choose among w2, w3, w4")
    engine.use_all_cores()
    pairs.begin(json)
    results = []
    for work, data, ids in cohorts(works, cohort):

        def rounds(algorithm, ids=ids, data=data):
            process = engine.process(algorithm, data, fl.fixed(ids))
            return engine.dispatches(process, process.init(jax.random.key(0)), ROUNDS)

        for added in ADDED:
            plain = work._replace(epochs=work.epochs * added.epochs).algorithm()
            times = pairs.paired(rounds(added.build(work)), rounds(plain), 3 if quick else 15)
            name = f"{work.name} {added.name}"
            against = "FedAvg" if added.epochs == 1 else f"FedAvg, {added.epochs} epochs"
            row = pairs.summary(name, len(ids), against, pairs.scaled(times, 1e3 / ROUNDS), "ms per round")
            results.append(pairs.show(row))
    if json is not None and results:
        pairs.write(results, json, "What a round costs beside FedAvg's")
