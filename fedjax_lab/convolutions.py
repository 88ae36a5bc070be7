"""Convolutions that keep XLA's fast CPU kernel inside loops.

Outside a loop XLA brings a convolution's operands into the layout that its CPU kernel wants. In the body of a
``scan`` or ``while`` it leaves those of the gradients as they are, and falls back to code that is some 20
times slower (jax 0.10: one training step of a small CNN took 35 ms outside a loop and 800 ms inside). Here the
traced function is rewritten instead: every convolution gets its operands as NHWC and HWIO by explicit transposes.
The user's model is not touched, and the numbers are the same sums.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

CONVOLUTION = "conv_general_dilated"


def canonical_everywhere(program: ClosedJaxpr) -> ClosedJaxpr:
    """The program with every convolution canonical, those in its loops included."""
    return program.replace(jaxpr=_rewritten(program.jaxpr)) if count(program.jaxpr) else program


def count(jaxpr: Jaxpr) -> int:
    """How many convolutions the program has, those of its loops included."""
    own = sum(eqn.primitive.name == CONVOLUTION for eqn in jaxpr.eqns)
    return own + sum(count(sub) for eqn in jaxpr.eqns for sub in programs_of(eqn))


def programs_of(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The programs among an equation's parameters: bodies of loops, branches, calls."""
    for value in eqn.params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each


def _rewritten(jaxpr: Jaxpr) -> Jaxpr:
    return jaxpr.replace(eqns=[_equation(eqn) for eqn in jaxpr.eqns])


def _equation(eqn: JaxprEqn) -> JaxprEqn:
    if eqn.primitive.name == CONVOLUTION:
        return _as_canonical(eqn)
    if not any(count(sub) for sub in programs_of(eqn)):
        return eqn

    def value(x):
        if isinstance(x, ClosedJaxpr):
            return canonical_everywhere(x)
        if isinstance(x, Jaxpr):
            return _rewritten(x)
        return type(x)(map(value, x)) if type(x) in (tuple, list) else x

    return eqn.replace(params={name: value(x) for name, x in eqn.params.items()})


def _as_canonical(eqn: JaxprEqn) -> JaxprEqn:
    """The same convolution between transposes, as one call: a program of the same types in the old one's place."""
    operands: list[Any] = [v.aval for v in eqn.invars]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
    call = jax.make_jaxpr(jax.jit(lambda lhs, rhs: canonical(lhs, rhs, eqn.params)))(*shapes).jaxpr.eqns[0]
    return eqn.replace(primitive=call.primitive, params=call.params)


def canonical(lhs: jax.Array, rhs: jax.Array, params: dict[str, Any]) -> jax.Array:
    """``lax.conv_general_dilated`` with these parameters, by way of NHWC, HWIO and NHWC."""
    names = params["dimension_numbers"]
    first, kernel, out = names.lhs_spec, names.rhs_spec, names.out_spec  # each (batch, feature, *space)
    last = lambda spec: (spec[0], *spec[2:], spec[1])
    lhs = lax.transpose(lhs, last(first))
    rhs = lax.transpose(rhs, (*kernel[2:], kernel[1], kernel[0]))
    space = "DHW"[-(lhs.ndim - 2) :] if lhs.ndim > 2 else ""
    layout = (f"N{space}C", f"{space}IO", f"N{space}C")
    result = lax.conv_general_dilated(
        lhs,
        rhs,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        lax.conv_dimension_numbers(lhs.shape, rhs.shape, layout),
        params["feature_group_count"],
        params["batch_group_count"],
        params["precision"],
        params["preferred_element_type"],
    )
    return lax.transpose(result, tuple(int(i) for i in np.argsort(last(out))))
