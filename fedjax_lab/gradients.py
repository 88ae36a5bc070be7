"""Gradients besides those that local steps follow: of all a client's data, and the mean of a run's own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from fedjax_lab import checks
from fedjax_lab.client import ClientData
from fedjax_lab.local import ClientOptimizer, optimizer_of_round
from fedjax_lab.models.base import Variables
from fedjax_lab.round import Oracle, Trained

PyTree = Any


def client_gradient(
    oracle: Oracle, variables: Variables, client: ClientData, key: jax.Array, passes: jax.Array | int = 1
) -> tuple[PyTree, jax.Array]:
    """The gradient at ``variables`` over all of a client's examples, and the mean loss.

    Args:
      oracle: gives a batch's mean gradient; ``tilt(fl.gradient_oracle(round.loss))`` in most transforms.
      variables: where; the model state is read and not changed.
      client: whose examples, read in pieces of ``client.tile``.
      key: for models with dropout.
      passes: 0 reads nothing and gives zeros, where only some rounds need the gradient; may be traced.

    Returns:
      ``(grads, loss: float32[])``, the former shaped and typed as the parameters; zeros for an empty client.
    """

    def add(carry, batch, mask, positions, _):
        grads, loss, t = carry
        inputs = (variables.model_state, batch, mask)
        g, (value, _) = oracle(variables.params, inputs, jax.random.fold_in(key, t))
        share = jnp.sum(mask) / jnp.maximum(client.size, 1)
        grads = jax.tree.map(lambda a, b: a + share.astype(a.dtype) * b.astype(a.dtype), grads, g)
        return grads, loss + (share * value).astype(loss.dtype), t + 1

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), variables.params)
    grads, loss, _ = client.fold(add, (zeros, jnp.float32(0), jnp.int32(0)), epochs=passes)
    return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, variables.params), loss


class Recorded(NamedTuple):
    """A client optimizer's own state ``inner``, and the ``total`` of what was recorded, at least float32."""

    inner: Any
    total: PyTree


def plain_rate(optimizer: ClientOptimizer) -> float | None:
    """The learning rate of plain gradient descent; ``None`` for every other optimizer, and for a traced rate.

    It is asked with gradients of several sizes, at parameters that aren't zero: momentum, schedules, clipping,
    normalisation, weight decay and rates that differ by leaf show.
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        return None
    with jax.ensure_compile_time_eval():
        params = {"matrix": jnp.full((2, 3), 0.7), "vector": jnp.full(2, -0.3)}
        ratios = []
        try:
            state = optimizer.init(params)
            if jax.tree.leaves(state):
                return None
            for size in (1.0, -1e-4, 1e5):
                updates, _ = optimizer.update(jax.tree.map(lambda p, size=size: size * p, params), state, params)
                ratios += jax.tree.leaves(jax.tree.map(lambda u, p, size=size: -u / (size * p), updates, params))
        except Exception:  # written for other parameters: there is nothing to learn from it
            return None
        if any(isinstance(ratio, Tracer) for ratio in ratios):
            return None
        rates = np.concatenate([np.ravel(ratio) for ratio in ratios]).astype(np.float64)
    return float(rates[0]) if np.allclose(rates, rates[0], rtol=1e-5, atol=0) and rates[0] > 0 else None


def recording(
    optimizer: ClientOptimizer,
    what: Callable[[PyTree, PyTree, PyTree], PyTree] = lambda grads, params, updates: grads,
) -> ClientOptimizer:
    """The same client optimizer, which adds up something over its steps; gradients by default.

    For what is needed of a run's steps besides its last parameters: :func:`mean_recorded` reads it.

    Args:
      optimizer: from optax, or a function of the round number.
      what: ``(grads, params, updates) -> tree`` shaped as the parameters.
    """
    checks.client_optimizer(optimizer)
    if not isinstance(optimizer, optax.GradientTransformation):
        of_round: Any = lambda round_number: recording(optimizer_of_round(optimizer, round_number), what)
        return of_round
    inner = optax.with_extra_args_support(optimizer)

    def init(params):
        return Recorded(inner.init(params), _zeros(params))

    def update(updates, state, params=None, **extra):
        moves, own = inner.update(updates, state.inner, params, **extra)
        total = jax.tree.map(lambda t, x: t + x.astype(t.dtype), state.total, what(updates, params, moves))
        return moves, Recorded(own, total)

    return optax.GradientTransformationExtraArgs(init, update)


def mean_recorded(trained: Trained) -> PyTree:
    """The mean over a run's steps of what :func:`recording` added up; zeros after no step.

    Raises:
      ValueError: while a Process is built, if the run's optimizer didn't record.
    """
    if not isinstance(trained.opt_state, Recorded):
        raise ValueError("this needs a Round whose client_optimizer is fl.recording(optimizer)")
    return jax.tree.map(lambda t: t / jnp.maximum(trained.steps, 1), trained.opt_state.total)


def forget_recorded(state: PyTree) -> PyTree:
    """The same client state, recording from zero again (an optimizer's state may be kept between rounds)."""
    blank = lambda s: s._replace(total=_zeros(s.total)) if isinstance(s, Recorded) else s
    return jax.tree.map(blank, state, is_leaf=lambda s: isinstance(s, Recorded))


def _zeros(params):
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
