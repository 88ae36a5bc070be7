"""What partitioners share: random generators, checked columns, whole-number shares, drawing."""

from collections.abc import Mapping

import numpy as np

from fedjax_lab import checks

Columns = Mapping[str, np.ndarray]


def generator(seed: int, stream: int = 0) -> np.random.Generator:
    """Partitions draw from their own stream: a split by the same seed is independent."""
    return np.random.default_rng([seed, 0xFED, stream])


def column(columns: Columns, field: str) -> np.ndarray:
    """A field's array. ValueError with the fields there are, and the nearest."""
    if field not in columns:
        raise ValueError(f"there is no field {field!r} among {sorted(columns)}{checks.nearest(field, columns)}")
    return np.asarray(columns[field])


def num_rows(columns: Columns, num_clients: int, each: int = 1) -> int:
    """The number of rows; ValueError if fields differ in length or clients can't have ``each``."""
    if not columns:
        raise ValueError("there are no columns to partition")
    lengths = {name: len(values) for name, values in columns.items()}
    n = next(iter(lengths.values()))
    for name, length in lengths.items():
        if length != n:
            raise ValueError(f"field {name!r} has {length} rows but {next(iter(lengths))!r} has {n}")
    if n < num_clients * each:
        need = f"{num_clients} clients" + (f" with {each} rows each" if each > 1 else "")
        raise ValueError(f"{n} rows can't be divided among {need}")
    return n


def label_codes(columns: Columns, field: str) -> np.ndarray:
    """The labels as ``0..labels-1``, in the order of their values."""
    y = column(columns, field)
    if y.ndim != 1 or y.dtype.kind not in "iub":
        raise ValueError(
            f"field {field!r} must hold one integer label a row; it has dtype {y.dtype} and shape {y.shape}"
        )
    return np.unique(y, return_inverse=True)[1]


def apportion(total: int, weights: np.ndarray) -> np.ndarray:
    """Whole numbers that sum to ``total`` in proportion to the weights (largest remainders)."""
    weights = np.asarray(weights, np.float64)
    if not weights.sum() > 0:  # every weight underflowed
        weights = np.ones_like(weights)
    exact = total * weights / weights.sum()
    counts = np.floor(exact).astype(np.int64)
    rest = total - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    return counts


def draw_without_replacement(rng, size: int, weights: np.ndarray, left: np.ndarray) -> np.ndarray:
    """How many of ``size`` draws fall on each kind, ``left`` being how many of each there are.

    The law of drawing one by one and renormalising the weights whenever a kind has run out.
    """
    counts = np.zeros(len(left), np.int64)
    size = min(size, int(left.sum()))
    while counts.sum() < size:
        open_weights = np.where(counts < left, weights, 0.0)
        if not open_weights.sum() > 0:  # the rest has weight zero in floating point
            open_weights = left - counts
        draws = rng.multinomial(size - counts.sum(), open_weights / open_weights.sum())
        counts = np.minimum(counts + draws, left)
    return counts


def even_sizes(total: int, parts: int) -> np.ndarray:
    """``total`` in ``parts`` whole numbers that differ by one at most."""
    return np.diff(np.arange(parts + 1) * total // parts)


def deal(order: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The owners of all rows when client ``k`` gets the next ``sizes[k]`` rows of ``order``."""
    owners = np.empty(len(order), np.int64)
    owners[order] = np.repeat(np.arange(len(sizes)), sizes)
    return owners
