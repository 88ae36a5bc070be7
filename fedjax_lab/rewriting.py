"""Programs in the form that XLA:CPU runs fast inside loops.

A client's turn is a loop of training steps. XLA's CPU backend finds its fast kernels for what stands outside of loops
and misses some of them in a loop's body. So the traced turn is rewritten: some equations are replaced by others that
compute the same. The user's model is not touched. Which ones, and what that brings, is told in ``convolutions.py``,
``pooling.py`` and ``products.py``.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from fedjax_lab import convolutions, pooling, products

# For each primitive: the equation -> a function of its operands that gives the same, or None to leave it as it is.
FORMS: dict[str, Callable[[JaxprEqn], Callable | None]] = {**convolutions.FORMS, **pooling.FORMS, **products.FORMS}


def fast_in_loops(program: ClosedJaxpr) -> ClosedJaxpr:
    """The program with its equations replaced, those in its loops included."""
    return program.replace(jaxpr=_rewritten(program.jaxpr)) if _concerns(program.jaxpr) else program


def programs_of(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The programs among an equation's parameters: bodies of loops, branches, calls."""
    for value in eqn.params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each


def _concerns(jaxpr: Jaxpr) -> bool:
    return any(eqn.primitive.name in FORMS or any(map(_concerns, programs_of(eqn))) for eqn in jaxpr.eqns)


def _rewritten(jaxpr: Jaxpr) -> Jaxpr:
    return jaxpr.replace(eqns=[_equation(eqn) for eqn in jaxpr.eqns])


def _equation(eqn: JaxprEqn) -> JaxprEqn:
    if eqn.primitive.name in FORMS:
        form = FORMS[eqn.primitive.name](eqn)
        return eqn if form is None else _call_of(form, eqn)
    if not any(map(_concerns, programs_of(eqn))):
        return eqn

    def value(x):
        if isinstance(x, ClosedJaxpr):
            return fast_in_loops(x)
        if isinstance(x, Jaxpr):
            return _rewritten(x)
        return type(x)(map(value, x)) if type(x) in (tuple, list) else x

    return eqn.replace(params={name: value(x) for name, x in eqn.params.items()})


def _call_of(form: Callable, eqn: JaxprEqn) -> JaxprEqn:
    """One call in the old equation's place: a program with operands and results of the same types."""
    operands: list[Any] = [v.aval for v in eqn.invars]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
    call = jax.make_jaxpr(jax.jit(form))(*shapes).jaxpr.eqns[0]
    return eqn.replace(primitive=call.primitive, params=call.params)
