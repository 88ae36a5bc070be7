"""L2GD (Hanzely and Richtarik, "Federated Learning of a Mixture of Global and Local Models", 2020, algorithm 1).

``min 1/n sum_k F_k(x_k) + lam/(2n) sum_k |x_k - mean|^2`` over a model for each client. At every step a coin decides:
with probability 1 - p all take a gradient step, with probability p all move towards their mean. The mean changes by
gradient steps only, so that clients communicate only when a step towards it follows gradient steps. A round here is
what lies between: the steps towards the mean (how many in a row is drawn), then the gradient steps (drawn too).
Kept per client: its model. Travels: a model each way.

Deviations: of a cohort the server takes the mean of those models only, by weight; with everyone and
``weighting="uniform"`` it is the paper's. Mini-batches are allowed for the gradient steps.
"""

from typing import Any, NamedTuple

import jax
import optax
from jax.core import Tracer

import fedjax_lab as fl
from algorithms.fedavg import fedavg


class L2GDState(NamedTuple):
    """A client's own ``variables``."""

    variables: fl.Variables


def l2gd(
    model: fl.Model,
    *,
    learning_rate: Any,
    lam: Any,
    p: Any,
    batch_size: int | None = None,
    weighting: Any = "uniform",
) -> fl.Round:
    """A model for each client, drawn to their mean by random communication.

    Args:
      model: the model.
      learning_rate: the paper's alpha over n; gradient steps are ``learning_rate / (1 - p)`` long, steps towards the
        mean ``learning_rate lam / p`` of the distance, which must stay below 2.
      lam: the penalty; 0 is local training, infinity one model.
      p: probability of a step towards the mean, between 0 and 1.
      batch_size: examples of a gradient step; ``None`` is all of the client's.
      weighting: of the mean; ``"uniform"`` is the paper's.

    Raises:
      ValueError: a negative ``lam``, a ``p`` that isn't between 0 and 1, steps that are too long.
    """
    fl.checks.positive(learning_rate, "learning_rate")
    fl.checks.not_negative(lam, "lam")
    fl.checks.probability(p, "p")
    if not isinstance(p, Tracer) and p in (0, 1):
        raise ValueError(f"p must lie between 0 and 1 and be neither; got {p}")
    towards = learning_rate * lam / p
    if not isinstance(towards, Tracer) and towards >= 2:
        raise ValueError(f"learning_rate * lam / p must be below 2: steps towards the mean would grow; got {towards}")

    def drawn(client, tag, probability):
        return jax.random.geometric(jax.random.fold_in(client.env.key, tag), probability)

    # The next step is one towards the mean with probability p: gradient steps go on until then.
    rate, steps = optax.sgd(learning_rate / (1 - p)), lambda client, key: drawn(client, 0x12, p)
    base = fedavg(model, rate, steps=steps, batch_size=batch_size, weighting=weighting)

    def client_update(message, state, client, key, tilt=fl.identity):
        left = (1 - towards) ** drawn(client, 0x13, 1 - p)
        nearer = lambda x, m: (m + left * (x - m)).astype(m.dtype)
        start = state.variables._replace(params=jax.tree.map(nearer, state.variables.params, message.params))
        out = base.client_update(start, (), client, key, tilt)
        new = out.trained.variables
        return out._replace(upload=fl.difference(new, message), state=L2GDState(new))

    return base._replace(
        init_client=lambda server, client: L2GDState(server.variables),
        client_update=client_update,
        personalize=lambda message, state, client, key: state.variables,
        traits=base.traits | {"personal"},
    )
