"""Parameters in a narrow type whose gradients are added up in their own.

Cast before a model sees them, parameters would have narrow cotangents: the gradient of a recurrent weight would be
added up over time, and that of an embedding over its occurrences, in bfloat16, where 256 + 1 is 256. Here the model
is traced with narrow parameters and run with each cast only where an equation uses it. Forward the bits are
the same; backward each use gives a wide summand. Uses inside ``jax.checkpoint``, ``cond`` and functions with
derivatives of their own count as one use.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

PyTree = Any
# They move or repeat entries of their first argument and calculate nothing: as well done before the cast as after it.
_MOVES = ("gather", "slice", "dynamic_slice", "reshape", "squeeze", "transpose", "broadcast_in_dim")


class Late(NamedTuple):
    """A value that is still ``wide``, and the ``dtype`` that the program takes it for."""

    wide: jax.Array
    dtype: Any


def narrow(value: Any) -> Any:
    """The value as the program knows it."""
    return value.wide.astype(value.dtype) if isinstance(value, Late) else value


def with_late_casts(function: Callable, wide: PyTree, like: PyTree, *arguments: PyTree) -> PyTree:
    """``function(wide cast as like, *arguments)``, cast where it is used.

    Args:
      function: of pytrees of arrays.
      wide: its first argument, before the cast.
      like: the same after it, or its ``jax.ShapeDtypeStruct``s.
      *arguments: the others; nothing is cast.
    """
    program, shape = jax.make_jaxpr(function, return_shape=True)(like, *arguments)
    late = [
        w if w.dtype == n.dtype else Late(w, n.dtype)
        for w, n in zip(jax.tree.leaves(wide), jax.tree.leaves(like), strict=True)
    ]
    out = _run(program, [*late, *jax.tree.leaves(arguments)])
    return jax.tree.unflatten(jax.tree.structure(shape), map(narrow, out))


def _run(program: ClosedJaxpr, values: Sequence[Any]) -> list[Any]:
    """The program's results, of which some may be :class:`Late`, for arguments of which some are."""
    jaxpr: Jaxpr = program.jaxpr
    known: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*program.consts, *values), strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else known[v]
    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _equation(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _equation(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    late = [isinstance(v, Late) for v in values]
    name = eqn.primitive.name
    if any(late):
        if name in ("jit", "pjit"):
            return _run(eqn.params["jaxpr"], values)
        if name == "scan":
            return _scan(eqn, values)
        if name in _MOVES and late[0]:
            moved = _bound(eqn, [values[0].wide, *map(narrow, values[1:])])
            return [Late(moved[0], values[0].dtype)]
    return _bound(eqn, list(map(narrow, values)))


def _bound(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def _scan(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    """A scan whose constants are cast in its body, so that their gradients are added up wide."""
    body = eqn.params["jaxpr"]
    # In order: constants, carry, rows; and carry, rows. A row has one axis less in the body than outside.
    is_row = lambda outside, inside: outside.aval.ndim > inside.ndim
    rows = sum(map(is_row, eqn.invars, body.in_avals))
    carried = len(eqn.outvars) - sum(map(is_row, eqn.outvars, body.out_avals))
    first = len(values) - rows - carried
    constants, moving = values[:first], list(map(narrow, values[first:]))

    def step(carry, row):
        out = list(map(narrow, _run(body, [*constants, *carry, *row])))
        return out[:carried], out[carried:]

    options = {name: eqn.params[name] for name in ("reverse", "length", "unroll")}
    last, out = jax.lax.scan(step, moving[:carried], moving[carried:], **options)
    return [*last, *out]
