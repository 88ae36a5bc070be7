"""Is a loss differentiable twice, as far as its equations tell? Second-order methods ask before they start."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from fedjax_lab import checks
from fedjax_lab.models.base import Variables

PyTree = Any
_CUTS = frozenset(("stop_gradient", "round", "floor", "ceil"))


class Needs(NamedTuple):
    """The parameters that a value depends on: in any way, and through derivatives."""

    any: frozenset[int] = frozenset()
    smooth: frozenset[int] = frozenset()


def twice_differentiable(loss: Callable, variables: Variables, batch: PyTree, who: str, forward: bool = True) -> None:
    """Refuse a loss whose second derivatives are zero because its equations lose them.

    That is so where parameters are integers, or reach the loss, or another parameter's gradient, only through
    ``stop_gradient``, rounding or integers; or through a function whose own derivative can't be differentiated again.
    Comparisons don't count: a ReLU's gradient is as it should be. Nor does a ``stop_gradient`` beside which there is
    another way, such as the maximum that a softmax takes off.

    Args:
      loss: a model's.
      variables: its parameters and state, or their shapes.
      batch: examples, or their shapes.
      who: of the message.
      forward: whether gradients will be differentiated by ``jax.jvp``, for which not every function has a rule.

    Raises:
      ValueError: as said, with the parameter's name.
    """
    instead = "use form='first_order', or change the model"
    names = [name for name, _ in checks.named_leaves(variables.params)]
    for name, leaf in checks.named_leaves(variables.params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise ValueError(f"{who} differentiates parameters, but {name} is {jnp.result_type(leaf)}: {instead}")
    params, state = variables
    rows = jax.tree.leaves(batch)[0].shape[0]
    key = jax.eval_shape(lambda: jax.random.key(0))

    def mean(params, state, batch, key):
        return jnp.mean(loss(params, state, batch, jnp.ones(rows, bool), key, True)[0])

    inputs = (params, state, batch, key)
    value = _needs(jax.make_jaxpr(mean)(*inputs), len(names))[0]
    for i, name in enumerate(names):
        if i in value.any - value.smooth:
            raise ValueError(
                f"{who} needs second derivatives, but the loss depends on {name} only through stop_gradient, rounding "
                f"or integers, which have none: {instead}"
            )
    program = jax.make_jaxpr(jax.grad(mean))(*inputs)
    try:
        if forward:
            jax.eval_shape(lambda p, *rest: jax.jvp(lambda q: jax.grad(mean)(q, *rest), (p,), (p,))[1], *inputs)
    except (TypeError, ValueError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        instead = "use form='hessian_free' or 'first_order'"
        raise ValueError(f"{who} needs second derivatives, which the loss doesn't have ({why}): {instead}") from error
    for name, gradient in zip(names, _needs(program, len(names)), strict=True):
        lost = gradient.any - gradient.smooth
        if lost:
            raise ValueError(
                f"{who} needs second derivatives, but the gradient of {name} depends on {names[min(lost)]} only "
                f"through stop_gradient, rounding or integers, which have none: {instead}"
            )


def _needs(program: ClosedJaxpr, count: int) -> list[Needs]:
    own = [Needs(frozenset((i,)), frozenset((i,))) for i in range(count)]
    rest = [Needs()] * (len(program.jaxpr.invars) - count)
    return _follow(program, own + rest)


def _follow(program: ClosedJaxpr | Jaxpr, values: Sequence[Needs]) -> list[Needs]:
    jaxpr = getattr(program, "jaxpr", program)
    known: dict[Any, Needs] = dict.fromkeys(jaxpr.constvars, Needs())
    known.update(zip(jaxpr.invars, values, strict=True))
    read = lambda v: Needs() if isinstance(v, Literal) else known[v]
    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _equation(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _equation(eqn: Any, values: list[Needs]) -> list[Needs]:
    inner = [p for p in eqn.params.values() if isinstance(p, Jaxpr | ClosedJaxpr)]
    inner = [p for p in inner if len(getattr(p, "jaxpr", p).invars) == len(values)]
    name = eqn.primitive.name
    if name == "scan" and len(inner) == 1:
        out = _scan(eqn, inner[0], values)
    elif name == "cond":
        each = zip(*(_follow(branch, values[1:]) for branch in eqn.params["branches"]), strict=True)
        out = [Needs(*(frozenset().union(*(n[i] for n in needs)) for i in range(2))) for needs in each]
    elif len(inner) == 1 and name != "while":
        out = _follow(inner[0], values)
    else:
        # A comparison's result, or a sign, is no way at all: almost everywhere it doesn't change.
        together = Needs(*(frozenset().union(*(v[i] for v in values)) for i in range(2)))
        together = Needs() if name == "sign" else together
        out = [Needs(together.any) if name in _CUTS else together for _ in eqn.outvars]
    return [_typed(need, v.aval.dtype) for need, v in zip(out, eqn.outvars, strict=True)]


def _typed(need: Needs, dtype: Any) -> Needs:
    if dtype == jnp.bool_:
        return Needs()
    return need if jnp.issubdtype(dtype, jnp.inexact) else Needs(need.any)


def _scan(eqn: Any, body: ClosedJaxpr | Jaxpr, values: list[Needs]) -> list[Needs]:
    """To the fixed point: what the carry depends on grows until it stays."""
    is_row = lambda outside, inside: outside.aval.ndim > inside.aval.ndim
    jaxpr = getattr(body, "jaxpr", body)
    rows = sum(map(is_row, eqn.invars, jaxpr.invars))
    carried = len(eqn.outvars) - sum(map(is_row, eqn.outvars, jaxpr.outvars))
    first = len(values) - rows - carried
    while True:
        out = _follow(body, values)
        grown = [Needs(a.any | b.any, a.smooth | b.smooth) for a, b in zip(values[first:], out[:carried], strict=False)]
        grown = grown[:carried]
        if grown == values[first : first + carried]:
            return out
        values = [*values[:first], *grown, *values[first + carried :]]
