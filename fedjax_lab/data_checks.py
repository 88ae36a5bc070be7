"""Refusals of data that can't be a federated data set; each names the client and the field."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fedjax_lab import checks


def client_pairs(clients: Any) -> list[tuple[Hashable, Any]]:
    """``(id, arrays)`` of each client, from a mapping or from pairs."""
    items = clients.items() if isinstance(clients, Mapping) else clients
    if not isinstance(items, Iterable) or hasattr(clients, "columns"):
        raise ValueError(f"clients must be a dict of ids and arrays, or pairs of them; got a {type(clients).__name__}")
    pairs = []
    for item in items:
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise ValueError(
                f"clients must be a dict {{id: arrays}} or pairs (id, arrays); entry {len(pairs)} is a "
                f"{type(item).__name__}. Without ids of their own: dict(enumerate(clients))"
            )
        pairs.append((item[0], item[1]))
    return pairs


def no_frame(tree: Any, where: str) -> None:
    """Refuse a data frame, whose columns would silently become one array, the labels among them."""
    if hasattr(tree, "columns") and hasattr(tree, "to_numpy"):
        raise ValueError(
            f"{where}: a data frame doesn't say which columns are features and which are labels; use "
            "FederatedData.from_table(frame, client=..., features=[...], label=...), or give "
            '{"x": frame[[...]].to_numpy(), "y": frame[...].to_numpy()}'
        )


_LISTS = ". Python lists are taken for trees of single numbers: np.asarray makes an array of one"
_ENCODE = "; arrays must be numeric or boolean: encode text as numbers, and fill or drop what is missing"


def not_numeric(leaf: np.ndarray) -> bool:
    """Is it of no type that JAX computes in? Some are that NumPy doesn't know, such as bfloat16."""
    if leaf.dtype.kind in "OUSMm":
        return True
    return leaf.dtype.kind == "V" and not jax.numpy.issubdtype(leaf.dtype, np.number)


def client_rows(client: Hashable, tree: Any) -> int:
    """The number of rows of one client's arrays, which must agree."""
    leaves = checks.named_leaves(tree)
    if not leaves:
        raise ValueError(f"client {client!r} has no arrays{_LISTS}")
    for name, leaf in leaves:
        if leaf.ndim == 0:
            raise ValueError(f"client {client!r}: field {name} is a scalar; give one entry per example{_LISTS}")
        if not_numeric(leaf) and leaf.size:
            raise ValueError(f"client {client!r}: field {name} has dtype {leaf.dtype}{_ENCODE}")
        if len(leaf) != len(leaves[0][1]):
            raise ValueError(
                f"client {client!r}: field {name} has {len(leaf)} rows but {leaves[0][0]} has {len(leaves[0][1])}"
            )
    return len(leaves[0][1])


def same_structure(ids: Sequence[Hashable], trees: Sequence[Any]) -> None:
    first = trees[0]
    for client, tree in zip(ids, trees, strict=True):
        if jax.tree.structure(tree) != jax.tree.structure(first):
            names = [n for n, _ in checks.named_leaves(tree)]
            raise ValueError(
                f"client {client!r} has the fields {names}, client {ids[0]!r} has "
                f"{[n for n, _ in checks.named_leaves(first)]}; all clients need the same"
            )
        for (name, a), (_, b) in zip(checks.named_leaves(tree), checks.named_leaves(first), strict=True):
            if a.shape[1:] != b.shape[1:]:
                raise ValueError(
                    f"client {client!r}: an example's field {name} has shape {a.shape[1:]}, "
                    f"client {ids[0]!r} has {b.shape[1:]}"
                )


def same_rows(arrays: Any, rows: int) -> None:
    """Refuse arrays that don't have one entry for each of so many owners."""
    for name, leaf in checks.named_leaves(arrays):
        if leaf.ndim == 0:
            raise ValueError(f"field {name} is a scalar; give one entry per row{_LISTS}")
        if len(leaf) != rows:
            raise ValueError(f"field {name} has {len(leaf)} rows, but client_ids has {rows}")
    if not rows:
        raise ValueError("a federated data set needs at least one row; client_ids is empty")


def assignment(owners: np.ndarray, arrays: Any, num_clients: int | None) -> None:
    """Refuse what doesn't give each row of ``arrays`` one of ``num_clients`` clients, or -1."""
    if owners.ndim != 1 or owners.dtype.kind not in "iu":
        raise ValueError(f"assignment must be one client number per row, int[rows]; got {checks.shown(owners)}")
    for name, leaf in checks.named_leaves(arrays):
        if np.shape(leaf)[:1] != owners.shape:
            raise ValueError(f"field {name} has shape {np.shape(leaf)}, but assignment has {len(owners)} rows")
    low, high = owners.min(initial=-1), owners.max(initial=-1)
    if low < -1 or (num_clients is not None and high >= num_clients):
        known = "from 0" if num_clients is None else f"0..{num_clients - 1}"
        raise ValueError(f"assignment has a client number {low if low < -1 else high}; they must be {known}, or -1")


def positions(indices: Any, num_clients: int) -> np.ndarray:
    """Distinct positions in a population, ``int64[n]``, from integers or a mask; everything else is refused."""
    found = np.asarray(indices)
    if found.dtype == bool and found.shape == (num_clients,):
        found = np.flatnonzero(found)
    if found.ndim != 1 or not found.size or found.dtype.kind not in "iu":
        raise ValueError(f"clients' positions must be a non-empty list of integers; got {checks.shown(indices)}")
    outside = found[(found < 0) | (found >= num_clients)]
    if outside.size:
        raise ValueError(f"client position {outside[0]} is outside the population 0..{num_clients - 1}")
    checks.unique_ids(found.tolist())
    return found.astype(np.int64)


def device_dtype(leaf: np.ndarray, name: str) -> np.ndarray:
    """A field in the 32-bit type that JAX would give it. Raises for what isn't numeric or doesn't fit."""
    if not_numeric(leaf):
        raise ValueError(f"field {name} has dtype {leaf.dtype}{_ENCODE}")
    target = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if target == leaf.dtype:
        return leaf
    if leaf.dtype.kind in "iu" and leaf.size:
        info = np.iinfo(target)
        if leaf.min() < info.min or leaf.max() > info.max:
            values = f"{leaf.dtype} values from {leaf.min()} to {leaf.max()}"
            raise ValueError(f"field {name} has {values}, which do not fit {target}")
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and is then named by finite()
        return leaf.astype(target)


def finite(data: Any) -> None:
    """Raise for the first NaN or infinite value of a FederatedData, with its field, client and row."""
    for name, leaf in checks.named_leaves(data.arrays):
        if not jax.numpy.issubdtype(leaf.dtype, np.inexact) or np.isfinite(np.sum(leaf)):
            continue
        bad = ~np.isfinite(leaf).reshape(len(leaf), -1).all(1)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            k = int(np.searchsorted(np.cumsum(data.sizes), row, side="right"))
            raise ValueError(
                f"field {name} of client {data.ids[k]!r}, row {row - int(data.starts[k])}, is NaN, infinite or too "
                f"large for {leaf.dtype} ({int(bad.sum())} such rows in all); clean or drop them first"
            )
