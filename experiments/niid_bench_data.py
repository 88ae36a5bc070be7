"""NIID-Bench's MNIST: how its digits are dealt, and its convolutional network."""

import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import fedjax_lab as fl

CLIENTS = 10
PARTITIONS = ("iid", "dirichlet", "labels2")
PARAMETERS = 44_426  # 156 + 2,416 + 30,840 + 10,164 + 850


def load(partition: str, seed: int, data_dir: str | None, examples: int, alpha: float) -> fl.Split:
    """MNIST dealt to ten clients, and its test digits in one piece.

    Args:
      partition: ``"iid"``, ``"dirichlet"`` or ``"labels2"``.
      seed: of the partition.
      data_dir: see :func:`fedjax_lab.datasets.mnist`.
      examples: how many training digits are used, drawn at random.
      alpha: the Dirichlet distribution's parameter.
    """
    deal = {
        "iid": lambda: fl.datasets.iid(CLIENTS),
        "dirichlet": lambda: fl.datasets.dirichlet(CLIENTS, alpha, min_size=10),
        "labels2": lambda: labels_each(CLIENTS, 2),
    }[partition]()
    split = fl.datasets.mnist(some(deal, examples), seed, data_dir)
    return fl.Split(split.train, fl.FederatedData.from_clients({"test": split.test.arrays}))


def labels_each(num_clients: int, labels: int) -> fl.datasets.Partition:
    """Each client has a few labels: one by its number, the others at random; a label's rows are shared evenly.

    Li et al., "Federated Learning on Non-IID Data Silos: An Experimental Study", ICDE 2022, section 4.1, quantity-based
    label imbalance (#C = k). A label that no client has is left out.
    """
    fl.checks.positive(num_clients, "num_clients", integer=True)
    fl.checks.positive(labels, "labels", integer=True)

    def partition(columns, seed):
        y = np.asarray(columns["y"])
        classes = np.unique(y)
        if labels > len(classes):
            raise ValueError(f"labels={labels} for each client are more than the {len(classes)} that there are")
        rng = np.random.default_rng([seed, 0x211D])
        held = []
        for k in range(num_clients):
            first = k % len(classes)
            others = np.delete(np.arange(len(classes)), first)
            held.append({first, *rng.choice(others, labels - 1, replace=False).tolist()})
        owners = np.full(len(y), -1, np.int64)
        for c, label in enumerate(classes):
            holders = [k for k in range(num_clients) if c in held[k]]
            rows = rng.permutation(np.flatnonzero(y == label))
            for k, part in zip(holders, np.array_split(rows, max(len(holders), 1)), strict=False):
                owners[part] = k
        return owners

    return partition


def some(deal: fl.datasets.Partition, examples: int) -> fl.datasets.Partition:
    """The same partition of ``examples`` rows at random, at least one for each client."""

    def partition(columns, seed):
        owners = deal(columns, seed)
        if examples >= len(owners):
            return owners
        order = np.random.default_rng([seed, 0x50E]).permutation(len(owners))
        _, firsts = np.unique(owners[order], return_index=True)
        kept = np.union1d(order[firsts], order[: max(examples - len(firsts), 0)])
        out = np.full_like(owners, -1)
        out[kept] = owners[kept]
        return out

    return partition


class Network(nn.Module):
    """conv 5x5x6, pool, conv 5x5x16, pool, dense 120, dense 84, scores; no padding, ReLU, PyTorch's initialisation."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, channels in enumerate((6, 16)):
            start = uniform(25 * x.shape[-1])
            x = nn.Conv(channels, (5, 5), padding="VALID", kernel_init=start, bias_init=start, name=f"conv_{i}")(x)
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for i, units in enumerate((120, 84, 10)):
            start = uniform(x.shape[-1])
            x = nn.Dense(units, kernel_init=start, bias_init=start, name=f"dense_{i}")(x if i == 0 else nn.relu(x))
        return x


def uniform(inputs: int) -> Any:
    """An initialiser between ``-1/sqrt(inputs)`` and ``1/sqrt(inputs)``."""
    bound = 1 / math.sqrt(inputs)
    return lambda key, shape, dtype=np.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def network() -> fl.Model:
    """The benchmark's simple CNN for MNIST, of 44,426 parameters."""
    return fl.models.from_flax(Network(), (1, 28, 28, 1), num_classes=10)
