"""MNIST as the authors of pFedMe divide it among 20 clients, row for row.

Their published script (generate_niid_20users.py, in the version of the paper: it gives the sizes of 1,165 to 3,834
training examples that the paper states) draws a number of rows for each client and label, and then takes that many
from the label's first row on: clients that share a label share most of its images, and one client's test digits are
among another's training digits. Where it begins with the second row instead, an image is missing, and one digit of the
client has the other label.
"""

import random

import numpy as np

import fedjax_lab as fl

CLIENTS = 20
PIXELS = 784
_TRAIN = 0.75


def load(data_dir: str | None = None) -> fl.Split:
    """The clients' training and test digits, standardised pixel by pixel."""
    x, y = pooled(data_dir)
    return divide(standardised(x), y)


def pooled(data_dir: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """All 70,000 digits in the files' order: ``float32[70000, 784]`` from 0 to 255, and the labels."""
    together = lambda columns, seed: np.zeros(len(columns["y"]), np.int64)
    train, test = fl.datasets.mnist(together, 0, data_dir)
    arrays = [{name: np.asarray(a) for name, a in part.client(0).arrays.items()} for part in (train, test)]
    x, y = (np.concatenate([part[name] for part in arrays]) for name in ("x", "y"))
    return x.reshape(len(x), -1) * np.float32(255), y


def standardised(x: np.ndarray) -> np.ndarray:
    """Each pixel with mean 0 and standard deviation 1 over all digits, as the authors' scripts have it."""
    return (x - x.mean(0, dtype=np.float64).astype(np.float32)) / (x.std(0, dtype=np.float64) + 0.001).astype(
        np.float32
    )


def divide(x: np.ndarray, y: np.ndarray) -> fl.Split:
    """Rows and labels of each client, as the script's own generators draw them."""
    of_label = [np.flatnonzero(y == label) for label in range(10)]
    numbers = _numbers([len(rows) for rows in of_label])
    skip = [bool(label == 9) for label in y[:10]]  # a mask of nines, which the script goes on to count with
    shuffler = random.Random(1)
    parts: tuple[list, list] = ([], [])
    for k in range(CLIENTS):
        rows, labels = [], []
        for j in (0, 1):
            label, count = (k + j) % 10, numbers[k][j]
            rows.extend(of_label[label][int(skip[label]) : count])
            labels.extend([label] * count)
            skip[label] = True
        order = list(zip(rows, labels, strict=False))
        shuffler.shuffle(order)
        cut = int(_TRAIN * len(order))
        for part, own in zip(parts, (order[:cut], order[cut:]), strict=True):
            chosen = np.array([row for row, _ in own])
            part.append((k, {"x": x[chosen], "y": np.array([label for _, label in own], np.int32)}))
    return fl.Split(*(fl.FederatedData.from_clients(part) for part in parts))


def _numbers(totals: list[int]) -> list[list[int]]:
    """How many rows each client has of its two labels: every label's are shared out among four clients."""
    rng, each = np.random.RandomState(1), []
    for total in totals:
        drawn = []
        for _ in range(3):
            drawn.append(int(rng.randint(total // 5, total // 2)))
            total -= drawn[-1]
        each.append([*drawn, total])
    flat = [own[i] for i in range(4) for own in each]
    return [flat[2 * k : 2 * k + 2] for k in range(CLIENTS)]
