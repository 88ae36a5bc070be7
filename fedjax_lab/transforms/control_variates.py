"""Control variates: every local step is corrected by what the others' gradients are like (SCAFFOLD)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.aggregators import pair, within
from fedjax_lab.gradients import client_gradient, forget_recorded, mean_recorded
from fedjax_lab.local import gradient_oracle
from fedjax_lab.models.base import add, difference
from fedjax_lab.nesting import nested
from fedjax_lab.ownership import shared, where_own
from fedjax_lab.population import mean_weight, population_mean
from fedjax_lab.round import Round, Trained, Transform, chain_tilts, identity, nbytes, shift

PyTree = Any


class ControlServer(NamedTuple):
    """The inner server's state, the mean control variate ``c``, and the population's mean weight."""

    inner: Any
    c: PyTree
    mean_weight: jax.Array


class Controlled(NamedTuple):
    """The inner message and ``c``; or the inner client's state and the client's own ``c``."""

    inner: Any
    c: PyTree


def control_variates(option: str = "II", weighting: Any = "examples", learning_rate: Any = None) -> Transform:
    """Correct each local gradient by ``c - c_k`` (SCAFFOLD, Karimireddy et al. 2020, algorithm 1).

    ``c_k`` estimates client k's gradient, the server's ``c`` is their mean by weight. What is kept per client: a
    model's size. What travels besides what the inner round sends: a model's size each way.

    Args:
      option: how ``c_k`` is renewed, the paper's line 12. ``"I"``: the gradient of all the client's data at the
        model it received, one more pass; ``"II"``: the mean gradient over its local steps, which are there
        anyway.
      weighting: the weighting of the inner round, for which ``c`` must be the mean; ``"uniform"`` is the paper's.
      learning_rate: the clients' eta_l, for option II as the paper writes it, ``c_k - c + (x - y)/(K eta_l)``, if they
        make plain gradient steps. Without it the client optimizer must be :func:`fedjax_lab.recording`, which adds
        up the gradients of any optimizer, at the cost of a model's size in every step.

    Raises:
      ValueError: another option; a Round that trains no model, has several, or sends only a part of it.
    """
    if option not in ("I", "II"):
        raise ValueError(f"option must be 'I' or 'II'; got {checks.shown(option)}")
    checks.weighting(weighting)
    if learning_rate is not None:
        checks.positive(learning_rate, "learning_rate")

    def transform(round: Round) -> Round:
        model, view, loss = round.model, round.view, round.loss
        if model is None or view is None or loss is None:
            raise ValueError("control_variates() corrects local training, but this Round trains no model")
        if {"many_models", "sub_models"} & round.traits:
            raise ValueError(
                "control_variates() remembers a gradient for each entry of one model, but this Round has several, or "
                "sends parts of one (clusters, hypernetworks, federated dropout, width slices), which don't go together"
            )
        if {"partial", "pruned"} & round.traits:
            raise ValueError("control_variates() comes before transforms that split or prune the model: put it first")
        zeros = lambda server: jax.tree.map(jnp.zeros_like, model.get(server).params)

        def init(key, data, params=None):
            server = round.init(key, data, params)
            return ControlServer(server, zeros(server), mean_weight(weighting, data))

        def init_client(server, client):
            return Controlled(round.init_client(server.inner, client), zeros(server.inner))

        def broadcast(server, state, client, key):
            return Controlled(round.broadcast(server.inner, state.inner, client, key), server.c)

        def client_update(message, state, client, key, tilt=identity):
            correction = shared(client, jax.tree.map(lambda a, b: a - b, message.c, state.c))
            corrected = chain_tilts(tilt, shift(lambda params: correction))
            out = round.client_update(message.inner, state.inner, client, key, tilt=corrected)
            if out.trained is None:
                raise ValueError("control_variates() needs a Round that reports what it trained")
            if option == "I":
                oracle, again = tilt(gradient_oracle(loss)), jax.random.fold_in(key, 0xC0)
                new = client_gradient(oracle, view.get(message.inner), client, again)[0]
                change = difference(new, state.c)
            else:  # c_k - c + g less c_k, where the client's own leaves have no c
                mean = mean_gradient(out.trained, learning_rate)
                change = jax.tree.map(lambda g, c: g - c, mean, where_own(client, state.c, message.c))
            renewed = (out.trained.steps > 0) & out.sent
            change = jax.tree.map(lambda x, c: jnp.where(renewed, x.astype(c.dtype), 0), change, state.c)
            new = add(state.c, change)
            bytes_up = None if out.bytes_up is None else out.bytes_up + nbytes(change)
            return out._replace(
                upload=Controlled(out.upload, change),
                state=Controlled(forget_recorded(out.state), new),
                bytes_up=bytes_up,
                parts=None if out.parts is None else Controlled(out.parts, jnp.bool_(True)),
            )

        def server_update(server, aggregate, key):
            inner, metrics = round.server_update(server.inner, aggregate[0], key)
            moved = jax.tree.map(lambda x: x / server.mean_weight, aggregate[1])
            return server._replace(inner=inner, c=add(server.c, moved)), metrics

        return nested(
            round,
            client=True,
            init=init,
            init_client=init_client,
            broadcast=broadcast,
            client_update=client_update,
            aggregate=pair(within(round.aggregate, lambda message: message.inner), population_mean()),
            server_update=server_update,
            traits=round.traits | {"remembering"},
        )

    return transform


def mean_gradient(trained: Trained, learning_rate: Any) -> PyTree:
    """The mean gradient that a run followed: from how far it came, or recorded on the way."""
    if learning_rate is None:
        return mean_recorded(trained)
    start, end = trained.start.params, trained.variables.params
    way = learning_rate * jnp.maximum(trained.steps, 1)
    return jax.tree.map(lambda x, y: (x - y) / way.astype(x.dtype), start, end)
