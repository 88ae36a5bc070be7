"""FedAvg, FedProx and local training on handwritten digits that are spread unevenly over clients.

The 1,797 digits of scikit-learn are divided among clients by a Dirichlet distribution over labels, so that
each has few digits and few kinds of them. FedAvg and FedProx train one model together; in local training
every client trains its own, with as many passes over its digits as a client makes on average in FedAvg.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.fedprox import fedprox
from algorithms.local_only import local_only
from experiments import common, digits_report


def sparse(share: float | None) -> list[Any]:
    """What makes uploads sparse; nothing if all entries are sent."""
    return [] if share is None else [fl.uplink(fl.wire.error_feedback(fl.wire.top_k(share)))]


@dataclasses.dataclass(frozen=True)
class Config:
    num_clients: int = 50
    """Clients to divide the digits among."""
    alpha: float = 0.3
    """Of the Dirichlet distribution: the smaller, the fewer kinds of digits each client has."""
    cohort_size: int = 10
    """Clients that train in a round of FedAvg and FedProx."""
    num_rounds: int = 200
    """Rounds of FedAvg and FedProx."""
    epochs: int = 5
    """Passes over its own digits that a client makes in a round."""
    batch_size: int = 10
    """Digits in a gradient step."""
    learning_rate: float = 0.1
    """Of the clients' gradient steps."""
    mu: float = 1.0
    """Strength of FedProx's pull towards the global model."""
    top_k: float | None = None
    """Send only this share of an update's entries, the largest ones, and the others later (error feedback)."""
    every: int = 5
    """Rounds between evaluations."""
    seed: int = 0
    """Of the partition, the model's initialisation, and who takes part."""

    def __post_init__(self):
        fl.checks.positive(self.learning_rate, "learning_rate")
        for name in ("num_clients", "cohort_size", "num_rounds", "every"):
            fl.checks.positive(getattr(self, name), name, integer=True)
        sparse(self.top_k)


QUICK = Config(num_clients=10, cohort_size=4, num_rounds=6, epochs=1, every=2)

FEDAVG, FEDPROX, LOCAL = "FedAvg", "FedProx", "local training"


class Outcome(NamedTuple):
    """How a method ended.

    Attributes:
      own: ``float[clients]``, each client's accuracy on its own test digits, NaN for those without any.
      everybody: accuracy on all clients' test digits: of the shared model, or the mean over the clients' models.
      result: of the run.
    """

    own: np.ndarray
    everybody: float
    result: fl.Result


def main(config: Config, out: Path) -> dict[str, Any]:
    """Train with each method, compare them, and write the report."""
    partition = fl.datasets.dirichlet(config.num_clients, config.alpha)
    data = fl.datasets.digits(partition, config.seed)
    print(f"{data.train.num_examples} digits to train on and {data.test.num_examples} to test on, "
          f"{data.train.num_clients} clients")  # fmt: skip
    processes = build(config, data)
    trainings = {name: training(config, name, process, data) for name, process in processes.items()}
    results = common.run_all(trainings, out, describe)
    outcomes = {name: outcome(processes[name], results[name], data.test) for name in results}
    rows = [row(name, outcomes[name]) for name in outcomes]
    digits_report.table(rows).show()
    common.save(digits_report.picture(outcomes, data, LOCAL), out / "comparison.png")
    chance = digits_report.chance_of_mean(outcomes[FEDAVG].own - outcomes[LOCAL].own)
    digits_report.write(out, config, data, dict(zip(("fedavg", "fedprox", "local"), rows, strict=True)), chance)
    return common.summary(rows)


def build(config: Config, data: fl.Split) -> dict[str, fl.Process]:
    """A process for each method."""
    model, optimizer = fl.models.mlp(10), optax.sgd(config.learning_rate)
    work: dict[str, Any] = {"epochs": config.epochs, "batch_size": config.batch_size}
    together, mesh = fl.uniform(config.cohort_size), common.mesh(config.cohort_size)
    sent = lambda round: fl.synchronous(fl.compose(round, *sparse(config.top_k)), data.train, together, mesh=mesh)
    return {
        FEDAVG: sent(fedavg(model, optimizer, **work)),
        FEDPROX: sent(fedprox(model, optimizer, mu=config.mu, **work)),
        LOCAL: fl.synchronous(local_only(model, optimizer, **work), data.train, fl.everyone(), mesh=mesh),
    }


def training(config: Config, name: str, process: fl.Process, data: fl.Split) -> common.Training:
    """How to train with a method. Alone, each client makes the passes that it makes on average in FedAvg."""
    share = config.cohort_size / config.num_clients if name == LOCAL else 1
    rounds = max(round(config.num_rounds * share), 1)
    evaluate = fl.per_client_accuracy(data.test)
    return lambda folder, stop: fl.run(
        process, rounds, config.seed, evaluate=evaluate, every=min(config.every, rounds), out=folder, callbacks=[stop]
    )


def describe(result: fl.Result) -> str:
    """The accuracy at the end, in words."""
    name = "personal_accuracy" if "personal_accuracy" in result.metrics[-1] else "accuracy"
    return f"accuracy {common.percent(common.at(result, name))}"


def outcome(process: fl.Process, result: fl.Result, test: fl.FederatedData) -> Outcome:
    """Accuracies of a finished run, on each client's own digits and on everybody's."""
    personal = "personal" in process.round.traits
    measured = fl.client_metrics(test, personal=personal)(process, result.state)
    own = np.where(measured.examples > 0, measured.values["accuracy"], np.nan)
    if not personal:
        return Outcome(own, common.at(result, "accuracy"), result)
    accuracy = lambda variables: jnp.mean(process.round.metrics(*variables, test.on_device().arrays)["accuracy"])
    each = jax.jit(jax.vmap(accuracy))(process.clients(result.state).table.variables)
    return Outcome(own, float(each.mean()), result)


def row(name: str, outcome: Outcome) -> dict[str, Any]:
    """A method's line in the table and in ``summary.json``."""
    own = np.sort(outcome.own[np.isfinite(outcome.own)])
    tenth = max(1, -(-len(own) // 10))
    result = outcome.result
    return {
        "run": name,
        "accuracy_mean": float(own.mean()),
        "accuracy_worst10": float(own[:tenth].mean()),
        "accuracy_everybody": outcome.everybody,
        "rounds": result.rounds,
        "uplink_bytes": result.uplink_bytes,
        "downlink_bytes": result.downlink_bytes,
        "seconds": result.seconds + result.compile_seconds,
        "compile_seconds": result.compile_seconds,
    }
