"""AFL (Mohri, Sivek and Suresh, "Agnostic Federated Learning", ICML 2019, section 5, Stochastic-AFL).

``min_w max_lam sum_k lam_k F_k(w)`` over the simplex: descent in ``w``, and ascent in ``lam`` by each client's loss
at the model it received, projected back. Kept per client: nothing (the server keeps one number for each). Travels:
a model and the client's ``lam_k`` down; a model, its loss and its index up.

Deviations: ``w`` makes FedAvg's local steps and not one gradient step (as in Ro et al., "Communication-Efficient
Agnostic Federated Averaging", 2021), averaged by ``lam_k``; of a cohort the weights are divided by their sum, and
the losses that aren't seen count as zero, those that are count population/survivors times. The last iterate is kept,
not the average.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax.projections import projection_simplex

import fedjax_lab as fl
from algorithms.fedavg import FedAvgState, fedavg


class AFLState(NamedTuple):
    """FedAvg's state, and the mixture ``lam: float32[population]``."""

    inner: FedAvgState
    lam: jax.Array


class AFLMessage(NamedTuple):
    """The model, and this client's weight in the mixture."""

    inner: fl.Variables
    lam: jax.Array


def afl(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    lam_learning_rate: Any,
    weighting: Any = "examples",
    **local_work: Any,
) -> fl.Round:
    """FedAvg for the worst mixture of the clients, which is learned along.

    Args:
      model: the model, whose losses must not be negative.
      client_optimizer: the local optimizer.
      lam_learning_rate: the paper's gamma_lam; 0 is FedAvg with the weights it begins with.
      weighting: the mixture to begin with, p_k; a client whose p_k is 0 may come in.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.

    Raises:
      ValueError: a negative ``lam_learning_rate``.
    """
    fl.checks.not_negative(lam_learning_rate, "lam_learning_rate")
    base = fedavg(model, client_optimizer, weighting=weighting, **local_work)

    def init(key, data, params=None):
        weights = fl.population_weights(weighting, data)
        return AFLState(base.init(key, data, params), weights / jnp.sum(weights))

    def broadcast(server, state, client, key):
        return AFLMessage(server.inner.variables, server.lam[jnp.clip(client.id, 0, server.lam.shape[0] - 1)])

    def client_update(message, state, client, key, tilt=fl.identity):
        out = base.client_update(message.inner, state, client, key, tilt)
        loss = fl.mean_loss(model.loss, message.inner, client, jax.random.fold_in(key, 0xF))
        # Who begins outside the mixture must be heard: a client of weight 0 counts for nothing. Were there only such
        # clients, metrics would be means by these weights, and products of much smaller ones vanish.
        heard = jnp.where(client.size > 0, jnp.maximum(out.weight, 1e-20), 0)
        return out._replace(upload=(out.upload, loss, jnp.int32(client.id)), weight=heard, bytes_up=None)

    def lift(upload, weight, message, env):
        update, loss, me = upload
        # A client outside the mixture still reports its loss: that is how it comes back.
        mine = (env.ids == me).astype(jnp.float32)
        value, total = base.aggregate.lift(update, message.lam, message.inner, env)
        return (value, mine * loss), (total, jnp.float32(1))

    def finish(sums, env):
        (value, losses), (total, count) = sums
        return base.aggregate.finish((value, total), env), losses * env.population / count, env.ids

    def server_update(server, aggregate, key):
        update, losses, ids = aggregate
        inner, metrics = base.server_update(server.inner, update, key)
        lam = projection_simplex(server.lam.at[ids].add(lam_learning_rate * losses, mode="drop"))
        return AFLState(inner, lam), metrics | {"largest_lam": jnp.max(lam)}

    return fl.nested(
        base,
        init=init,
        broadcast=broadcast,
        client_update=client_update,
        aggregate=fl.Aggregator(lift, finish),
        server_update=server_update,
    )
