"""The partitions of the personalisation study: clients who take part, and clients who come when training is over."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import fedjax_lab as fl


class Study(NamedTuple):
    """A partition, divided twice: by clients, and each client's own examples.

    Attributes:
      train, test: of the participants.
      support, newcomers: what the others learn from, and are tested on.
      classes: how many there are.
    """

    train: fl.FederatedData
    test: fl.FederatedData
    support: fl.FederatedData
    newcomers: fl.FederatedData
    classes: int


def load(name: str, config: Any) -> Study:
    """One of :data:`PARTITIONS`, with a share of its clients set apart."""
    split, classes = PARTITIONS[name](config)
    # A client counts that has something to learn from and something to be tested on.
    useful = np.flatnonzero((np.asarray(split.train.sizes) >= 4) & (np.asarray(split.test.sizes) >= 1))
    order = np.random.default_rng(config.data_seed).permutation(useful)
    cut = max(round((1 - config.newcomers) * len(order)), 1)
    seen, unseen = np.sort(order[:cut]), np.sort(order[cut:])
    if not len(unseen) or len(seen) < config.cohort_size:
        raise ValueError(
            f"{name}: of {len(order)} clients with enough examples {len(seen)} would take part and {len(unseen)} come "
            "later: give more num_clients, or another share of newcomers"
        )
    seen_train, unseen_train = (split.train.select(part) for part in (seen, unseen))
    seen_test, unseen_test = (split.test.select(part) for part in (seen, unseen))
    return Study(seen_train, seen_test, unseen_train, unseen_test, classes)


def digits(config: Any) -> tuple[fl.Split, int]:
    """Handwritten digits, of which each client has few kinds."""
    return fl.datasets.digits(fl.datasets.dirichlet(config.num_clients, config.alpha), config.data_seed), 10


def rotated(config: Any) -> tuple[fl.Split, int]:
    """Handwritten digits, which a client holds in one of four directions."""
    split = fl.datasets.digits(fl.datasets.iid(config.num_clients), config.data_seed)
    return fl.Split(*(_turned(part, (8, 8)) for part in split)), 10


def mnist(config: Any) -> tuple[fl.Split, int]:
    """MNIST, of which each client has few kinds."""
    partition = fl.datasets.dirichlet(config.num_clients, config.alpha)
    split = fl.datasets.mnist(partition, config.data_seed, config.data_dir, test_fraction=0.2)
    return _cut(split, config.most_examples), 10


def mnist_rotated(config: Any) -> tuple[fl.Split, int]:
    """MNIST, which a client holds in one of four directions."""
    split = fl.datasets.mnist(fl.datasets.iid(config.num_clients), config.data_seed, config.data_dir, test_fraction=0.2)
    return fl.Split(*(_turned(part, (28, 28)) for part in _cut(split, config.most_examples))), 10


def synthetic(config: Any) -> tuple[fl.Split, int]:
    """Synthetic(0.5, 0.5) of Li et al. 2020: every client's labels by a linear rule of its own."""
    split = fl.datasets.synthetic(0.5, 0.5, config.num_clients, seed=config.data_seed)
    return _cut(split, config.most_examples), 10


def clusters(config: Any) -> tuple[fl.Split, int]:
    """Two classes by a linear rule, which three clusters of clients have each their own of."""
    rng, features = np.random.default_rng(config.data_seed), 20
    rules = rng.normal(size=(3, features))
    clients = {}
    for k in range(config.num_clients):
        x = rng.normal(size=(int(rng.integers(15, 60)), features)).astype(np.float32)
        noisy = x @ rules[k % 3] + 0.5 * rng.normal(size=len(x))
        clients[k] = {"x": x, "y": (noisy > 0).astype(np.int32)}
    return fl.Split(*fl.FederatedData.from_clients(clients).split(0.8, config.data_seed)), 2


def ratings(config: Any) -> tuple[fl.Split, int]:
    """Whether a student rates a lecture 4 or 5 of 5; the students of ETH Zurich with most ratings."""
    both = fl.datasets.insteval(config.data_dir, seed=config.data_seed)
    many = np.sort(np.argsort(-np.asarray(both.train.sizes), kind="stable")[: config.num_clients])
    lecturers, often = np.unique(both.train.arrays["lecturer"], return_counts=True)
    popular = lecturers[np.argsort(-often, kind="stable")[:60]]

    def columns(arrays):
        hot = [arrays["lecturer"][:, None] == popular[None]]
        for name in ("student_age", "lecture_age", "service", "department"):
            hot.append(arrays[name][:, None] == np.unique(both.train.arrays[name])[None])
        return {"x": np.concatenate(hot, 1).astype(np.float32), "y": (arrays["y"] >= 4).astype(np.int32)}

    return fl.Split(*(_changed(part.select(many), lambda k, arrays: columns(arrays)) for part in both)), 2


PARTITIONS: dict[str, Callable[[Any], tuple[fl.Split, int]]] = {
    "synthetic": synthetic, "clusters": clusters, "digits": digits, "rotated": rotated, "mnist": mnist,
    "mnist_rotated": mnist_rotated, "ratings": ratings,
}  # fmt: skip


def signed(data: fl.FederatedData) -> fl.FederatedData:
    """The same examples with labels -1 and 1, as MOCHA's losses have them."""
    return _changed(data, lambda k, arrays: {"x": arrays["x"], "y": (2 * arrays["y"] - 1).astype(np.float32)})


def _cut(split: fl.Split, most: int) -> fl.Split:
    """No more than so many training examples of each client, and as many to test on as that leaves."""
    few = lambda most: lambda k, arrays: jax.tree.map(lambda a: a[:most], arrays)
    return fl.Split(_changed(split.train, few(most)), _changed(split.test, few(max(most // 2, 1))))


def _turned(data: fl.FederatedData, shape: tuple[int, int]) -> fl.FederatedData:
    """Client k's pictures turned by k quarters of a circle."""

    def turn(k, arrays):
        pictures = arrays["x"].reshape(-1, *shape)
        return {"x": np.rot90(pictures, k % 4, (1, 2)).reshape(arrays["x"].shape).copy(), "y": arrays["y"]}

    return _changed(data, turn)


def _changed(data: fl.FederatedData, change: Callable[[int, Any], Any]) -> fl.FederatedData:
    """The same clients with ``change(position, arrays)`` for their examples."""
    return fl.FederatedData.from_clients(
        [(i, change(k, jax.tree.map(np.asarray, data.client(i).arrays))) for k, i in enumerate(data.ids)]
    )
