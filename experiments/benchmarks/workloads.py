"""What the benchmarks compute: a population, a model, and the local work of a round."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg

PyTree = Any


class Workload(NamedTuple):
    """One federated training task, and the same model written by hand.

    Attributes:
      name: as in ``--workloads``.
      data: ``() -> FederatedData`` with the fields ``x`` and ``y``.
      model: ``() -> fl.Model``, written as a user would.
      mean_loss: ``(params, x, y) -> float32[]``, the model by hand, with the parameters' leaves in
        the order of the model's.
      params: ``() -> params`` for ``mean_loss``, equal to the model's own initial ones.
      learning_rate, batch_size, epochs: of the clients' SGD.
      cohorts: numbers of clients a round that are measured.
    """

    name: str
    data: Callable[[], fl.FederatedData]
    model: Callable[[], fl.Model]
    mean_loss: Callable[[PyTree, jax.Array, jax.Array], jax.Array]
    params: Callable[[], PyTree]
    learning_rate: float
    batch_size: int
    epochs: int
    cohorts: tuple[int, ...]

    def algorithm(self) -> fl.Round:
        """FedAvg on this workload."""
        optimizer = optax.sgd(self.learning_rate)
        return fedavg(self.model(), optimizer, epochs=self.epochs, batch_size=self.batch_size)

    def steps(self, sizes: np.ndarray) -> int:
        """SGD steps that clients of these sizes make in a round."""
        return self.epochs * int(np.sum(-(-np.asarray(sizes) // self.batch_size)))


def power_law_sizes(clients: int, low: int, high: int, rng: np.random.Generator) -> np.ndarray:
    """Sizes whose density falls as the square, between ``low`` and ``high``; ``int[clients]``."""
    share = rng.random(clients)
    return np.floor(1 / (1 / low - share * (1 / low - 1 / (high + 1)))).astype(int)


def synthetic(clients: int = 1000, features: int = 60, classes: int = 10) -> fl.FederatedData:
    """Synthetic(1, 1) (Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020,
    section 5.1) with power-law sizes of 50 to 1,000. The examples' values do not matter for speed.
    """
    rng = np.random.default_rng(0)
    scale = np.sqrt(np.arange(1, features + 1) ** -1.2)
    rows = {}
    for k, size in enumerate(power_law_sizes(clients, 50, 1000, rng)):
        mean, center = rng.normal(size=2)
        weights = rng.normal(mean, 1, (features, classes))
        x = rng.normal(rng.normal(center, 1, features), scale, (size, features))
        y = np.argmax(x @ weights + rng.normal(mean, 1, classes), axis=1)
        rows[k] = {"x": x.astype(np.float32), "y": y.astype(np.int32)}
    return fl.FederatedData.from_clients(rows)


def _linear_loss(params, x, y):
    scores = x @ params["kernel"] + params["bias"][None]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, y))


W1 = Workload(
    name="w1",
    data=synthetic,
    model=lambda: fl.models.logistic_regression(10),
    mean_loss=_linear_loss,
    params=lambda: {"bias": jnp.zeros(10), "kernel": jnp.zeros((60, 10))},
    learning_rate=0.01,
    batch_size=10,
    epochs=5,
    cohorts=(10, 100),
)
WORKLOADS = {w.name: w for w in (W1,)}


class UnknownWorkload(ValueError):
    """A name that isn't a workload."""


def chosen(names: str) -> list[Workload]:
    """The workloads of a comma-separated list. Raises UnknownWorkload."""
    words = [word.strip() for word in names.split(",") if word.strip()]
    for word in words:
        if word not in WORKLOADS:
            near = fl.checks.nearest(word, WORKLOADS)
            raise UnknownWorkload(f"no workload {word!r}{near} (there are: {', '.join(WORKLOADS)})")
    if not words:
        raise UnknownWorkload(f"name at least one workload: {', '.join(WORKLOADS)}")
    return [WORKLOADS[word] for word in words]
