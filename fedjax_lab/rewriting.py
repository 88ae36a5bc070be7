"""Programs in the form that XLA:CPU runs fast inside loops.

A client's turn is a loop of training steps. XLA's CPU backend finds its fast kernels for what stands outside of loops
and misses some of them in a loop's body. So the traced turn is rewritten: some equations are replaced by others that
compute the same. The user's model is not touched. Which ones, and what that brings, is told in ``convolutions.py``,
``pooling.py`` and ``products.py``.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

from fedjax_lab import convolutions, pooling, products

# For each primitive: the equation -> a function of its operands that gives the same, or None to leave it as it is.
Forms = dict[str, Callable[[JaxprEqn], Callable | None]]
# Two equations -> a function of the operands of both, each once, that gives the results of both, or None.
Together = Callable[[JaxprEqn, JaxprEqn], Callable | None]


def fast_in_loops(program: ClosedJaxpr) -> ClosedJaxpr:
    """The program with its equations replaced, those in its loops included.

    Whatever it runs on: a device of two threads sums in the same order as two devices of one.
    """
    forms: Forms = {**convolutions.FORMS, **pooling.FORMS, **products.FORMS}
    return in_forms(program, forms, convolutions.both_gradients)


def in_forms(program: ClosedJaxpr, forms: Forms, together: Together | None = None) -> ClosedJaxpr:
    """The program with equations in other forms, those in its loops included."""
    if not _concerns(program.jaxpr, forms):
        return program
    return program.replace(jaxpr=_rewritten(program.jaxpr, forms, together))


def programs_of(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The programs among an equation's parameters: bodies of loops, branches, calls."""
    for value in eqn.params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each


def _concerns(jaxpr: Jaxpr, forms: Forms) -> bool:
    return any(e.primitive.name in forms or any(_concerns(p, forms) for p in programs_of(e)) for e in jaxpr.eqns)


def _rewritten(jaxpr: Jaxpr, forms: Forms, together: Together | None) -> Jaxpr:
    eqns, done = list(jaxpr.eqns), []
    convs = [eqn for eqn in eqns if together and eqn.primitive.name == convolutions.CONVOLUTION]
    for first, second in itertools.permutations(convs, 2):
        if form := together and together(first, second):
            operands = [*first.invars, *(v for v in second.invars if v not in first.invars)]
            both = _call_of(form, second, operands, [*first.outvars, *second.outvars])
            if replaced := _in_place_of(first, second, both, eqns):
                eqns, done = replaced, [*done, both]
    eqns = _of_use(jaxpr.replace(eqns=eqns))
    return jaxpr.replace(eqns=[eqn if eqn in done else _equation(eqn, forms, together) for eqn in eqns])


def _of_use(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """The equations that something is made of: XLA would drop the others, but JAX makes text of all of them first."""
    of_use, read = [], {v for v in jaxpr.outvars if isinstance(v, Var)}
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in read for v in eqn.outvars):
            of_use.append(eqn)
            read.update(v for v in eqn.invars if isinstance(v, Var))
    return of_use[::-1]


def _in_place_of(first: JaxprEqn, second: JaxprEqn, both: JaxprEqn, eqns: list[JaxprEqn]) -> list[JaxprEqn] | None:
    """The equations with one for two, where the later was; None if that needs a result of the earlier."""
    begin, end = sorted((eqns.index(first), eqns.index(second)))
    results, before, after = set(eqns[begin].outvars), [], []
    needs = lambda eqn: any(isinstance(v, Var) and v in results for v in eqn.invars)
    for eqn in eqns[begin + 1 : end]:
        if needs(eqn):
            after.append(eqn)
            results.update(eqn.outvars)
        else:
            before.append(eqn)
    return None if needs(both) else [*eqns[:begin], *before, both, *after, *eqns[end + 1 :]]


def _equation(eqn: JaxprEqn, forms: Forms, together: Together | None) -> JaxprEqn:
    if eqn.primitive.name in forms:
        form = forms[eqn.primitive.name](eqn)
        return eqn if form is None else _call_of(form, eqn, eqn.invars, eqn.outvars)
    if not any(_concerns(program, forms) for program in programs_of(eqn)):
        return eqn

    def value(x):
        if isinstance(x, ClosedJaxpr):
            return x.replace(jaxpr=_rewritten(x.jaxpr, forms, together))
        if isinstance(x, Jaxpr):
            return _rewritten(x, forms, together)
        return type(x)(map(value, x)) if type(x) in (tuple, list) else x

    return eqn.replace(params={name: value(x) for name, x in eqn.params.items()})


def _call_of(form: Callable, eqn: JaxprEqn, operands: Sequence[Any], results: Sequence[Any]) -> JaxprEqn:
    """One call in an equation's place, of operands and with results of the same types."""
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in operands]
    call = jax.make_jaxpr(jax.jit(form))(*shapes).jaxpr.eqns[0]
    return eqn.replace(primitive=call.primitive, params=call.params, invars=[*operands], outvars=[*results])
