"""Rotated MNIST for IFCA's experiment: every digit turned by 0, 90, 180 and 270 degrees, a client's all alike."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

import fedjax_lab as fl

ROTATIONS = 4


class Data(NamedTuple):
    """Clients of all rotations; the test digits as clients of n digits, and each rotation's ``[digits, ...]``."""

    train: fl.FederatedData
    test: fl.FederatedData
    turned: dict[str, np.ndarray]


def digits(train: int, test: int, data_dir: str | None) -> dict[str, dict[str, np.ndarray]]:
    """MNIST in its files' order as bytes: ``x: uint8[rows, 28, 28]``, ``y: int32[rows]`` of train and test."""
    split = fl.datasets.mnist(fl.datasets.iid(1), 0, data_dir)
    found = {}
    for name, part, count in (("train", split.train, train), ("test", split.test, test)):
        x, y = (np.asarray(part.arrays[field])[:count] for field in ("x", "y"))
        if len(y) < count:
            raise ValueError(f"{name}_digits is {count}, but MNIST has {len(y)}")
        found[name] = {"x": np.rint(x[..., 0] * 255).astype(np.uint8), "y": y.astype(np.int32)}
    return found


def deal(raw: dict[str, dict[str, np.ndarray]], n: int, seed: int) -> Data:
    """Each rotation's training digits shuffled and dealt, its test digits in their order; ``n`` to a client."""
    rng, train, test = np.random.default_rng(seed), [], []
    for k in range(ROTATIONS):
        order = rng.permutation(len(raw["train"]["y"]))
        train.append({"x": np.rot90(raw["train"]["x"][order], k, (1, 2)), "y": raw["train"]["y"][order]})
        test.append({"x": np.rot90(raw["test"]["x"], k, (1, 2)), "y": raw["test"]["y"]})
    turned = jax.tree.map(lambda *parts: np.stack(parts), *test)
    return Data(_clients(train, n, "client"), _clients(test, n, "test"), turned)


def _clients(parts: Sequence[dict[str, np.ndarray]], n: int, name: str) -> fl.FederatedData:
    rows = [
        (f"{name} {k}-{i}", {field: a[i * n : (i + 1) * n] for field, a in part.items()})
        for k, part in enumerate(parts)
        for i in range(len(part["y"]) // n)
    ]
    rotation = np.repeat(np.arange(ROTATIONS, dtype=np.int32), len(rows) // ROTATIONS)
    return fl.FederatedData.from_clients(rows, {"rotation": rotation})
