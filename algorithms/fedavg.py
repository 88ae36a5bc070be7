"""FedAvg (McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, algorithm 1), with a server optimizer (Reddi et al., "Adaptive Federated Optimization",
ICLR 2021, algorithm 1: the mean update is a pseudo-gradient).

Kept per client: nothing, or the client optimizer's state by choice. Travels: a model each way.
"""

from typing import Any, NamedTuple

import jax
import optax

import fedjax_lab as fl


class FedAvgState(NamedTuple):
    """``variables`` of the global model and the server optimizer's ``opt_state``."""

    variables: fl.Variables
    opt_state: Any


def fedavg(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    epochs: fl.Work | None = None,
    steps: fl.Work | None = None,
    batch_size: int | None = 10,
    weighting: Any = "examples",
    server_optimizer: optax.GradientTransformation = optax.sgd(1.0),
    keep_optimizer_state: bool = False,
    static: bool = False,
) -> fl.Round:
    """Clients train locally from the global model; the server applies the mean of their updates.

    Args:
      model: the model.
      client_optimizer: from optax, or a function of the round number that gives one.
      epochs: passes over a client's examples each round, the paper's E; 1 by default. An integer, or a
        function ``(client, key) -> epochs`` for clients that do unequal work.
      steps: local steps instead of epochs.
      batch_size: the paper's B; ``None`` is its B = infinity.
      weighting: p_k of the objective, ``"examples"``, ``"uniform"``, or an array over the population.
      server_optimizer: what the server does with the mean update; plain averaging by default.
      keep_optimizer_state: each client keeps its optimizer's state between its rounds, rather than
        starting afresh.
      static: compute a number of steps known when compiled, so that ``jax.grad`` goes through rounds; see
        :func:`fedjax_lab.local_training`.
    """
    model = fl.as_model(model)
    fl.checks.optimizer(server_optimizer, "server_optimizer")
    fl.goes_downhill(server_optimizer, "server_optimizer")
    fl.checks.weighting(weighting)
    local = fl.local_training(model, client_optimizer, epochs=epochs, steps=steps, batch_size=batch_size, static=static)

    def init(key, data, params=None):
        variables = fl.initial_variables(model, key, data, params)
        return FedAvgState(variables, server_optimizer.init(variables.params))

    def init_client(server, client):
        return _fresh_optimizer(client_optimizer, server.variables.params) if keep_optimizer_state else ()

    def broadcast(server, state, client, key):
        return server.variables

    def client_update(message, state, client, key, tilt=fl.identity):
        trained = local(message, client, key, tilt, state if keep_optimizer_state else None)
        return fl.ClientOutput(
            upload=fl.difference(trained.variables, message),
            weight=fl.client_weight(weighting, client),
            state=trained.opt_state if keep_optimizer_state else (),
            metrics={"loss": trained.loss},
            trained=trained,
        )

    def server_update(server, update, key):
        pseudo_gradient = jax.tree.map(lambda u: -u, update.params)
        params = server.variables.params
        updates, opt_state = server_optimizer.update(pseudo_gradient, server.opt_state, params)
        model_state = fl.add(server.variables.model_state, update.model_state)
        return FedAvgState(fl.Variables(optax.apply_updates(params, updates), model_state), opt_state), {}

    return fl.Round(
        init=init,
        init_client=init_client,
        broadcast=broadcast,
        client_update=client_update,
        aggregate=fl.aggregators.mean(),
        server_update=server_update,
        personalize=lambda message, state, client, key: message,
        local=local,
        loss=model.loss,
        metrics=model.metrics,
        model=fl.Lens(lambda s: s.variables, lambda s, v: s._replace(variables=v)),
        view=fl.Lens(lambda m: m, lambda m, v: v),
    )


def _fresh_optimizer(optimizer, params):
    return fl.optimizer_of_round(optimizer, 0).init(params)
