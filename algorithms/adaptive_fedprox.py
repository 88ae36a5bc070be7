"""FedProx with an adaptive proximal term (Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020,
appendix C.3.3, figure 11).

``mu`` goes up by 0.1 whenever the loss increases, and down by 0.1 when it has decreased for five rounds in a row.
Kept per client: nothing. Travels: a model and mu down; a model and one number up, the client's loss at the model it
received. Deviation: the loss is the cohort's by weight, where the paper evaluates it over all devices.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fedjax_lab as fl
from algorithms.fedavg import FedAvgState, fedavg


class AdaptiveState(NamedTuple):
    """FedAvg's state, ``mu``, the loss of the round before (infinite at first), and for how long it has fallen."""

    inner: FedAvgState
    mu: jax.Array
    loss: jax.Array
    falling: jax.Array


class AdaptiveMessage(NamedTuple):
    """The model, and this round's ``mu``."""

    inner: fl.Variables
    mu: jax.Array


def adaptive_fedprox(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    mu: Any = 0.0,
    change: Any = 0.1,
    patience: int = 5,
    **local_work: Any,
) -> fl.Round:
    """FedProx whose ``mu`` follows the loss: up when it rises, down when it keeps falling.

    Args:
      model: the model.
      client_optimizer: the local solver.
      mu: to begin with; the paper tries the wrong ends, 0 for heterogeneous data and 1 for IID data.
      change: how much ``mu`` goes up or down; 0 is FedProx.
      patience: rounds of falling loss before it goes down.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.

    Raises:
      ValueError: a negative ``mu`` or ``change``, a ``patience`` that isn't positive.
    """
    fl.checks.not_negative(mu, "mu")
    fl.checks.not_negative(change, "change")
    fl.checks.positive(patience, "patience", integer=True)
    base = fedavg(model, client_optimizer, **local_work)

    def init(key, data, params=None):
        start = (jnp.asarray(mu, jnp.float32), jnp.float32(jnp.inf), jnp.int32(0))
        return AdaptiveState(base.init(key, data, params), *start)

    def client_update(message, state, client, key, tilt=fl.identity):
        pull = fl.chain_tilts(fl.proximal(message.mu, message.inner.params), tilt)
        out = base.client_update(message.inner, state, client, key, pull)
        loss = fl.mean_loss(model.loss, message.inner, client, jax.random.fold_in(key, 0xF))
        return out._replace(upload=(out.upload, loss), bytes_up=None)

    def server_update(server, aggregate, key):
        update, loss = aggregate
        inner, metrics = base.server_update(server.inner, update, key)
        falling = jnp.where(loss < server.loss, server.falling + jnp.isfinite(server.loss), 0)
        enough = falling >= patience
        step = jnp.where(loss > server.loss, change, jnp.where(enough, -change, 0))
        new = AdaptiveState(inner, jnp.maximum(server.mu + step, 0), loss, jnp.where(enough, 0, falling))
        return new, metrics | {"mu": new.mu}

    return fl.nested(
        base,
        init=init,
        broadcast=lambda server, state, client, key: AdaptiveMessage(server.inner.variables, server.mu),
        client_update=client_update,
        aggregate=fl.aggregators.pair(base.aggregate, fl.aggregators.mean()),
        server_update=server_update,
    )
