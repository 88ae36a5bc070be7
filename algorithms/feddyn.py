"""FedDyn (Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021, algorithm 1).

Client k minimises ``F_k(w) - <g_k, w> + alpha/2 |w - w_t|^2`` and then sets ``g_k -= alpha (w_k - w_t)``; the server
keeps ``h -= alpha/N sum_k (w_k - w_t)`` over the cohort and moves to the mean of the ``w_k`` minus ``h / alpha``.
Kept per client: ``g_k``, a model. Travels: a model each way.

Deviations: the local problem is solved by ``client_optimizer`` from ``w_t`` for as long as asked, not exactly; the
fixed point, the minimiser of the global objective, is the same. The paper's means are uniform; other ``p_k`` weigh
both of them, and ``h`` stays the weighted sum of minus the ``g_k``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab.ownership import shared


class FedDynServer(NamedTuple):
    """FedAvg's state ``inner``, the paper's ``h``, and the population's mean weight."""

    inner: Any
    h: Any
    mean_weight: jax.Array


class FedDynClient(NamedTuple):
    """FedAvg's client state ``inner`` and the gradient ``g`` of the client's loss where it last stopped."""

    inner: Any
    g: Any


def feddyn(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    alpha: Any,
    weighting: Any = "examples",
    **local_work: Any,
) -> fl.Round:
    """FedAvg with a regulariser that moves each client's minimum to the global one.

    Args:
      model: the model.
      client_optimizer: the solver of the local problem.
      alpha: the paper's alpha, the regulariser's strength.
      weighting: p_k of the objective; ``"uniform"`` is the paper's.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.

    Raises:
      ValueError: an ``alpha`` that isn't positive.
    """
    fl.checks.positive(alpha, "alpha")
    base = fedavg(model, client_optimizer, weighting=weighting, **local_work)
    zeros = lambda server: jax.tree.map(jnp.zeros_like, server.variables.params)

    def init(key, data, params=None):
        inner = base.init(key, data, params)
        return FedDynServer(inner, zeros(inner), fl.mean_weight(weighting, data))

    def client_update(message, state, client, key, tilt=fl.identity):
        linear = fl.shift(lambda params: jax.tree.map(jnp.negative, shared(client, state.g)))
        regularised = fl.chain_tilts(tilt, linear, fl.proximal(alpha, message.params))
        out = base.client_update(message, state.inner, client, key, regularised)
        g = jax.tree.map(lambda g, u: (g - alpha * u).astype(g.dtype), state.g, out.upload.params)
        return out._replace(state=FedDynClient(out.state, g))

    def server_update(server, aggregate, key):
        mean, moved = aggregate
        h = jax.tree.map(lambda h, m: (h - alpha * m / server.mean_weight).astype(h.dtype), server.h, moved)
        inner, metrics = base.server_update(server.inner, mean, key)
        params = jax.tree.map(lambda w, h: (w - h / alpha).astype(w.dtype), inner.variables.params, h)
        return server._replace(inner=base.model.set(inner, inner.variables._replace(params=params)), h=h), metrics

    both = fl.aggregators.pair(fl.aggregators.mean(), fl.population_mean())
    return fl.nested(
        base,
        message=False,
        init=init,
        init_client=lambda server, client: FedDynClient(base.init_client(server.inner, client), zeros(server.inner)),
        broadcast=lambda server, state, client, key: server.inner.variables,
        client_update=client_update,
        aggregate=both._replace(lift=lambda upload, *rest: both.lift((upload, upload.params), *rest)),
        server_update=server_update,
        traits=base.traits | {"remembering"},
    )
