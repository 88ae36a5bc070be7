"""One cell of a sweep as a program of its hyper-parameters, and what to say where that can't be had.

A process is traced once, with the grid's values as arguments. Whatever arrays it closes over (a population that is
still on the host, sampling weights) become arguments too: there is one copy of them, whatever the number of cells.
"""

import pathlib
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import eval_jaxpr

from fedjax_lab import checks
from fedjax_lab.grids import Cells, Number
from fedjax_lab.process import Process
from fedjax_lab.xla_options import is_small

PyTree = Any
MakeProcess = Callable[..., Process]


class Traced(NamedTuple):
    """A function of pytrees, traced once: ``call(consts, *arguments)``.

    ``small``: nothing that it computes is worth cutting up for threads.
    """

    call: Callable[..., PyTree]
    consts: list[jax.Array]
    small: bool


class CellProgram(NamedTuple):
    """What one cell computes; ``values`` are its hyper-parameters, scalars in the order of the grids.

    Attributes:
      start: ``(consts, values, key, params) -> state``.
      step: ``(consts, values, state, data) -> (state, metrics)``.
      read: ``(consts, values, state) -> params``.
      size: numbers in ``params``.
      state: shapes of one cell's state.
    """

    start: Traced
    step: Traced
    read: Traced
    size: int
    state: PyTree


def build(make_process: MakeProcess, values: dict[str, Number]) -> Process:
    """A process for given numbers; what goes wrong is reported with them.

    Raises:
      ValueError: ``make_process`` raises it, or gives no Process.
    """
    told = f"make_process({', '.join(f'{name}={value!r}' for name, value in values.items())})"
    try:
        made = make_process(**values)
    except ValueError as error:
        raise ValueError(f"{told}: {error}") from error
    except Exception as error:
        error.add_note(f"raised by {told}, which sweep called")
        raise
    if not isinstance(made, Process):
        raise ValueError(
            f"{told} must give a Process, as fl.synchronous(round, data, sampler) does; it gives {checks.shown(made)}"
        )
    return made


def checked(make_process: MakeProcess, cells: Cells) -> Process:
    """The process of the grids' first values, after every other value was tried as well.

    Each value is tried with the first ones of the other grids. Building computes nothing, but it checks, and the
    errors name a number, which those of a traced value can't.

    Raises:
      ValueError: what ``make_process`` raises, with the value; or data that depend on it.
    """
    first = {name: values[0] for name, values in cells.grids.items()}
    reference = build(make_process, first)
    for name, values in cells.grids.items():
        for value in values[1:]:
            other = build(make_process, {**first, name: value})
            if not _same_data(reference.data, other.data):
                raise ValueError(
                    f"make_process gives other data for {name}={value!r} than for {name}={values[0]!r}: all cells of a "
                    f"sweep share their data. Give each of these values a sweep of its own"
                )
    return reference


def _same_data(a: PyTree, b: PyTree) -> bool:
    ours, theirs = getattr(a, "id_table", None), getattr(b, "id_table", None)
    left, right = jax.tree.leaves(a), jax.tree.leaves(b)
    if len(left) != len(right) or (ours is not theirs and list(a.ids) != list(b.ids)):
        return False
    return all(x is y or _same_bits(np.asarray(x), np.asarray(y)) for x, y in zip(left, right, strict=True))


def _same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    bits = lambda a: np.ascontiguousarray(a).reshape(-1).view(np.uint8)
    return x.shape == y.shape and x.dtype == y.dtype and np.array_equal(bits(x), bits(y))


