"""Refusals of bad input: each says what is wrong, where, and what to do, before anything expensive."""

import difflib
import importlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
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


def shown(value: Any, most: int = 80) -> str:
    """A value as an error message shows it: its repr, cut short."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[:most]}..."


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
        if not isinstance(client, Hashable) or client != client:
            raise ValueError(f"client id {shown(client)} can't be an id: give strings or integers")
        if client in seen:
            raise ValueError(f"client id {client!r} occurs more than once; ids must be unique")
        seen.add(client)


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
    return leaf.dtype == object or leaf.dtype.kind in "USMmV"


def client_rows(client: Hashable, tree: Any) -> int:
    """The number of rows of one client's arrays, which must agree."""
    leaves = named_leaves(tree)
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


def same_rows(arrays: Any, rows: int) -> None:
    """Refuse arrays that don't have one entry for each of so many owners."""
    for name, leaf in named_leaves(arrays):
        if leaf.ndim == 0:
            raise ValueError(f"field {name} is a scalar; give one entry per row{_LISTS}")
        if len(leaf) != rows:
            raise ValueError(f"field {name} has {len(leaf)} rows, but client_ids has {rows}")
    if not rows:
        raise ValueError("a federated data set needs at least one row; client_ids is empty")


def assignment(owners: np.ndarray, arrays: Any, num_clients: int | None) -> None:
    """Refuse what doesn't give each row of ``arrays`` one of ``num_clients`` clients, or -1."""
    if owners.ndim != 1 or owners.dtype.kind not in "iu":
        raise ValueError(f"assignment must be one client number per row, int[rows]; got {shown(owners)}")
    for name, leaf in named_leaves(arrays):
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
        raise ValueError(f"clients' positions must be a non-empty list of integers; got {shown(indices)}")
    outside = found[(found < 0) | (found >= num_clients)]
    if outside.size:
        raise ValueError(f"client position {outside[0]} is outside the population 0..{num_clients - 1}")
    unique_ids(found.tolist())
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
    for name, leaf in named_leaves(data.arrays):
        if not np.issubdtype(leaf.dtype, np.inexact) or np.isfinite(np.sum(leaf)):
            continue
        bad = ~np.isfinite(leaf).reshape(len(leaf), -1).all(1)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            k = int(np.searchsorted(np.cumsum(data.sizes), row, side="right"))
            raise ValueError(
                f"field {name} of client {data.ids[k]!r}, row {row - int(data.starts[k])}, is NaN, infinite or too "
                f"large for {leaf.dtype} ({int(bad.sum())} such rows in all); clean or drop them first"
            )


def shares(fraction: float | Sequence[float]) -> np.ndarray:
    """Shares of all parts, summing to 1, from the first part's share or from all of them."""
    parts = np.atleast_1d(np.asarray(fraction))
    parts = parts.astype(np.float64) if parts.dtype.kind in "iuf" else np.zeros(1)
    if parts.size == 1:
        parts = np.array([parts[0], 1 - parts[0]])
    if not (parts > 0).all() or abs(parts.sum() - 1) > 1e-6:
        raise ValueError(f"a split needs positive shares that sum to 1, or one between 0 and 1; got {fraction}")
    return parts


def _number(value: Any) -> np.ndarray | None:
    """One integer or floating-point number as an array; ``None`` for everything else, booleans included."""
    number = None if isinstance(value, tuple | list | dict) else np.asarray(value)
    return number if number is not None and not number.ndim and number.dtype.kind in "iuf" else None


def positive(value: Any, name: str, *, integer: bool = False, unit: str = "") -> None:
    """Refuse a Python number that isn't positive; a traced one (a sweep's) passes."""
    if isinstance(value, Tracer) or callable(value):
        return
    number = _number(value)
    if number is None or (integer and number.dtype.kind == "f"):
        kind = "a positive integer" if integer else "a positive number"
        raise ValueError(f"{name} must be {kind}{unit}; got {shown(value)}")
    if not number > 0 or not np.isfinite(number):
        raise ValueError(f"{name} must be positive{unit}; got {value!r}")


def labels_in_range(data: Any, num_classes: int, field: str = "y") -> None:
    """Refuse labels that a classifier of ``num_classes`` can't predict, naming client and row."""
    labels = data.arrays.get(field) if isinstance(data.arrays, dict) else None
    if labels is None or isinstance(labels, Tracer):
        return
    if not np.issubdtype(labels.dtype, np.integer):
        labels = np.asarray(labels)
        where = _first(data, labels, labels != np.round(labels), field) if labels.dtype.kind == "f" else ""
        raise ValueError(
            f"{where and f'{where} is no whole number: '}labels {field!r} must be integers 0..{num_classes - 1}; they "
            f"have dtype {labels.dtype}" + ("" if where else f": convert them, {field}.astype(np.int32)")
        )
    low, high = labels.min(), labels.max()  # on the device where the labels are
    if low >= 0 and high < num_classes:
        return
    labels = np.asarray(labels)
    where = _first(data, labels, (labels < 0) | (labels >= num_classes), field)
    raise ValueError(f"{where} is outside the model's classes 0..{num_classes - 1}")


def _first(data: Any, labels: np.ndarray, wrong: np.ndarray, field: str) -> str:
    """The first wrong label in words, with its client and row; nothing if none is wrong."""
    rows = np.flatnonzero(wrong.reshape(len(labels), -1).any(1))
    if not len(rows):
        return ""
    row, starts = int(rows[0]), np.asarray(data.starts)
    k = int(np.searchsorted(starts, row, side="right")) - 1
    value = labels[row].ravel()[np.flatnonzero(wrong[row].ravel())[0]]
    return f"label {value} of client {data.ids[k]!r} (field {field!r}, row {row - int(starts[k])})"


def not_negative(value: Any, name: str) -> None:
    """Refuse a negative or non-finite Python number; a traced one (a sweep's) passes."""
    if isinstance(value, Tracer):
        return
    number = _number(value)
    if number is None or not np.isfinite(number) or number < 0:
        raise ValueError(f"{name} must be a number of at least 0; got {shown(value)}")


def probability(value: Any, name: str) -> None:
    """Refuse a Python number outside 0..1; a traced one (a sweep's) passes."""
    not_negative(value, name)
    if not isinstance(value, Tracer) and value > 1:
        raise ValueError(f"{name} must lie between 0 and 1; got {value!r}")
