"""Refusals of bad input: each says what is wrong, where, and what to do, before anything expensive."""

import difflib
import importlib
import inspect
import operator
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
import optax
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


def unique_ids(ids: Sequence[Hashable]) -> None:
    seen: set[Hashable] = set()
    for client in ids:
        if not isinstance(client, Hashable) or client != client:
            raise ValueError(f"client id {shown(client)} can't be an id: give strings or integers")
        if client in seen:
            raise ValueError(f"client id {client!r} occurs more than once; ids must be unique")
        seen.add(client)


def federated(data: Any, what: str, *, empty: bool = False) -> None:
    """Refuse what isn't a FederatedData, and say how to come by one; and one without an example unless ``empty``."""
    if hasattr(data, "id_table"):
        if not empty and not isinstance(data.sizes, Tracer) and not np.any(np.asarray(data.sizes)):
            clients = len(data.sizes)
            raise ValueError(
                f"{what} has no example: all {clients} clients are empty. A split leaves a client's only example in "
                "the first part: take a larger share for this one, or split_clients"
            )
        return
    hint = "build one with fl.FederatedData.from_clients({id: arrays}) or the like"
    if hasattr(data, "train") and hasattr(data, "test"):
        hint = "a data set in two parts: give its .train or .test"
    raise ValueError(f"{what} must be a FederatedData; got {type(data).__name__}: {hint}")


def not_finite(leaf: Any) -> bool:
    """Whether a floating-point array holds a NaN or an infinity."""
    floating = jax.dtypes.issubdtype(getattr(leaf, "dtype", bool), np.inexact)
    return floating and not np.isfinite(np.asarray(leaf)).all()


def label_leaf(arrays: Any) -> Any | None:
    """The integer labels ``[rows]`` under ``"y"``, if there are any."""
    y = arrays.get("y") if isinstance(arrays, dict) else None
    return y if y is not None and np.issubdtype(y.dtype, np.integer) and y.ndim == 1 else None


def labels_in_range(data: Any, num_classes: int, field: str = "y") -> None:
    """Refuse labels that a classifier of ``num_classes`` can't predict, naming client and row."""
    labels = data.arrays.get(field) if isinstance(data.arrays, dict) else None
    if labels is None or isinstance(labels, Tracer) or not labels.size:
        return
    if not np.issubdtype(labels.dtype, np.integer):
        labels = np.asarray(labels)
        where = _first(data, labels, labels != np.round(labels), field) if labels.dtype.kind == "f" else ""
        raise ValueError(
            f"{where and f'{where} is no whole number: '}labels {field!r} must be integers 0..{num_classes - 1}; they "
            f"have dtype {labels.dtype}" + ("" if where else f": convert them, {field}.astype(np.int32)")
        )
    with jax.ensure_compile_time_eval():  # on the device where the labels are, although the caller is traced
        low, high = int(labels.min()), int(labels.max())
    if low >= 0 and high < num_classes:
        return
    labels = np.asarray(labels)
    where = _first(data, labels, (labels < 0) | (labels >= num_classes), field)
    raise ValueError(f"{where} is outside the model's classes 0..{num_classes - 1}")


def values_in_range(data: Any, field: str, low: int, high: int, what: str, where: str) -> None:
    """Refuse a field's values outside ``low..high``, naming client and row.

    Args:
      data: FederatedData; one without the field passes, and so does a traced one.
      field: its name.
      low, high: the least and the largest value.
      what: a value's name in the message, such as ``"token"``.
      where: what it is outside of, such as ``"the vocabulary"``.
    """
    values = data.arrays.get(field) if isinstance(data.arrays, dict) else None
    if values is None or isinstance(values, Tracer) or not values.size or values.dtype == bool:
        return
    with jax.ensure_compile_time_eval():
        least, most = values.min(), values.max()
    if least >= low and most <= high:
        return
    values = np.asarray(values)
    if found := _first(data, values, (values < low) | (values > high), field, what):
        raise ValueError(f"{found} is outside {where} {low}..{high}")


def _first(data: Any, labels: np.ndarray, wrong: np.ndarray, field: str, what: str = "label") -> str:
    """The first wrong label in words, with its client and row; nothing if none is wrong."""
    rows = np.flatnonzero(wrong.reshape(len(labels), -1).any(1))
    if not len(rows):
        return ""
    row, starts = int(rows[0]), np.asarray(data.starts)
    k = int(np.searchsorted(starts, row, side="right")) - 1
    value = labels[row].ravel()[np.flatnonzero(wrong[row].ravel())[0]]
    return f"{what} {value} of client {data.ids[k]!r} (field {field!r}, row {row - int(starts[k])})"


def shares(fraction: float | Sequence[float]) -> np.ndarray:
    """Shares of all parts, summing to 1, from the first part's share or from all of them."""
    parts = np.atleast_1d(np.asarray(fraction))
    parts = parts.astype(np.float64) if parts.dtype.kind in "iuf" else np.zeros(1)
    if parts.size == 1:
        parts = np.array([parts[0], 1 - parts[0]])
    if not (parts > 0).all() or abs(parts.sum() - 1) > 1e-6:
        raise ValueError(f"a split needs positive shares that sum to 1, or one between 0 and 1; got {fraction}")
    return parts


def share(value: Any, name: str) -> None:
    """Refuse what isn't a part of the whole, above 0 and below 1, or isn't known when it is compiled."""
    if isinstance(value, Tracer) or not isinstance(value, float | np.floating) or not 0 < value < 1:
        raise ValueError(f"{name} must be a share between 0 and 1, such as 0.5; got {shown(value)}")


