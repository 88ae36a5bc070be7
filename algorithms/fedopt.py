"""FedOpt (Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithms 1 and 2).

FedAvg whose server treats the mean update as a pseudo-gradient. FedAdagrad, FedAdam and FedYogi differ
in one line, how the second moment moves. As in algorithm 2 there is no bias correction, the second
moment starts at tau^2, and tau is added outside the root; optax's namesakes differ in all three.

Kept per client: nothing, or the client optimizer's state by choice. Travels: a model each way.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg


class Moments(NamedTuple):
    """``m`` and ``v`` of algorithm 2, shaped as the parameters."""

    m: Any
    v: Any


def fedopt(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    server_optimizer: optax.GradientTransformation,
    **local_work: Any,
) -> fl.Round:
    """FedAvg with any optax optimizer on the server (algorithm 1).

    Args:
      model: the model.
      client_optimizer: the local optimizer.
      server_optimizer: applied to the negated mean update.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.
    """
    return fedavg(model, client_optimizer, server_optimizer=server_optimizer, **local_work)


def adaptive(
    second_moment: Callable[[jax.Array, jax.Array], jax.Array],
    learning_rate: Any,
    beta1: Any,
    tau: Any,
) -> optax.GradientTransformation:
    """The server's update of algorithm 2, as an optax transformation.

    Args:
      second_moment: ``(v, squared update) -> v``.
      learning_rate: the paper's eta.
      beta1: decay of the first moment.
      tau: degree of adaptivity; larger is less adaptive.
    """
    for value, name in ((learning_rate, "server_learning_rate"), (tau, "tau")):
        fl.checks.positive(value, name)
    fl.checks.probability(beta1, "beta1")

    def init(params):
        return Moments(
            jax.tree.map(jnp.zeros_like, params),
            jax.tree.map(lambda p: jnp.full_like(p, tau**2), params),
        )

    def update(updates, state, params=None):
        m = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.m, updates)
        v = jax.tree.map(lambda v, g: second_moment(v, g * g), state.v, updates)
        step = jax.tree.map(lambda m, v: -learning_rate * m / (jnp.sqrt(v) + tau), m, v)
        return step, Moments(m, v)

    return optax.GradientTransformation(init, update)
