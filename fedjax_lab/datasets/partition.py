"""Partitioners: which client gets which row of a centrally stored data set.

Each function here takes hyper-parameters and returns ``partition(columns, seed) -> assignment``:
``columns`` maps field names to arrays ``[rows, ...]`` with the labels under ``"y"``; the assignment
is ``int64[rows]``, a client number for each row or -1 for a row left out. It is a pure function of
the columns and the seed, and gives every client at least one row. A partitioner of your own is any
function with this signature. Pachinko allocation is in :mod:`fedjax_lab.datasets.pachinko_allocation`.
"""

from collections.abc import Callable

import numpy as np

from fedjax_lab import checks
from fedjax_lab.datasets.allocating import (
    Columns,
    apportion,
    column,
    deal,
    draw_without_replacement,
    even_sizes,
    generator,
    label_codes,
    num_rows,
)  # fmt: skip

Partition = Callable[[Columns, int], np.ndarray]

_REDRAWS = 20


def iid(num_clients: int) -> Partition:
    """Rows at random, the same number for every client to within one."""
    checks.positive(num_clients, "num_clients", integer=True)

    def partition(columns: Columns, seed: int) -> np.ndarray:
        n = num_rows(columns, num_clients)
        return deal(generator(seed).permutation(n), even_sizes(n, num_clients))

    return partition


def dirichlet(
    num_clients: int,
    alpha: float,
    *,
    min_size: int = 2,
    equal_sizes: bool = False,
    field: str = "y",
) -> Partition:
    """Label skew: Dirichlet-distributed label shares, the smaller ``alpha`` the more uneven.

    Two forms are in use:

    - ``equal_sizes=False``: each class is divided among the clients with shares drawn from
      ``Dir(alpha)`` over clients, so that sizes differ as well. Clients that already hold
      ``rows / num_clients`` get no more, as in NIID-Bench's code (Li et al. 2022, "Federated
      Learning on Non-IID Data Silos", label distribution skew; also FedLab's).
    - ``equal_sizes=True``: each client draws its label shares from ``Dir(alpha * p)``, ``p``
      being the labels' shares of all rows (they sum to 1), and then ``rows / num_clients`` rows
      without replacement; a class that has run out is dropped and the rest renormalised. The last
      clients get what is left. (Hsu, Qi and Brown 2019, "Measuring the Effects of Non-Identical
      Data Distribution", section 3.)

    Args:
      num_clients: how many.
      alpha: concentration, positive; 0.1 is strong skew, 100 hardly any.
      min_size: rows that every client gets at least. A draw that leaves someone with fewer is
        repeated 20 times, and then repaired: rows move, at random, from the largest client to the
        smallest. By default 2, one to train and one to test.
      equal_sizes: which form.
      field: the labels' field.

    Raises:
      ValueError: alpha is not positive, no integer labels, fewer than ``num_clients * min_size``
        rows.
    """
    checks.positive(num_clients, "num_clients", integer=True)
    checks.positive(alpha, "alpha")
    checks.positive(min_size, "min_size", integer=True)
    draw = _dirichlet_over_labels if equal_sizes else _dirichlet_over_clients

    def partition(columns: Columns, seed: int) -> np.ndarray:
        n = num_rows(columns, num_clients, min_size)
        codes = label_codes(columns, field)
        rng = generator(seed)
        owners = np.zeros(n, np.int64)
        for _ in range(_REDRAWS):
            owners = draw(rng, codes, num_clients, alpha)
            if np.bincount(owners, minlength=num_clients).min() >= min_size:
                return owners
        return _top_up(rng, owners, num_clients, min_size)

    return partition


def _dirichlet_over_clients(rng, codes, num_clients, alpha) -> np.ndarray:
    owners = np.empty(len(codes), np.int64)
    held = np.zeros(num_clients)
    for label in range(codes.max() + 1):
        rows = rng.permutation(np.flatnonzero(codes == label))
        shares = rng.dirichlet(np.full(num_clients, alpha)) * (held < len(codes) / num_clients)
        counts = apportion(len(rows), shares)
        owners[rows] = np.repeat(np.arange(num_clients), counts)
        held += counts
    return owners


def _dirichlet_over_labels(rng, codes, num_clients, alpha) -> np.ndarray:
    owners = np.empty(len(codes), np.int64)
    pools = [rng.permutation(np.flatnonzero(codes == c)) for c in range(codes.max() + 1)]
    left = np.array([len(p) for p in pools])
    prior = left / left.sum()
    for client, size in enumerate(even_sizes(len(codes), num_clients)):
        counts = draw_without_replacement(rng, size, rng.dirichlet(alpha * prior), left)
        for label in np.flatnonzero(counts):
            owners[pools[label][left[label] - counts[label] : left[label]]] = client
        left = left - counts
    return owners


def dirichlet_sizes(num_clients: int, alpha: float, *, min_size: int = 1) -> Partition:
    """Quantity skew: rows at random, client sizes with shares drawn from ``Dir(alpha)``.

    Every client has ``min_size`` rows to begin with; the shares divide the rest. Source: NIID-Bench
    (Li et al. 2022, quantity skew), which redraws instead of setting rows aside.
    """
    checks.positive(num_clients, "num_clients", integer=True)
    checks.positive(alpha, "alpha")
    checks.positive(min_size, "min_size", integer=True)

    def partition(columns: Columns, seed: int) -> np.ndarray:
        n = num_rows(columns, num_clients, min_size)
        rng = generator(seed)
        shares = rng.dirichlet(np.full(num_clients, alpha))
        sizes = min_size + apportion(n - num_clients * min_size, shares)
        return deal(rng.permutation(n), sizes)

    return partition