def weights(values: Any, name: str, count: int | None) -> None:
    """Refuse what isn't ``count`` finite numbers of at least 0, one of them positive; traced ones pass."""
    shape = np.shape(values)
    if len(shape) != 1 or (count is not None and shape != (count,)):
        of = "non-negative numbers" if count is None else f"{count} non-negative numbers"
        raise ValueError(f"{name} must be {of}, one for each client in the data's order; got shape {shape}")
    if isinstance(values, Tracer):
        return
    found = np.asarray(values)
    wrong = np.flatnonzero(~(np.isfinite(found) & (found >= 0)))
    if len(wrong):
        raise ValueError(f"{name} must be finite and at least 0; got {found[wrong[0]]} at position {wrong[0]}")
    if not (found > 0).any():
        raise ValueError(f"{name} must give some client a positive number; got zeros only")


def weighting(value: Any, population: int | None = None) -> None:
    """Refuse what :func:`fedjax_lab.client_weight` doesn't know: another word, or no weights of a population."""
    if isinstance(value, str):
        if value not in ("examples", "uniform"):
            near = nearest(value, ("examples", "uniform"))
            raise ValueError(f"weighting must be 'examples', 'uniform' or an array; got {value!r}{near}")
    else:
        weights(value, "weighting", population)


def _number(value: Any) -> np.ndarray | None:
    """One integer or floating-point number as an array; ``None`` for everything else, booleans included."""
    number = None if isinstance(value, tuple | list | dict) else np.asarray(value)
    return number if number is not None and not number.ndim and number.dtype.kind in "iuf" else None


def integer(value: Any, name: str, least: int, below: int = 2**32) -> int:
    """The value as a Python integer. Raises ValueError for what isn't one, or lies outside ``least..below-1``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer; got {shown(value)}") from None
    if isinstance(value, bool) or not least <= number < below:
        most = f" and below {below}" if number >= below else ""
        raise ValueError(f"{name} must be an integer of at least {least}{most}; got {value!r}")
    return number


def generator(seed: Any) -> np.random.Generator:
    """NumPy's generator for a seed. Raises ValueError, in our words, for a number that can't be one."""
    return np.random.default_rng(integer(seed, "seed", 0, 2**128) if isinstance(seed, (int, float)) else seed)


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


def not_negative(value: Any, name: str, *, integer: bool = False) -> None:
    """Refuse a negative or non-finite Python number; a traced one (a sweep's) passes."""
    if isinstance(value, Tracer):
        return
    number = _number(value)
    if number is None or (integer and number.dtype.kind == "f") or not np.isfinite(number) or number < 0:
        kind = "an integer" if integer else "a number"
        raise ValueError(f"{name} must be {kind} of at least 0; got {shown(value)}")


def probability(value: Any, name: str) -> None:
    """Refuse a Python number outside 0..1; a traced one (a sweep's) passes."""
    not_negative(value, name)
    if not isinstance(value, Tracer) and value > 1:
        raise ValueError(f"{name} must lie between 0 and 1; got {value!r}")


def momentum(value: Any) -> None:
    """Refuse a momentum outside 0..1, or of 1, which would never forget."""
    probability(value, "momentum")
    if not isinstance(value, Tracer) and value == 1:
        raise ValueError("momentum must be below 1, which would never forget; got 1")


def finite(value: Any, name: str) -> None:
    """Refuse what isn't one finite number; a traced one (a sweep's) passes."""
    if isinstance(value, Tracer):
        return
    number = _number(value)
    if number is None or not np.isfinite(number):
        raise ValueError(f"{name} must be a finite number; got {shown(value)}")


def predicate(value: Any, name: str = "predicate") -> None:
    """Refuse a predicate of leaves that isn't a function."""
    if not callable(value):
        raise ValueError(
            f"{name} must be a function of a leaf's path, such as fl.transforms.leaves('params/output/*'); "
            f"got {shown(value)}"
        )


def absent(options: dict[str, Any], name: str, why: str) -> None:
    """Refuse an option that is switched on although it makes no sense here."""
    if options.get(name):
        raise ValueError(f"{name} can't be used here: {why}")


def model(value: Any) -> None:
    """Refuse what has no ``init`` and ``loss``, such as a Flax module or an optimizer."""
    if not all(callable(getattr(value, part, None)) for part in ("init", "loss")):
        raise ValueError(
            f"model must be a fl.Model (fl.models..., fl.models.from_flax(module)); got {shown(value)}. The "
            "model comes first, the optimizer second"
        )


def optimizer(value: Any, name: str) -> None:
    """Refuse what isn't an optax optimizer."""
    if not isinstance(value, optax.GradientTransformation):
        raise ValueError(f"{name} must come from optax, such as optax.sgd(0.1); got {shown(value)}")


def client_optimizer(value: Any) -> None:
    """Refuse what is neither an optax optimizer nor a function of the round number."""
    if not callable(value):
        optimizer(value, "client_optimizer")
    elif "learning_rate" in list(inspect.signature(value).parameters)[:1]:
        # Else the round's number would become its learning rate.
        raise ValueError(f"client_optimizer is {shown(value)}: call it with a learning rate, such as optax.sgd(0.1)")


def pair(result: Any, what: str, form: str) -> tuple[Any, Any]:
    """A function's two results; anything else is refused, a dict of two entries included."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"{what} must return a tuple {form}; it returns {shown(result)}. Without state: ()")
    return result


def per_example(values: Any, mask: Any, name: str) -> None:
    """Refuse what isn't one value for each example: a scalar, or ``[batch, 1]``, would broadcast."""
    if np.shape(values) != np.shape(mask):
        raise ValueError(
            f"the model's {name} must be one value for each example, shape {np.shape(mask)}; got shape "
            f"{np.shape(values)}. Don't average over the batch"
        )
