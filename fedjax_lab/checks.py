"""Refusals of bad input: each says what is wrong, where, and what to do, before anything expensive."""

import difflib
import importlib
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known name most like ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(known)[:100_000], n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def optional(module: str, purpose: str, extra: str = "data") -> Any:
    """Import a package that only some users need; its absence names the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.split(".")[0]
        raise ImportError(f"{purpose} needs {name} ({error}): pip install 'fedjax-lab[{extra}]'") from error


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """``(name, leaf)`` of every leaf; the name is its path, ``x`` or ``inputs/tokens``."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(path_name(path), leaf) for path, leaf in flat]


def path_name(path: tuple) -> str:
    """A pytree path as words with slashes, ``Dense_0/kernel``."""
    words = (getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))) for p in path)
    return "/".join(str(w) for w in words) or "(the array)"


def label_leaf(arrays: Any) -> Any | None:
    """The integer labels ``[rows]`` under ``"y"``, if there are any."""
    y = arrays.get("y") if isinstance(arrays, dict) else None
    return y if y is not None and np.issubdtype(y.dtype, np.integer) and y.ndim == 1 else None


def unique_ids(ids: Sequence[Hashable]) -> None:
    seen: set[Hashable] = set()
    for client in ids:
        if client in seen:
            raise ValueError(f"client id {client!r} occurs more than once; ids must be unique")
        seen.add(client)


def client_rows(client: Hashable, tree: Any) -> int:
    """The number of rows of one client's arrays, which must agree."""
    leaves = named_leaves(tree)
    if not leaves:
        raise ValueError(f"client {client!r} has no arrays")
    for name, leaf in leaves:
        if leaf.ndim == 0:
            raise ValueError(f"client {client!r}: field {name} is a scalar; give one entry per example")
        if len(leaf) != len(leaves[0][1]):
            raise ValueError(
                f"client {client!r}: field {name} has {len(leaf)} rows but {leaves[0][0]} has {len(leaves[0][1])}"
            )
    return len(leaves[0][1])


def same_structure(ids: Sequence[Hashable], trees: Sequence[Any]) -> None:
    first = trees[0]
    for client, tree in zip(ids, trees, strict=True):
        if jax.tree.structure(tree) != jax.tree.structure(first):
            names = [n for n, _ in named_leaves(tree)]
            raise ValueError(
                f"client {client!r} has the fields {names}, client {ids[0]!r} has "
                f"{[n for n, _ in named_leaves(first)]}; all clients need the same"
            )
        for (name, a), (_, b) in zip(named_leaves(tree), named_leaves(first), strict=True):
            if a.shape[1:] != b.shape[1:]:
                raise ValueError(
                    f"client {client!r}: an example's field {name} has shape {a.shape[1:]}, "
                    f"client {ids[0]!r} has {b.shape[1:]}"
                )


def device_dtype(leaf: np.ndarray) -> np.ndarray:
    """A leaf in the 32-bit type that JAX would give it. Raises for what isn't numeric or doesn't fit."""
    if leaf.dtype == object or leaf.dtype.kind in "USMmV":
        raise ValueError(f"arrays must be numeric or boolean; got dtype {leaf.dtype}: encode it first")
    target = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if target == leaf.dtype:
        return leaf
    if leaf.dtype.kind in "iu" and leaf.size:
        info = np.iinfo(target)
        if leaf.min() < info.min or leaf.max() > info.max:
            raise ValueError(f"{leaf.dtype} values from {leaf.min()} to {leaf.max()} do not fit {target}")
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and is then named by finite()
        return leaf.astype(target)


def finite(data: Any) -> None:
    """Raise for the first NaN or infinite value of a FederatedData, with its field, client and row."""
    for name, leaf in named_leaves(data.arrays):
        if not np.issubdtype(leaf.dtype, np.inexact) or np.isfinite(np.sum(leaf)):
            continue
        bad = ~np.isfinite(leaf).reshape(len(leaf), -1).all(1)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            k = int(np.searchsorted(np.cumsum(data.sizes), row, side="right"))
            raise ValueError(
                f"field {name} of client {data.ids[k]!r}, row {row - int(data.starts[k])}, is NaN or infinite "
                f"({int(bad.sum())} such rows in all); clean or drop them first"
            )


def shares(fraction: float | Sequence[float]) -> np.ndarray:
    """Shares of all parts, summing to 1, from the first part's share or from all of them."""
    parts = np.atleast_1d(np.asarray(fraction, np.float64))
    if parts.size == 1:
        parts = np.array([parts[0], 1 - parts[0]])
    if not (parts > 0).all() or abs(parts.sum() - 1) > 1e-6:
        raise ValueError(f"a split needs positive shares that sum to 1, or one between 0 and 1; got {fraction}")
    return parts


def positive(value: Any, name: str, *, integer: bool = False, unit: str = "") -> None:
    """Refuse a Python number that isn't positive; a traced one (a sweep's) passes."""
    if isinstance(value, Tracer) or callable(value):
        return
    number = np.asarray(value)
    if number.ndim or number.dtype.kind not in "iuf" or (integer and number.dtype.kind == "f"):
        kind = "a positive integer" if integer else "a positive number"
        raise ValueError(f"{name} must be {kind}{unit}; got {value!r}")
    if not number > 0 or not np.isfinite(number):
        raise ValueError(f"{name} must be positive{unit}; got {value!r}")


def labels_in_range(data: Any, num_classes: int, field: str = "y") -> None:
    """Refuse labels that a classifier of ``num_classes`` can't predict, naming client and row."""
    labels = data.arrays.get(field) if isinstance(data.arrays, dict) else None
    if labels is None or isinstance(labels, Tracer):
        return
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels {field!r} must be integers 0..{num_classes - 1}; got dtype {labels.dtype}")
    low, high = labels.min(), labels.max()  # on the device where the labels are
    if low >= 0 and high < num_classes:
        return
    labels = np.asarray(labels)
    outside = (labels < 0) | (labels >= num_classes)
    row = int(np.flatnonzero(outside.reshape(len(labels), -1).any(1))[0])
    starts = np.asarray(data.starts)
    k = int(np.searchsorted(starts, row, side="right")) - 1
    value = labels[row].ravel()[np.flatnonzero(outside[row].ravel())[0]]
    raise ValueError(
        f"label {value} of client {data.ids[k]!r} (field {field!r}, row {row - int(starts[k])}) is outside the "
        f"model's classes 0..{num_classes - 1}"
    )


def not_negative(value: Any, name: str) -> None:
    """Refuse a negative or non-finite Python number; a traced one (a sweep's) passes."""
    if isinstance(value, Tracer):
        return
    number = np.asarray(value)
    if number.ndim or number.dtype.kind not in "iuf" or not np.isfinite(number) or number < 0:
        raise ValueError(f"{name} must be a number of at least 0; got {value!r}")


def probability(value: Any, name: str) -> None:
    """Refuse a Python number outside 0..1; a traced one (a sweep's) passes."""
    not_negative(value, name)
    if not isinstance(value, Tracer) and value > 1:
        raise ValueError(f"{name} must lie between 0 and 1; got {value!r}")