def shards(num_clients: int, shards_per_client: int = 2, *, field: str = "y") -> Partition:
    """The pathological split: rows sorted by label, cut into equal shards, a few for each client.

    Most clients hold ``shards_per_client`` labels at most (a shard that straddles two labels adds
    one). Shards are equal to within one row. Source: McMahan et al. 2017, section 3.
    """
    checks.positive(num_clients, "num_clients", integer=True)
    checks.positive(shards_per_client, "shards_per_client", integer=True)

    def partition(columns: Columns, seed: int) -> np.ndarray:
        n = num_rows(columns, num_clients, shards_per_client)
        rng = generator(seed)
        order = np.lexsort((rng.random(n), label_codes(columns, field)))
        count = num_clients * shards_per_client
        shard = np.repeat(np.arange(count), even_sizes(n, count))
        owners = np.empty(n, np.int64)
        owners[order] = (rng.permutation(count) // shards_per_client)[shard]
        return owners

    return partition


def power_law(
    num_clients: int = 1000,
    *,
    labels_per_client: int = 2,
    sigma: float = 2.0,
    min_per_label: int = 5,
    field: str = "y",
) -> Partition:
    """A few labels for each client and heavy-tailed sizes, as FedProx divides MNIST.

    Client ``k`` holds the labels ``k, k+1, ... k + labels_per_client - 1`` (modulo the number of
    labels), ``min_per_label`` rows of each; the rest of a label's rows is divided among its
    holders in proportion to lognormal(0, ``sigma``) weights. Source: Li et al. 2020, "Federated
    Optimization in Heterogeneous Networks", appendix, and its repository (which also
    standardises the pixels, pools the official train and test rows, splits each client 90/10 and
    rounds all shares down).
    """
    checks.positive(num_clients, "num_clients", integer=True)
    checks.positive(labels_per_client, "labels_per_client", integer=True)
    checks.positive(sigma, "sigma")
    checks.positive(min_per_label, "min_per_label", integer=True)

    def partition(columns: Columns, seed: int) -> np.ndarray:
        n = num_rows(columns, num_clients, labels_per_client)
        codes, rng = label_codes(columns, field), generator(seed)
        labels = int(codes.max()) + 1
        if labels_per_client > labels:
            raise ValueError(f"labels_per_client is {labels_per_client}, but the rows have only {labels} labels")
        owners = np.full(n, -1, np.int64)
        slots = np.arange(num_clients)[:, None] + np.arange(labels_per_client)
        for label in range(labels):
            holders = np.flatnonzero((slots % labels == label).any(1))
            rows = rng.permutation(np.flatnonzero(codes == label))
            spare = len(rows) - min_per_label * len(holders)
            if spare < 0:
                raise ValueError(
                    f"{len(holders)} clients need {min_per_label} rows of label {label} each, but "
                    f"there are only {len(rows)}; take fewer clients or a smaller min_per_label"
                )
            if len(holders):  # with fewer clients than labels, some rows belong to nobody
                counts = min_per_label + apportion(spare, rng.lognormal(0, sigma, len(holders)))
                owners[rows] = np.repeat(holders, counts)
        return owners

    return partition


def by_attribute(field: str) -> Partition:
    """The natural partition: one client for each value of a field, in the values' order."""

    def partition(columns: Columns, seed: int) -> np.ndarray:
        num_rows(columns, 1)
        values = column(columns, field)
        if values.ndim != 1:
            raise ValueError(f"field {field!r} must hold one value a row; its shape is {values.shape}")
        return np.unique(values, return_inverse=True)[1].astype(np.int64)

    return partition


def match(train_columns: Columns, train_assignment: np.ndarray, *, field: str = "y") -> Partition:
    """For an official test set: every client's test labels are distributed as its training labels.

    A test row of label ``c`` goes to a client drawn with probability proportional to the client's
    training rows of label ``c``. Rows of a label that nobody trains on, and all rows where labels
    aren't integers, are drawn in proportion to the clients' sizes. A client may end up without a
    row.
    """
    owners = np.asarray(train_assignment)
    kept = owners >= 0
    if not kept.any():
        raise ValueError("the training assignment gives no row to any client")
    count = int(owners.max()) + 1
    sizes = np.bincount(owners[kept], minlength=count)

    def partition(columns: Columns, seed: int) -> np.ndarray:
        n = num_rows(columns, 1)
        rng = generator(seed, stream=1)
        train, test = column(train_columns, field), column(columns, field)
        if train.dtype.kind not in "iu" or train.ndim != 1:
            return rng.choice(count, n, p=sizes / sizes.sum())
        out = np.empty(n, np.int64)
        for label in np.unique(test):
            rows = np.flatnonzero(test == label)
            held = np.bincount(owners[kept & (train == label)], minlength=count)
            held = held if held.any() else sizes
            out[rows] = rng.choice(count, len(rows), p=held / held.sum())
        return out

    return partition


def _top_up(rng, owners: np.ndarray, num_clients: int, min_size: int) -> np.ndarray:
    """Move random rows from the largest client to the smallest until all have ``min_size``."""
    rows = [list(rng.permutation(np.flatnonzero(owners == k))) for k in range(num_clients)]
    sizes = np.array([len(r) for r in rows])
    while sizes.min() < min_size:
        poor, rich = int(sizes.argmin()), int(sizes.argmax())
        row = rows[rich].pop()
        rows[poor].append(row)
        owners[row] = poor
        sizes[poor] += 1
        sizes[rich] -= 1
    return owners
