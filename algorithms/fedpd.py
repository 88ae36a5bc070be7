"""FedPD (Zhang et al., "FedPD: A Federated Learning Framework with Adaptivity to Non-IID Data", IEEE TSP 2021,
algorithm 1): federated ADMM.

Client k minimises its augmented Lagrangian ``F_k(x) + <lam_k, x - x_0> + 1/(2 eta) |x - x_0|^2`` from where it last
stopped, sets ``lam_k += (x_k - x_0)/eta``, and the server's ``x_0`` is the mean of the ``x_k + eta lam_k``. With
probability ``p`` a communication is skipped and the client goes on with its own ``x_k + eta lam_k`` for ``x_0``.
Kept per client: ``x_k`` and ``lam_k``, two models. Travels: a model down; a model and one number up.

Deviations: clients upload what ``x_k + eta lam_k`` changed by, and the server keeps the mean over all clients that
ever took part, so that a round may have a cohort (as in FedADMM, Gong et al., ICDE 2022); with everyone in every
round it is the paper's. A round here is what happens between two communications, a random number of the paper's
rounds. The paper's mean is uniform; other ``p_k`` weigh it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

import fedjax_lab as fl
from algorithms.fedavg import FedAvgState, fedavg
from fedjax_lab.ownership import shared, where_own


class FedPDServer(NamedTuple):
    """FedAvg's state, whose model is ``x_0``; the weight of all who ever took part, over the population's size."""

    inner: FedAvgState
    known: jax.Array


class FedPDClient(NamedTuple):
    """A client's ``x``, its dual variable ``lam``, and whether it never took part before (1 or 0)."""

    x: Any
    lam: Any
    new: jax.Array


def fedpd(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    eta: Any,
    p: Any = 0.0,
    weighting: Any = "examples",
    **local_work: Any,
) -> fl.Round:
    """Primal-dual splitting: clients agree on one model through dual variables of their own.

    Args:
      model: the model.
      client_optimizer: the solver of the local problem, the paper's oracle.
      eta: the paper's eta, one over the penalty's strength.
      p: probability that a communication is skipped, below 1.
      weighting: p_k of the objective; ``"uniform"`` is the paper's.
      **local_work: as for :func:`algorithms.fedavg.fedavg`, for each solution of the local problem.

    Raises:
      ValueError: an ``eta`` that isn't positive, a ``p`` outside 0..1 or of 1.
    """
    fl.checks.positive(eta, "eta")
    fl.checks.probability(p, "p")
    if not isinstance(p, Tracer) and p == 1:
        raise ValueError("p must be below 1: with 1 the clients would never communicate")
    fl.checks.absent(local_work, "keep_optimizer_state", "FedPD's clients keep x and lam, and solve anew each time")
    base = fedavg(model, client_optimizer, weighting=weighting, **local_work)

    def init(key, data, params=None):
        return FedPDServer(base.init(key, data, params), jnp.float32(0))

    def init_client(server, client):
        params = server.inner.variables.params
        return FedPDClient(params, jax.tree.map(jnp.zeros_like, params), jnp.float32(1))

    def client_update(message, state, client, key, tilt=fl.identity):
        plus = lambda x, lam: jax.tree.map(lambda x, d: (x + eta * d).astype(x.dtype), x, lam)

        def primal_dual(x_0, x, lam, model_state, key):
            lagrangian = fl.chain_tilts(tilt, fl.shift(lambda params: lam), fl.proximal(1 / eta, x_0))
            run = base.local(fl.Variables(x, model_state), client, key, lagrangian)
            x = run.variables.params
            rate = jnp.where(run.steps > 0, 1 / eta, 0)
            lam = jax.tree.map(lambda d, x, c: (d + rate * (x - c)).astype(d.dtype), lam, x, x_0)
            return run, shared(client, lam)

        def skipped(i, carry):
            x_0, x, lam, model_state = carry
            run, lam = primal_dual(x_0, x, lam, model_state, jax.random.fold_in(key, i + 1))
            x, model_state = run.variables
            return plus(x, lam), x, lam, model_state

        # What is the client's own comes with the message, as whoever keeps it made it.
        x_0, x, lam = message.params, where_own(client, message.params, state.x), shared(client, state.lam)
        model_state = message.model_state
        if not isinstance(p, int | float) or p > 0:
            # The same number for everyone: it is drawn from the round's public key.
            count = jax.random.geometric(jax.random.fold_in(client.env.key, 0x5C1), 1 - p) - 1
            x_0, x, lam, model_state = fl.client_loop(client, count, skipped, (x_0, x, lam, model_state))
        run, lam = primal_dual(x_0, x, lam, model_state, key)
        new = fl.Variables(plus(run.variables.params, lam), run.variables.model_state)
        old = fl.Variables(plus(state.x, state.lam), message.model_state)
        return fl.ClientOutput(
            upload=(fl.difference(new, old), state.new),
            weight=fl.client_weight(weighting, client),
            state=FedPDClient(run.variables.params, lam, jnp.float32(0)),
            metrics={"loss": run.loss},
            trained=run._replace(start=message),
        )

    def server_update(server, aggregate, key):
        (moved, model_state), new = aggregate
        known = server.known + new
        params = jax.tree.map(lambda z: z / known, moved)
        inner, metrics = base.server_update(server.inner, fl.Variables(params, model_state), key)
        return FedPDServer(inner, known), metrics

    everyone = fl.population_mean()
    return fl.nested(
        base,
        message=False,
        init=init,
        init_client=init_client,
        client_update=client_update,
        aggregate=fl.aggregators.pair(fl.aggregators.pair(everyone, fl.aggregators.mean()), everyone),
        server_update=server_update,
        traits=base.traits | {"remembering"},
    )
