"""Does an optimizer go downhill? An optax optimizer doesn't show its learning rate, but it can be asked."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

PyTree = Any

PATIENCE = 1000  # steps that an optimizer may gather gradients, or warm up, before it moves


def goes_downhill(optimizer: optax.GradientTransformation, name: str) -> None:
    """Refuse an optimizer whose learning rate is zero, negative or not finite.

    It is given a matrix and a vector at 0 with gradient 1. The first of ``PATIENCE`` steps that moves anything
    must move something down; a mask by shape may freeze or pass over the rest. An optimizer that asks for
    particular parameters, or whose hyper-parameters are traced (a sweep's), can't be asked so, and passes.

    Raises:
      ValueError: it searches along a line; it goes uphill, or nowhere. The latter may be meant, where it picks
        parameters by their names: as a function of the round, ``lambda r: optimizer``, a client optimizer isn't asked.
    """
    with jax.ensure_compile_time_eval():
        first = _first_step(optimizer, name)
        if first is None:
            return
        gradients, updates, state = first
        later = jax.jit(optimizer.update)
        for _ in range(PATIENCE):
            moves = _moves(updates)
            if moves is None:
                return
            if moves.any():
                break
            updates, state = later(gradients, state, jax.tree.map(jnp.zeros_like, gradients))
    if np.isfinite(moves).all() and moves.min() < 0:
        return
    what = f"moves parameters of gradient 1 by {moves.max():+g}, not downhill" if moves.any() else "moves nothing"
    raise ValueError(f"{name} {what}: its learning rate must be positive and finite")


def begins_downhill(make: Callable[[Any], optax.GradientTransformation], name: str) -> None:
    """Refuse a function of the round whose optimizer of round 0 goes uphill; one that goes nowhere may be meant.

    Raises:
      ValueError: it goes uphill.
    """
    with jax.ensure_compile_time_eval():
        try:
            optimizer = make(np.int32(0))  # NumPy's: its arithmetic compiles nothing
        except Exception:  # written for a traced round: there is nothing to learn from it
            return
        if not isinstance(optimizer, optax.GradientTransformation):
            return
        first = _first_step(optimizer, name)
        moves = None if first is None else _moves(first[1])
    if moves is not None and moves.max() > 0 and moves.min() >= 0:
        raise ValueError(
            f"{name} moves parameters of gradient 1 by {moves.max():+g} in round 0, not downhill: its learning rate "
            "must be positive"
        )


def _first_step(optimizer: optax.GradientTransformation, name: str) -> tuple[PyTree, PyTree, PyTree] | None:
    """Gradients of 1, what they move parameters at 0 by, and the optimizer's state; ``None`` if it can't be asked.

    NumPy's arrays first: plain arithmetic on them compiles nothing.
    """
    for library in (np, jnp):
        params = {"matrix": library.zeros((2, 2), np.float32), "vector": library.zeros(2, np.float32)}
        gradients = jax.tree.map(library.ones_like, params)
        try:
            with np.errstate(all="ignore"):
                return gradients, *optimizer.update(gradients, optimizer.init(params), params)
        except Exception as error:  # written for other parameters, perhaps: there is nothing to learn from it
            _no_line_search(error, name)
    return None


def _moves(updates: PyTree) -> np.ndarray | None:
    """All updates in a row; ``None`` if they are traced."""
    leaves = jax.tree.leaves(updates)
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return None
    return np.concatenate([np.ravel(leaf).astype(np.float32) for leaf in leaves])


def _no_line_search(error: Exception, name: str) -> None:
    """Refuse an optimizer that wants to evaluate the loss where it likes, which rounds don't let it."""
    if isinstance(error, TypeError) and "value_fn" in str(error):
        raise ValueError(
            f"{name} searches along a line for its step size, for which it wants the loss at points of its choice; "
            "here an optimizer gets gradients only. Give it a learning rate: optax.lbfgs(0.1, linesearch=None)"
        ) from None