def trace(make_process: MakeProcess, cells: Cells, reference: Process, params: PyTree) -> CellProgram:
    """Trace a cell's computation.

    Hyper-parameters are weakly typed, as the Python numbers that they stand for: a learning rate doesn't make a
    bfloat16 model a float32 one.

    Raises:
      ValueError: ``make_process`` works with numbers, but not with traced values; names the grid and the line.
    """
    scalars = tuple(_scalar(values[0]) for values in cells.grids.values())
    names = tuple(cells.grids)
    try:
        return _trace(_maker(make_process, names, {}, reference), reference, scalars, params)
    except Exception as error:
        if not names:
            raise
        _trace(lambda values: reference, reference, (), params)  # what fails without traced values says why itself
        first = {name: values[0] for name, values in cells.grids.items()}
        raise _explained(error, make_process, first, reference, params) from error


def trace_more(
    function: Callable[..., PyTree], make_process: MakeProcess, cells: Cells, reference: Process, state: PyTree
) -> Traced:
    """``function(process, state, data)`` of a cell, traced as ``(consts, values, state, data)``."""
    make = _maker(make_process, tuple(cells.grids), {}, reference)
    scalars = tuple(_scalar(values[0]) for values in cells.grids.values())
    call = lambda values, state, data: function(make(values), state, data)
    return _traced(call, scalars, state, reference.data)[0]


def _scalar(value: Number) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), jax.dtypes.canonicalize_dtype(np.asarray(value).dtype), weak_type=True)


def _maker(make_process: MakeProcess, names: tuple[str, ...], fixed: dict, reference: Process):
    if not names:
        return lambda values: reference  # seeds alone: nothing is traced, and nothing need be built again
    return lambda values: make_process(**fixed, **dict(zip(names, values, strict=True)))


def _trace(make: Callable[[tuple], Process], reference: Process, scalars: tuple, params: PyTree) -> CellProgram:
    key = jax.eval_shape(lambda: jax.random.key(0))
    start, state = _traced(lambda values, key, params: make(values).init(key, params), scalars, key, params)
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)

    def one(values, state, data):
        step = make(values).step
        return getattr(step, "abreast", step)(state, data)

    step, _ = _traced(one, scalars, state, reference.data)
    read, shape = _traced(lambda values, state: make(values).params(state), scalars, state)
    return CellProgram(start, step, read, sum(leaf.size for leaf in jax.tree.leaves(shape)), state)


def _traced(function: Callable, *arguments: PyTree) -> tuple[Traced, PyTree]:
    """The function, traced for arguments like these, and the shapes of its result."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    structure = jax.tree.structure(shape)

    def call(consts, *arguments):
        return structure.unflatten(eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves(arguments)))

    return Traced(call, [jnp.asarray(const) for const in closed.consts], is_small(closed.jaxpr)), shape


def _explained(error: Exception, make_process: MakeProcess, first: dict, reference: Process, params) -> ValueError:
    """Which grids can't be traced, found by tracing them one at a time, and where."""
    culprits = {}
    for name, value in first.items():
        fixed = {other: number for other, number in first.items() if other != name}
        try:
            _trace(_maker(make_process, (name,), fixed, reference), reference, (_scalar(value),), params)
        except Exception as own:
            culprits[name] = own
    told = " and ".join(culprits) or " with ".join(first)
    error = next(iter(culprits.values()), error)
    return ValueError(
        f"{told} can't be swept: all cells share one program, in which {told} has no value yet, and "
        f"{_place(error)} needs one ({type(error).__name__}: {_first_line(error)}). What decides shapes or branches of "
        "Python (a cohort or batch size, a width, if and else) needs a sweep for each value; a branch on a value can "
        "be written as jnp.where(condition, a, b)"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return checks.shown(lines[0] if lines else "", 120).strip("'\"")


def _place(error: Exception) -> str:
    """The innermost line of the traceback that isn't JAX's or a library's of its kind, in words."""
    libraries = [pathlib.Path(module.__file__ or "").parent for module in (jax, np, optax)]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = pathlib.Path(frame.filename)
        if (
            file.is_absolute()
            and file != pathlib.Path(__file__)
            and not any(folder in file.parents for folder in libraries)
        ):
            return f"{file.parent.name}/{file.name}, line {frame.lineno} ({checks.shown(frame.line or '?').strip()})"
    return "make_process"
