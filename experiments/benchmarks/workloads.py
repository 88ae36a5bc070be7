"""What the benchmarks compute: a population, a model, and the local work of a round.

W1: logistic regression on synthetic(1, 1), 60 features, power-law sizes of 50 to 1,000, batch 10, 5 epochs.
W2: the EMNIST CNN of Reddi et al. 2021, clients of 50 to 350 examples, batch 20, 1 epoch.
W3: the CIFAR-10 CNN of pfl-research's benchmarks, 50 clients of 50 examples, batch 10, 1 epoch.
W4: the character LSTM of McMahan et al. 2017, 80 characters a sequence, batch 4, 1 epoch.
No dropout anywhere, so that results can be compared.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from experiments.benchmarks import handwritten, populations

PyTree = Any


class Workload(NamedTuple):
    """One federated training task, and the same model written by hand.

    Attributes:
      name: as in ``--workloads``.
      sizes: ``(seed) -> int[clients]``, examples of each client of the population.
      make_data: ``(sizes) -> FederatedData`` with the fields ``x`` and ``y``.
      model: ``() -> fl.Model``, written as a user would; it can be initialised without data.
      mean_loss: ``(params, x, y) -> float32[]``, the model by hand, on the model's own parameters.
      peer_model: ``"linear"``, ``"cnn"`` or ``"lstm"``, which the peers' runners know.
      learning_rate, batch_size, epochs: of the clients' SGD.
      cohorts: numbers of clients a round that are measured.
      gigaflop: arithmetic of an SGD step, a multiplication and an addition as two; the backward pass
        twice the forward one.
      top_level: the hand-written step runs outside a loop. XLA:CPU runs convolutions many times slower
        inside ``scan`` (jax 0.10), so that a scan would be no limit.
      made: where another process finds it, if not in this module; see :attr:`place`.
    """

    name: str
    sizes: Callable[[np.random.Generator], np.ndarray]
    make_data: Callable[[np.ndarray], fl.FederatedData]
    model: Callable[[], fl.Model]
    mean_loss: Callable[[PyTree, jax.Array, jax.Array], jax.Array]
    peer_model: str
    learning_rate: float
    batch_size: int
    epochs: int
    cohorts: tuple[int, ...]
    gigaflop: float
    top_level: bool = False
    made: tuple[Any, ...] = ()

    def data(self, whole_batches: bool = False) -> fl.FederatedData:
        """The population; with sizes rounded up to ``whole_batches``, which all frameworks do the same with."""
        sizes = self.sizes(np.random.default_rng(1))
        return self.make_data(populations.whole(sizes, self.batch_size) if whole_batches else sizes)

    def params(self) -> PyTree:
        """The model's initial parameters."""
        return self.model().init(jax.random.key(0))[0]

    def algorithm(self) -> fl.Round:
        """FedAvg on this workload."""
        optimizer = optax.sgd(self.learning_rate)
        return fedavg(self.model(), optimizer, epochs=self.epochs, batch_size=self.batch_size)

    @property
    def place(self) -> tuple[Any, ...]:
        """``(module, name)``, or ``(module, function, argument)`` that gives it: what :func:`found` takes."""
        return self.made or (__name__, self.name.upper())

    def steps(self, sizes: np.ndarray) -> int:
        """SGD steps that clients of these sizes make in a round."""
        return self.epochs * int(np.sum(-(-np.asarray(sizes) // self.batch_size)))


class CifarCNN(nn.Module):
    """pfl-research's ``simple_cnn`` (benchmarks/model/pytorch/cnn.py), as a user of Flax would write it."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (3, 3), padding="VALID", name="conv_0")(x))
        x = nn.relu(nn.Conv(64, (3, 3), padding="VALID", name="conv_1")(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(128, name="dense")(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, name="output")(x)


def cnn_gigaflop(side: int, channels: int, classes: int, batch: int) -> float:
    """Of a step of W2's and W3's network on images ``[side, side, channels]``."""
    first, second, pooled = side - 2, side - 4, (side - 4) // 2
    forward = first**2 * 32 * 9 * channels + second**2 * 64 * 9 * 32 + pooled**2 * 64 * 128 + 128 * classes
    return 2 * 3 * forward * batch / 1e9


def lstm_gigaflop(embed: int, units: int, symbols: int, length: int, batch: int) -> float:
    """Of a step of W4's network."""
    forward = 4 * units * (embed + units) + 4 * units * (2 * units) + units * symbols
    return 2 * 3 * forward * length * batch / 1e9


W1 = Workload(
    name="w1",
    sizes=lambda rng: populations.power_law_sizes(1000, 50, 1000, rng),
    make_data=populations.synthetic,
    model=lambda: fl.models.logistic_regression(10, input_shape=(60,)),
    mean_loss=handwritten.linear,
    peer_model="linear",
    learning_rate=0.01,
    batch_size=10,
    epochs=5,
    cohorts=(10, 100),
    gigaflop=2 * 3 * 60 * 10 * 10 / 1e9,
)
W2 = Workload(
    name="w2",
    sizes=lambda rng: rng.integers(50, 351, 50),
    make_data=lambda sizes: populations.images(sizes, (28, 28, 1), 62),
    model=lambda: fl.models.emnist_cnn(62, dropout=(0.0, 0.0)),
    mean_loss=handwritten.cnn(handwritten.reshaped_pool),
    peer_model="cnn",
    learning_rate=0.03,
    batch_size=20,
    epochs=1,
    cohorts=(10,),
    gigaflop=cnn_gigaflop(28, 1, 62, 20),
    top_level=True,
)
W3 = Workload(
    name="w3",
    sizes=lambda rng: np.full(100, 50),
    make_data=lambda sizes: populations.images(sizes, (32, 32, 3), 10),
    model=lambda: fl.models.from_flax(CifarCNN(), (1, 32, 32, 3), num_classes=10),
    mean_loss=handwritten.cnn(handwritten.window_pool),
    peer_model="cnn",
    learning_rate=0.03,
    batch_size=10,
    epochs=1,
    cohorts=(50,),
    gigaflop=cnn_gigaflop(32, 3, 10, 10),
    top_level=True,
)
W4 = Workload(
    name="w4",
    sizes=lambda rng: rng.integers(10, 61, 50),
    make_data=lambda sizes: populations.text(sizes, 80, 90),
    model=lambda: fl.models.char_lstm(90),
    mean_loss=handwritten.lstm,
    peer_model="lstm",
    learning_rate=0.5,
    batch_size=4,
    epochs=1,
    cohorts=(10,),
    gigaflop=lstm_gigaflop(8, 256, 90, 80, 4),
)
WORKLOADS = {w.name: w for w in (W1, W2, W3, W4)}


def found(module: str, name: str, *arguments: Any) -> Workload:
    """The workload of a :attr:`Workload.place`."""
    it = getattr(importlib.import_module(module), name)
    return it(*arguments) if arguments else it


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


def cohorts(works: list[Workload], size: int | None) -> Iterator[tuple[Workload, fl.FederatedData, np.ndarray]]:
    """Each workload, its data and a cohort's ids: for each of its own numbers of clients, or for ``size``."""
    for work in works:
        data = work.data()
        for count in work.cohorts if size is None else (size,):
            yield work, data, np.random.default_rng(0).choice(data.num_clients, count, replace=False)
