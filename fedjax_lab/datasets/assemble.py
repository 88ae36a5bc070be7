"""From central columns and a partitioner to a federated train and test set."""

import numpy as np

from fedjax_lab import checks
from fedjax_lab.data import FederatedData, Split
from fedjax_lab.datasets.allocating import Columns, num_rows
from fedjax_lab.datasets.partition import Partition, match


def to_split(
    train: Columns,
    test: Columns | None,
    partition: Partition,
    seed: int,
    test_fraction: float | None = None,
) -> Split:
    """Partition a central data set.

    Args:
      train: arrays ``[rows, ...]`` by field.
      test: the official test rows, in the same fields, or ``None``.
      partition: a partitioner (:mod:`fedjax_lab.datasets.partition`).
      seed: of the partition and of the split.
      test_fraction: ``None`` keeps the official test rows for testing and gives them to clients
        so that test labels are distributed as a client's training labels. A number pools all rows,
        partitions them, and keeps that share of every client's rows for testing. Needed without
        official test rows.

    Returns:
      ``Split(train, test)`` over the same clients, with ids ``0..clients-1``.
    """
    if test is not None and test_fraction is None:
        owners = assign(partition, train, seed)
        count = int(owners.max()) + 1
        test_owners = match(train, owners)(test, seed)
        return Split(
            FederatedData.from_assignment(dict(train), owners, count),
            FederatedData.from_assignment(dict(test), test_owners, count),
        )
    if test_fraction is None:
        raise ValueError("there are no official test rows: give test_fraction, for instance 0.2")
    checks.shares(test_fraction)
    pooled = train
    if test is not None:
        pooled = {name: np.concatenate([train[name], test[name]]) for name in train}
    data = FederatedData.from_assignment(dict(pooled), assign(partition, pooled, seed))
    return Split(*data.split(1 - test_fraction, seed))


def assign(partition: Partition, columns: Columns, seed: int) -> np.ndarray:
    """What a partitioner (perhaps the user's own) answers, checked."""
    rows = num_rows(columns, 1)
    if not callable(partition):
        raise ValueError(f"partition must be a partitioner, such as iid(100); got {checks.shown(partition)}")
    checks.not_negative(seed, "seed", integer=True)
    owners = np.asarray(partition(columns, seed))
    if owners.shape != (rows,) or owners.dtype.kind not in "iu":
        raise ValueError(
            f"a partition must be integers of shape ({rows},), a client number for each row; "
            f"got {owners.dtype} of shape {owners.shape}"
        )
    if owners.min() < -1 or owners.max() < 0:
        raise ValueError("a partition's client numbers go from 0; -1 leaves a row out, but not every row")
    return owners
