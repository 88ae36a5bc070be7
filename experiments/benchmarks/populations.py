"""Made-up clients of the right sizes and shapes. The examples' values do not matter for speed."""

import numpy as np

import fedjax_lab as fl


def power_law_sizes(clients: int, low: int, high: int, rng: np.random.Generator) -> np.ndarray:
    """Sizes whose density falls as the square, between ``low`` and ``high``; ``int[clients]``."""
    share = rng.random(clients)
    return np.floor(1 / (1 / low - share * (1 / low - 1 / (high + 1)))).astype(int)


def whole(sizes: np.ndarray, batch_size: int) -> np.ndarray:
    """Sizes rounded up to whole batches."""
    return -(-np.asarray(sizes) // batch_size) * batch_size


def synthetic(sizes: np.ndarray, features: int = 60, classes: int = 10) -> fl.FederatedData:
    """Synthetic(1, 1) (Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020,
    section 5.1): ``x: float[features]``, ``y`` in ``0..classes-1``.
    """
    rng = np.random.default_rng(0)
    scale = np.sqrt(np.arange(1, features + 1) ** -1.2)
    rows = {}
    for k, size in enumerate(sizes):
        mean, center = rng.normal(size=2)
        weights = rng.normal(mean, 1, (features, classes))
        x = rng.normal(rng.normal(center, 1, features), scale, (size, features))
        y = np.argmax(x @ weights + rng.normal(mean, 1, classes), axis=1)
        rows[k] = {"x": x.astype(np.float32), "y": y.astype(np.int32)}
    return fl.FederatedData.from_clients(rows)


def images(sizes: np.ndarray, shape: tuple[int, int, int], classes: int) -> fl.FederatedData:
    """Images of noise about a blurred pattern for each class, ``x: float[shape]``, and their classes."""
    rng = np.random.default_rng(0)
    coarse = rng.random((classes, -(-shape[0] // 4), -(-shape[1] // 4), shape[2]), np.float32)
    patterns = coarse.repeat(4, axis=1).repeat(4, axis=2)[:, : shape[0], : shape[1]]
    y = rng.integers(0, classes, int(np.sum(sizes)))
    x = 0.5 * patterns[y] + 0.5 * rng.random((len(y), *shape), np.float32)
    return fl.FederatedData.from_assignment({"x": x, "y": y.astype(np.int32)}, np.repeat(np.arange(len(sizes)), sizes))


def text(sizes: np.ndarray, length: int, symbols: int) -> fl.FederatedData:
    """Sequences of ``length`` characters ``1..symbols-1``, mostly each followed by the same other, and no padding.

    ``y`` is ``x`` one character later.
    """
    rng = np.random.default_rng(0)
    follows = rng.permutation(np.arange(1, symbols))
    rows = int(np.sum(sizes))
    characters = [rng.integers(1, symbols, rows)]
    for _ in range(length):
        usual = follows[characters[-1] - 1]
        characters.append(np.where(rng.random(rows) < 0.7, usual, rng.integers(1, symbols, rows)))
    line = np.stack(characters, axis=1).astype(np.int32)
    return fl.FederatedData.from_assignment(
        {"x": line[:, :-1], "y": line[:, 1:]}, np.repeat(np.arange(len(sizes)), sizes)
    )
