"""Local training: every client trains a model of its own, alone, and nothing travels.

The baseline that federated training has to beat for each client ("local" in Smith et al., "Federated
Multi-Task Learning", NIPS 2017, table 1, and in Li et al., "Ditto", ICML 2021, section 3).

Kept per client: its model. Travels: nothing.
"""

from typing import Any, NamedTuple

import fedjax_lab as fl


class LocalState(NamedTuple):
    """A client's own ``variables``, and its optimizer's ``opt_state``, which goes on from round to round."""

    variables: fl.Variables
    opt_state: Any


def local_only(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    epochs: fl.Work | None = None,
    steps: fl.Work | None = None,
    batch_size: int | None = 10,
    static: bool = False,
) -> fl.Round:
    """Each client trains its own model and never communicates; uploads and messages are empty.

    All start from the same initial model, which is what the server's state stays, and what
    ``process.params`` gives. The models are in the clients' states; evaluation reports them as
    ``personal_...``, and there is no shared model to evaluate beside them.

    Args:
      model: the model.
      client_optimizer: from optax, or a function of the round number that gives one.
      epochs: passes over a client's examples each round; 1 by default.
      steps: local steps instead of epochs.
      batch_size: examples a step; ``None`` is all of the client's.
      static: as for :func:`algorithms.fedavg.fedavg`.
    """
    local = fl.local_training(model, client_optimizer, epochs=epochs, steps=steps, batch_size=batch_size, static=static)

    def init_client(server, client):
        return LocalState(server, fl.optimizer_of_round(client_optimizer, 0).init(server.params))

    def client_update(message, state, client, key, tilt=fl.identity):
        trained = local(state.variables, client, key, tilt, state.opt_state)
        return fl.ClientOutput(
            upload=(),
            weight=fl.client_weight("examples", client),  # of its loss in the round's metrics; nothing is averaged
            state=LocalState(trained.variables, trained.opt_state),
            metrics={"loss": trained.loss},
            trained=trained,
        )

    return fl.Round(
        init=lambda key, data, params=None: fl.initial_variables(model, key, data, params),
        init_client=init_client,
        broadcast=lambda server, state, client, key: (),
        client_update=client_update,
        aggregate=fl.aggregators.mean(),
        server_update=lambda server, aggregate, key: (server, {}),
        personalize=lambda message, state, client, key: state.variables,
        local=local,
        loss=model.loss,
        metrics=model.metrics,
        model=fl.Lens(lambda server: server, lambda server, variables: variables),
        traits=frozenset({"personal"}),
    )
