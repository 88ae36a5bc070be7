"""Pachinko allocation: label skew over a hierarchy of labels, as in federated CIFAR-100."""

from collections.abc import Mapping

import numpy as np

from fedjax_lab import checks
from fedjax_lab.datasets import allocating
from fedjax_lab.datasets.partition import Partition


def pachinko(
    num_clients: int,
    alpha: float = 0.1,
    beta: float = 10.0,
    *,
    coarse: str | Mapping[int, int] = "coarse_label",
    size: int | None = None,
    field: str = "y",
) -> Partition:
    """Each client prefers some coarse labels, and within each of them some fine labels.

    A client draws shares of the coarse labels from ``Dir(alpha)`` and, for each coarse label,
    shares of its fine labels from ``Dir(beta)``, once. Each of its rows is then drawn by going
    down this
    tree: a coarse label, a fine label, a row of it that nobody has yet. A fine label that has run
    out leaves its branch and the branch is renormalised; an empty branch leaves the root. Clients
    draw one after the other, so that the last ones choose among what is left.

    With ``alpha=0.1, beta=10`` and 500 clients of 100 rows it is the federated CIFAR-100 of Reddi
    et al. 2021, "Adaptive Federated Optimization", appendix F; the model is Li and McCallum 2006.

    Args:
      num_clients: how many.
      alpha: concentration over coarse labels.
      beta: concentration over the fine labels of a coarse one.
      coarse: the field that holds each row's coarse label, or a mapping ``{fine: coarse}``.
      size: rows of each client; by default ``rows // num_clients``. What nobody draws is left out.
      field: the fine labels' field.

    Raises:
      ValueError: a concentration that isn't positive, too few rows, a fine label without a coarse
        one, or with several.
    """
    checks.positive(num_clients, "num_clients", integer=True)
    checks.positive(alpha, "alpha")
    checks.positive(beta, "beta")
    if size is not None:
        checks.positive(size, "size", integer=True)

    def partition(columns: allocating.Columns, seed: int) -> np.ndarray:
        n = allocating.num_rows(columns, num_clients, size or 1)
        fine = allocating.label_codes(columns, field)
        tree = _tree(columns, fine, coarse, field)
        rng = allocating.generator(seed)
        pools = [rng.permutation(np.flatnonzero(fine == f)) for f in range(fine.max() + 1)]
        left = np.array([len(pool) for pool in pools])
        owners = np.full(n, -1, np.int64)
        for client in range(num_clients):
            counts = _draw(rng, size or n // num_clients, tree, left, alpha, beta)
            for f in np.flatnonzero(counts):
                owners[pools[f][left[f] - counts[f] : left[f]]] = client
            left = left - counts
        return owners

    return partition


def _draw(rng, size: int, tree: list[np.ndarray], left, alpha: float, beta: float) -> np.ndarray:
    """How many rows of each fine label one client draws, ``int[fine labels]``."""
    counts = np.zeros(len(left), np.int64)
    below = np.array([left[leaves].sum() for leaves in tree])
    root = rng.dirichlet(np.full(len(tree), alpha))
    branches = [rng.dirichlet(np.full(len(leaves), beta)) for leaves in tree]
    drawn = allocating.draw_without_replacement(rng, size, root, below)
    for leaves, shares, number in zip(tree, branches, drawn, strict=True):
        counts[leaves] = allocating.draw_without_replacement(rng, int(number), shares, left[leaves])
    return counts


def _tree(columns, fine: np.ndarray, coarse, field: str) -> list[np.ndarray]:
    """The fine labels' codes under each coarse label."""
    values, first = np.unique(fine, return_index=True)
    names = allocating.column(columns, field)[first]
    if isinstance(coarse, str):
        parents = allocating.label_codes(columns, coarse)
        mixed = np.flatnonzero(parents != parents[first][fine])
        if len(mixed):
            label = allocating.column(columns, field)[mixed[0]]
            raise ValueError(f"label {label} of field {field!r} has more than one coarse label in {coarse!r}")
        parents = parents[first]
    else:
        missing = [int(name) for name in names if int(name) not in coarse]
        if missing:
            raise ValueError(f"coarse names no coarse label for the labels {missing[:10]}")
        parents = np.array([coarse[int(name)] for name in names])
    return [values[parents == parent] for parent in np.unique(parents)]
