"""A function traced once: run from its program, and looked into for what a step of it costs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import core
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from fedjax_lab import convolutions, rewriting

PyTree = Any


class Program(NamedTuple):
    """A traced function.

    Attributes:
      call: the function, for arguments of the shapes it was traced with.
      consts: arrays that the function closed over.
      given: ``consts -> call``, for others in their place.
      jaxpr: its equations.
      structure: of the result.
      flops: floating-point operations of its matrix products and convolutions, a loop's body counted once:
        for a client's turn, about those of one training step.
    """

    call: Callable
    consts: list[Any]
    given: Callable[[list[Any]], Callable]
    jaxpr: Jaxpr
    structure: Any
    flops: float

    @property
    def results(self) -> PyTree:
        """Shapes of what it gives."""
        arrays: list[Any] = [v.aval for v in self.jaxpr.outvars]
        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
        return jax.tree.unflatten(self.structure, shapes)


def trace(function: Callable, *arguments: PyTree) -> Program:
    """Trace a function of pytrees; on a CPU some of its equations get the form that is fast in loops.

    Args:
      function: of pytrees of arrays.
      *arguments: what it will be called with, or their shapes.
    """
    traced, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    cost = flops(traced.jaxpr)
    if jax.default_backend() == "cpu":
        traced = rewriting.fast_in_loops(traced)
    return _program(traced, jax.tree.structure(shape), cost)


def rewritten(program: Program, forms: rewriting.Forms) -> Program:
    """The same, with equations in other forms, those in its loops included."""
    closed = rewriting.in_forms(ClosedJaxpr(program.jaxpr, program.consts), forms)
    return _program(closed, program.structure, program.flops)


def _program(traced: ClosedJaxpr, structure: Any, cost: float) -> Program:
    def given(consts: list[Any]) -> Callable:
        def call(*arguments):
            out = core.eval_jaxpr(traced.jaxpr, consts, *jax.tree.leaves(arguments))
            return jax.tree.unflatten(structure, out)

        return call

    return Program(given(traced.consts), traced.consts, given, traced.jaxpr, structure, cost)


def flops(jaxpr: Jaxpr) -> float:
    """Multiplications and additions in a program's matrix products and convolutions, loops counted once."""
    return sum(map(flops_of, jaxpr.eqns)) + sum(flops(sub) for eqn in jaxpr.eqns for sub in rewriting.programs_of(eqn))


def flops_of(eqn: JaxprEqn) -> float:
    """Those of an equation itself, without its programs'."""
    shape: Callable[[Any], tuple[int, ...]] = lambda v: v.aval.shape
    size = lambda v: math.prod(shape(v))
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * size(eqn.outvars[0]) * math.prod(shape(eqn.invars[0])[i] for i in contracted)
    if eqn.primitive.name == convolutions.CONVOLUTION:
        kernel = shape(eqn.invars[1])
        outputs = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * size(eqn.outvars[0]) * math.prod(kernel) / outputs
    return 0.0
