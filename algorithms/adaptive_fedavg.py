"""Adaptive-FedAvg (Canonaco, Bergamasco, Mongelluzzo and Roveri, "Adaptive Federated Learning in Presence of Concept
Drift", IJCNN 2021, algorithm 1).

The server follows the global model's moving mean and variance and sets the clients' learning rate of round t to
``min(eta_0, eta_0 r_t / t)``, where ``r_t`` is the moving ratio of successive variances: it decays while the model
settles, and rises again when the data drift. Kept per client: nothing. Travels: a model and one number down, a model
up. As in implementations of it, the ratio counts as 1 in the first two rounds, which have no variance to compare.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fedjax_lab as fl
from algorithms.fedavg import FedAvgState, fedavg


class Scaled(NamedTuple):
    """The client optimizer's own state, and the factor of its updates, which the server sends."""

    inner: Any
    scale: jax.Array


class Moving(NamedTuple):
    """Moving averages before their bias is corrected: ``mean`` of the parameters, scalar ``variance`` and
    ``ratio`` of variances; ``t``, models seen; ``scale``, the learning rate over eta_0."""

    mean: Any
    variance: jax.Array
    ratio: jax.Array
    t: jax.Array
    scale: jax.Array


class AdaptiveState(NamedTuple):
    """FedAvg's state and the :class:`Moving` averages."""

    inner: FedAvgState
    moving: Moving


class AdaptiveMessage(NamedTuple):
    """The model, and the learning rate over eta_0."""

    inner: fl.Variables
    scale: jax.Array


def adaptive_fedavg(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    beta1: Any = 0.5,
    beta2: Any = 0.5,
    beta3: Any = 0.5,
    decay: bool = True,
    **local_work: Any,
) -> fl.Round:
    """FedAvg whose server lowers the clients' learning rate as the model settles, and raises it when data drift.

    Args:
      model: the model.
      client_optimizer: at the learning rate eta_0; all its steps are scaled by the server's factor.
      beta1: decay of the moving mean.
      beta2: decay of the moving variance.
      beta3: decay of the moving ratio of variances.
      decay: whether the rate is divided by the round's number, from 1.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.

    Raises:
      ValueError: a decay outside 0..1, or of 1.
    """
    for value, name in ((beta1, "beta1"), (beta2, "beta2"), (beta3, "beta3")):
        fl.checks.probability(value, name)
        fl.checks.positive(1 - value, f"{name} must be below 1: 1 - {name}")
    fl.checks.optimizer(client_optimizer, "client_optimizer")
    fl.checks.absent(local_work, "keep_optimizer_state", "each round has a learning rate of its own")
    optimizer: Any = client_optimizer
    rule = optax.with_extra_args_support(optimizer)

    def update(updates, state, params=None, **extra):
        updates, inner = rule.update(updates, state.inner, params, **extra)
        return jax.tree.map(lambda u: state.scale.astype(u.dtype) * u, updates), Scaled(inner, state.scale)

    scaled = optax.GradientTransformationExtraArgs(lambda params: Scaled(rule.init(params), jnp.float32(1)), update)
    base = fedavg(model, scaled, **{**local_work, "keep_optimizer_state": True})

    def init(key, data, params=None):
        inner = base.init(key, data, params)
        nothing = jax.tree.map(jnp.zeros_like, inner.variables.params)
        before = Moving(nothing, jnp.float32(0), jnp.float32(0), jnp.int32(0), jnp.float32(1))
        return AdaptiveState(inner, advance(before, inner.variables.params))

    def advance(old: Moving, params):
        """The averages and the learning rate with which the next round trains, from the model it starts at."""
        t = old.t + 1
        unbiased = lambda x, beta, t: x / jnp.maximum(1 - beta**t, 1e-8)
        centre = jax.tree.map(lambda m: unbiased(m, beta1, old.t), old.mean)
        mean = jax.tree.map(lambda m, w: (beta1 * m + (1 - beta1) * w).astype(m.dtype), old.mean, params)
        distance = optax.tree.norm(fl.difference(params, centre), squared=True) / optax.tree.size(params)
        variance = beta2 * old.variance + (1 - beta2) * distance
        before = unbiased(old.variance, beta2, old.t)
        known = (t > 2) & (before > 0)
        grown = jnp.where(known, unbiased(variance, beta2, t) / jnp.where(known, before, 1), 1)
        ratio = beta3 * old.ratio + (1 - beta3) * grown
        scale = jnp.minimum(1, unbiased(ratio, beta3, t) / (t if decay else 1))
        return Moving(mean, variance, ratio, t, scale)

    def client_update(message, state, client, key, tilt=fl.identity):
        start = Scaled(rule.init(message.inner.params), message.scale)
        return base.client_update(message.inner, start, client, key, tilt)._replace(state=())

    def server_update(server, aggregate, key):
        inner, metrics = base.server_update(server.inner, aggregate, key)
        moving = advance(server.moving, inner.variables.params)
        return AdaptiveState(inner, moving), metrics | {"learning_rate_scale": server.moving.scale}

    return fl.nested(
        base,
        init=init,
        init_client=lambda server, client: (),
        broadcast=lambda server, state, client, key: AdaptiveMessage(server.inner.variables, server.moving.scale),
        client_update=client_update,
        server_update=server_update,
    )
