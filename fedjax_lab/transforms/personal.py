"""Personal models beside the global one: fine-tuning and Ditto.

Neither touches what travels: the global model is the inner round's, bit for bit.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedjax_lab import checks
from fedjax_lab.client import ClientData
from fedjax_lab.local import ClientOptimizer, local_training
from fedjax_lab.models.base import Model, Variables
from fedjax_lab.nesting import first_message
from fedjax_lab.round import LocalTraining, Round, Transform, identity, proximal
from fedjax_lab.transforms import memories

PyTree = Any


class PersonalState(NamedTuple):
    """The client's ``personal`` Variables, and the inner state."""

    personal: Variables
    inner: Any


def fine_tuning(client_optimizer: ClientOptimizer | None = None, **local_work: Any) -> Transform:
    """Each client would use the model it is sent, trained further on its own data.

    The baseline of personalisation (Wang et al., "Federated Evaluation of On-device Personalization", 2019), and the
    evaluation after k steps of meta-learning (Finn et al., "Model-Agnostic Meta-Learning", ICML 2017):
    ``fine_tuning(optax.sgd(alpha), steps=k, batch_size=None)``. Training itself is the inner round's. Kept per
    client: nothing more. Travels: nothing more.

    Args:
      client_optimizer: of the fine-tuning; by default the inner round's local training is used as it is.
      **local_work: ``epochs``, ``steps`` and ``batch_size`` of :func:`fedjax_lab.local_training`.

    Raises:
      ValueError: a Round that sends no model, or ``local_work`` without an optimizer.
    """

    def transform(round: Round) -> Round:
        sent = received_model(round, "fine_tuning()")
        local = own_training(round, client_optimizer, local_work, "fine_tuning()")

        def personalize(message, state, client, key):
            start = sent(message, state, client, key)
            return local(start, client, jax.random.fold_in(key, 0xF17E)).variables

        return round._replace(personalize=personalize, traits=round.traits | {"personal"})

    return transform


def personal_model(lam: Any, client_optimizer: ClientOptimizer | None = None, **local_work: Any) -> Transform:
    """Each client trains a model of its own too, drawn to the global one (Ditto, Li et al., ICML 2021, algorithm 1).

    In every round that it takes part in, a client's personal ``v`` follows ``grad F_k(v) + lam (v - w)``, with ``w``
    the model it was sent; a new client's begins at ``w``. The personal run has its own PRNG key and none of the
    other tilts. Kept per client: ``v``, a model. Travels: nothing more.

    Args:
      lam: pull to the global model; 0 is local training. As in any gradient descent, ``lam`` times the learning
        rate must stay below 2.
      client_optimizer: of the personal run; by default the inner round's local training is used as it is.
      **local_work: ``epochs``, ``steps`` and ``batch_size`` of :func:`fedjax_lab.local_training`.

    Raises:
      ValueError: a negative ``lam``; a Round that sends no model, or ``local_work`` without an optimizer.
    """
    checks.not_negative(lam, "lam")

    def transform(round: Round) -> Round:
        memories.of_units(round, "personal_model()")
        sent = received_model(round, "personal_model()")
        local = own_training(round, client_optimizer, local_work, "personal_model()")

        def init_client(server, client):
            inner = round.init_client(server, client)
            # What a client that was never asked would use: what the server would send it now.
            message = first_message(round, server, inner, client)
            return PersonalState(sent(message, inner, client, jax.random.key(0)), inner)

        def broadcast(server, state, client, key):
            return round.broadcast(server, state.inner, client, key)

        def client_update(message, state, client, key, tilt=identity):
            out = round.client_update(message, state.inner, client, key, tilt=tilt)
            own = jax.random.fold_in(key, 0xD1770)
            center = sent(message, state.inner, client, own).params
            run = local(state.personal, client, own, tilt=proximal(lam, center))
            return out._replace(state=PersonalState(run.variables, out.state))

        return round._replace(
            init_client=init_client,
            broadcast=broadcast,
            client_update=client_update,
            personalize=lambda message, state, client, key: state.personal,
            traits=round.traits | {"personal"},
        )

    return transform


def received_model(round: Round, who: str) -> Callable[[PyTree, PyTree, ClientData, jax.Array], Variables]:
    """``(message, state, client, key) -> Variables``: the whole model that a client of this Round holds.

    The one it was sent; where clients have a part of their own or choose among several models, their own.
    """
    view, personalize = round.view, round.personalize
    if view is None:
        raise ValueError(f"{who} begins with the model that clients are sent, but this Round sends none")
    if "merged" in round.traits:
        raise ValueError(f"{who} trains, and merged adapters don't: put `merged` behind it")
    if {"partial", "many_models"} & round.traits and personalize is not None:
        return personalize
    return lambda message, state, client, key: view.get(message)


def own_training(
    round: Round, optimizer: ClientOptimizer | None, local_work: dict[str, Any], who: str
) -> LocalTraining:
    """The Round's local training, or one with another optimizer and other work on the same loss."""
    if optimizer is None:
        if local_work:
            given = ", ".join(local_work)
            raise ValueError(f"{who} takes {given} only together with a client_optimizer, which makes them")
        if round.local is None:
            raise ValueError(f"{who} trains, but this Round has no local training: give a client_optimizer")
        return round.local
    loss, metrics = round.loss, round.metrics
    if loss is None or metrics is None:
        raise ValueError(f"{who} trains, but this Round has no loss")
    model = Model(init=lambda key: ((), ()), loss=loss, metrics=metrics)
    return local_training(model, optimizer, **local_work)
