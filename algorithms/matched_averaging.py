"""Matched averaging (PFNM, Yurochkin et al., ICML 2019; FedMA, Wang et al., ICLR 2020): hidden units are matched first.

Clients upload the networks that they trained; the server permutes each one's hidden units so that they are most like
one another's, by optimal assignment, and averages. It makes sense of networks that were trained from unlike starts, in
one round or a few. Deviations: assignments are by squared distance of a unit's weights, all layers of a network in one
round (FedMA freezes layer after layer), and the number of units stays (PFNM and FedMA add units that match nobody's).
Kept per client: nothing. Travels: a model each way.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import fedjax_lab as fl
from fedjax_lab.transforms.units import Units, hidden_units


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matched:
    """``variables``, and which of their entries belong to which hidden unit; the server's state and the message."""

    variables: fl.Variables
    units: Units = dataclasses.field(metadata={"static": True})


def matched_averaging(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    own_starts: bool = True,
    weighting: Any = "examples",
    sweeps: int = 2,
    passes: int = 2,
    **local_work: Any,
) -> fl.Round:
    """The mean of the clients' networks after their hidden units were matched to one another.

    Args:
      model: the model; which entries are a unit's is found from its loss.
      client_optimizer: the local optimizer.
      own_starts: in the first round each client starts from an initialisation of its own, in the later ones from the
        server's model; ``False``: always from the server's.
      weighting: of the mean.
      sweeps, passes: see :func:`fedjax_lab.matching.matched_mean`.
      **local_work: ``epochs``, ``steps``, ``batch_size`` and ``static`` of :func:`fedjax_lab.local_training`.

    Raises:
      ValueError: ``sweeps`` or ``passes`` that aren't positive; a model without hidden units, when the process is
        built.
    """
    for value, name in ((sweeps, "sweeps"), (passes, "passes")):
        fl.checks.positive(value, name, integer=True)
    fl.checks.weighting(weighting)
    model = fl.as_model(model)
    local = fl.local_training(model, client_optimizer, **local_work)

    def init(key, data, params=None):
        variables = fl.initial_variables(model, key, data, params)
        batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *a.shape[1:]), a.dtype), data.arrays)
        units = hidden_units(model.loss, variables, batch)
        if not units.groups:
            raise ValueError("this model has no hidden units that could be matched: use fedavg()")
        return Matched(variables, units)

    def start_of(message, client, key):
        if not own_starts:
            return message.variables
        given = client.take(jnp.arange(1))
        made = model.init(key) if model.init_from is None else model.init_from(key, given)
        first = client.env.round == 0
        return jax.tree.map(
            lambda own, theirs: jnp.where(first, own.astype(theirs.dtype), theirs),
            fl.Variables(*made),
            message.variables,
        )

    def client_update(message, state, client, key, tilt=fl.identity):
        trained = local(start_of(message, client, jax.random.fold_in(key, 0x0A1)), client, key, tilt)
        return fl.ClientOutput(
            upload=trained.variables,
            weight=fl.client_weight(weighting, client),
            metrics={"loss": trained.loss},
            trained=trained,
        )

    def reduce(uploads, weights, ok, messages, env):
        return fl.matching.matched_mean(
            uploads, jnp.where(ok, weights, 0), messages.units, sweeps=sweeps, passes=passes
        )

    def server_update(server, mean, key):
        nothing = jax.tree.map(jnp.zeros_like, server.variables)
        return Matched(fl.add(nothing, mean), server.units), {}

    return fl.Round(
        init=init,
        client_update=client_update,
        aggregate=fl.Aggregator(lambda u, w, m, env: (u, w), lambda sums, env: sums, reduce),
        server_update=server_update,
        personalize=lambda message, state, client, key: message.variables,
        local=local,
        loss=model.loss,
        metrics=model.metrics,
        model=fl.Lens(lambda s: s.variables, lambda s, v: Matched(v, s.units)),
        view=fl.Lens(lambda m: m.variables, lambda m, v: Matched(v, m.units)),
    )
