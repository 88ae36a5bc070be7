"""The cells of a sweep: a full grid of hyper-parameters times seeds, and the refusals of what can't be one."""

import inspect
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_lab import checks

Number = int | float


class Cells(NamedTuple):
    """A sweep's cells, in the order of C: the first grid's values vary slowest, the seeds fastest.

    Attributes:
      grids: ``{name: values}``, in the order of the axes.
      seeds: the last axis.
    """

    grids: dict[str, tuple[Number, ...]]
    seeds: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """One length for each grid, then the number of seeds."""
        return (*map(len, self.grids.values()), len(self.seeds))

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def points(self) -> list[dict[str, Number]]:
        """The hyper-parameters of every point of the grid, without seeds; one empty dict where there is no grid."""
        return [dict(zip(self.grids, values, strict=True)) for values in itertools.product(*self.grids.values())]

    def flat(self) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """For each hyper-parameter its value in every cell, in JAX's default precision; and every cell's seed."""
        columns = [np.asarray(v, jax.dtypes.canonicalize_dtype(np.asarray(v).dtype)) for v in self.grids.values()]
        *columns, seeds = np.meshgrid(*columns, np.arange(len(self.seeds)), indexing="ij")
        return tuple(column.ravel() for column in columns), seeds.ravel()

    def index(self, seed: Any, values: Mapping[str, Any]) -> tuple[int, ...]:
        """A cell's place along every axis. An axis of one entry may be left out.

        Raises:
          ValueError: an unknown name or value, or one that is missing.
        """
        return (*self.point_index(values), _place("seed", seed, self.seeds))

    def point_index(self, values: Mapping[str, Any]) -> tuple[int, ...]:
        """A grid point's place along the grids' axes; see :meth:`index`."""
        self.known(values)
        return tuple(_place(name, values.get(name), grid) for name, grid in self.grids.items())

    def known(self, names: Iterable[str]) -> None:
        """Raise ValueError for what is no grid's name."""
        for name in names:
            if name not in self.grids:
                near = checks.nearest(name, self.grids) or f"; it has {list(self.grids) or 'none'}"
                raise ValueError(f"the sweep has no grid {name!r}{near}")


def _place(name: str, value: Any, entries: tuple[Number, ...]) -> int:
    if value is None:
        if len(entries) == 1:
            return 0
        raise ValueError(f"which {name}? The sweep has {checks.shown(list(entries))}: give {name}=")
    if isinstance(value, int | float | np.number | np.ndarray) and np.ndim(value) == 0:
        for place, entry in enumerate(entries):
            if value == entry or (name != "seed" and math.isclose(value, entry, rel_tol=1e-6)):
                return place
    raise ValueError(f"the sweep has no {name}={checks.shown(value)}; it has {checks.shown(list(entries))}")


def cells_of(grids: Mapping[str, Any], seeds: Any) -> Cells:
    """The cells of a sweep, from what the user gave.

    Raises:
      ValueError: an empty grid, one that isn't a list of numbers, a value twice or out of single precision's range;
        no seeds, or seeds that aren't distinct integers in ``0..2**32 - 1``.
    """
    return Cells({name: _grid(name, values) for name, values in grids.items()}, _seeds(seeds))


def _grid(name: str, values: Any) -> tuple[Number, ...]:
    example = f"such as {name}=[0.03, 0.1, 0.3]"
    found = _array(values)
    if found is None or found.ndim != 1 or (found.size and found.dtype.kind not in "iuf"):
        raise ValueError(f"{name} must be a list of numbers, {example}; got {checks.shown(values)}")
    if not found.size:
        raise ValueError(f"{name} is an empty grid: give at least one value, {example}")
    with np.errstate(over="ignore"):
        rounded = found.astype(jax.dtypes.canonicalize_dtype(found.dtype))
    for value, there in zip(found.tolist(), rounded.tolist(), strict=True):
        # Integers wrap and floats overflow; the rest is ordinary rounding.
        if value != value or not math.isclose(value, there, rel_tol=1e-6):
            raise ValueError(f"{name}: {value!r} is no {rounded.dtype} value; grids are computed in that precision")
    if len(set(rounded.tolist())) < found.size:
        twice = next(v for v, n in zip(*np.unique(rounded, return_counts=True), strict=True) if n > 1)
        raise ValueError(f"{name} has the value {twice:g} twice (in {rounded.dtype}); give each once")
    return tuple(found.tolist())


def _seeds(seeds: Any) -> tuple[int, ...]:
    example = "such as seeds=range(8)"
    found = _array(seeds)
    if found is None or found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError(f"seeds must be a list of integers, {example}; got {checks.shown(seeds)}")
    if not found.size:
        raise ValueError(f"seeds is empty: give at least one, {example}")
    numbers = tuple(map(operator.index, found.tolist()))
    wrong = [seed for seed in numbers if not 0 <= seed < 2**32]
    if wrong:
        raise ValueError(f"seeds must be integers of at least 0 and below 2**32; got {wrong[0]}")
    if len(set(numbers)) < len(numbers):
        twice = next(seed for seed in numbers if numbers.count(seed) > 1)
        raise ValueError(f"the seed {twice} occurs twice: its runs would be the same")
    return numbers


def _array(values: Any) -> np.ndarray | None:
    """A list, range or array as an array; ``None`` for text, mappings, sets (which have no order) and the like."""
    if isinstance(values, str | bytes | Mapping | set | frozenset) or not isinstance(values, Iterable):
        return None
    try:
        values = values if hasattr(values, "dtype") else list(values)
        if isinstance(values, list) and any(isinstance(v, bool | np.bool_) for v in values):
            return None  # which NumPy would take for 0 and 1
        return np.asarray(values)
    except (ValueError, TypeError):  # ragged, or a scalar array
        return None


def keywords(make_process: Any, grids: Iterable[str]) -> None:
    """Refuse a ``make_process`` that can't be called with the grids' names.

    Raises:
      ValueError: it is no function; it takes no such keyword; it needs one that isn't given.
    """
    if not callable(make_process):
        raise ValueError(
            "sweep takes a function of the hyper-parameters that makes a Process, such as lambda learning_rate: "
            f"fl.synchronous(fedavg(model, optax.sgd(learning_rate)), data); got a {type(make_process).__name__}"
        )
    parameters = _parameters(make_process)
    if parameters is None:
        return
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes = {p.name for p in parameters if p.kind in by_name}
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    for name in grids:
        if name not in takes and not anything:
            near = checks.nearest(name, takes) or f"; it takes {sorted(takes) or 'no arguments'}"
            raise ValueError(f"make_process has no parameter {name!r}{near}")
    empty = inspect.Parameter.empty
    optional = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    for parameter in parameters:
        if parameter.default is empty and parameter.kind not in optional and parameter.name not in set(grids):
            raise ValueError(
                f"make_process needs {parameter.name}: give a grid, {parameter.name}=[...], or a default value"
            )


def _parameters(function: Callable) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):  # some builtins have none
        return None
