"""Rounds in pairs: first the cohort's mean gradient at the model, then local training that knows it.

What FedDANE, FedLin and Mime need: each of their iterations speaks with the clients twice.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.aggregators import mean, pair, within
from fedjax_lab.client import ClientData
from fedjax_lab.gradients import client_gradient
from fedjax_lab.local import gradient_oracle
from fedjax_lab.models.base import Variables
from fedjax_lab.nesting import nested
from fedjax_lab.ownership import where_own
from fedjax_lab.round import Round, Sometimes, Tilt, Transform, chain_tilts, identity, nbytes

PyTree = Any


class GradientServer(NamedTuple):
    """The inner server's state, and the mean ``gradient`` that was collected last."""

    inner: Any
    gradient: PyTree


class GradientMessage(NamedTuple):
    """The inner message, and the mean ``gradient`` at its model, which travels in odd rounds."""

    inner: Any
    gradient: Sometimes


class PairedUpload(NamedTuple):
    """The inner upload of odd rounds, and the gradient of even ones."""

    inner: Any
    gradient: Any


Correct = Callable[[Variables, PyTree, PyTree, ClientData, jax.Array], Tilt]


def gradient_rounds(correct: Correct, own: bool = True) -> Transform:
    """Collect the mean gradient of all data in rounds 0, 2, 4, ..., and train with it in rounds 1, 3, 5, ...

    In even rounds the server's model stays, and clients upload nothing but their gradient at it. In odd rounds they
    train, and upload what the inner round uploads. A sampler draws a cohort for each; ``fl.repeated(sampler)``
    draws one for both. Kept per client: nothing more. Travels: the gradient up in even rounds, and its mean down in
    odd ones.

    Args:
      correct: ``(received, gradient, own, client, key) -> Tilt`` of the odd rounds' training; ``gradient`` is the
        mean by weight, ``own`` the client's at the model it received.
      own: whether ``correct`` uses ``own``; otherwise it is zeros there, and odd rounds save a pass over the data.

    The inner Round should do no work in even rounds (:func:`idle_in_even_rounds`); what it does is thrown away.

    Raises:
      ValueError: a Round that trains no model, has several, or sends only a part of it.
    """

    def transform(round: Round) -> Round:
        model, view, loss = round.model, round.view, round.loss
        if model is None or view is None or loss is None:
            raise ValueError("gradient_rounds() corrects local training, but this Round trains no model")
        if "sub_models" in round.traits:
            raise ValueError(
                "gradient_rounds() collects a gradient of the whole model, but this Round sends parts of it (federated "
                "dropout, width slices), which don't go together"
            )
        if {"partial", "many_models", "pruned"} & round.traits:
            raise ValueError("gradient_rounds() comes before transforms that split or multiply the model: put it first")

        def init(key, data, params=None):
            server = round.init(key, data, params)
            return GradientServer(server, jax.tree.map(jnp.zeros_like, model.get(server).params))

        def broadcast(server, state, client, key):
            inner = round.broadcast(server.inner, state, client, key)
            training = client.env.round % 2 == 1 if client.env else True  # outside of rounds, all there is
            return GradientMessage(inner, Sometimes(server.gradient, jnp.asarray(training)))

        def client_update(message, state, client, key, tilt=identity):
            training = client.env.round % 2 == 1
            received = view.get(message.inner)
            oracle, once = tilt(gradient_oracle(loss)), jax.random.fold_in(key, 0x6D)
            passes = 1 if own or client.own else jnp.where(training, 0, 1)
            gradient, at_start = client_gradient(oracle, received, client, once, passes)
            # Of what is the client's own nobody else has a gradient: the mean of it is the client's.
            mean = where_own(client, gradient, message.gradient.content)
            change = correct(received, mean, gradient, client, key)
            out = round.client_update(message.inner, state, client, key, tilt=chain_tilts(tilt, change))
            run = out.trained
            if run is not None:
                stays = select(training, run.variables, run.start)
                run = run._replace(variables=stays, steps=jnp.where(training, run.steps, 0))
            measured = {"loss": jnp.where(training, out.metrics.get("loss", at_start), at_start)}
            return out._replace(
                upload=PairedUpload(only(training, out.upload), only(~training, gradient)),
                state=select(training, out.state, state),
                bytes_up=None if out.bytes_up is None else jnp.where(training, out.bytes_up, nbytes(gradient)),
                parts=PairedUpload(training if out.parts is None else only(training, out.parts), ~training),
                metrics=out.metrics | measured,
                trained=run,
            )

        sums = pair(within(round.aggregate, lambda message: message.inner), mean())

        def finish(value, env):
            return (*sums.finish(value, env), env.round % 2 == 1)

        def server_update(server, aggregate, key):
            uploads, gradient, training = aggregate
            inner, metrics = round.server_update(server.inner, uploads, key)
            return GradientServer(
                select(training, inner, server.inner), select(training, server.gradient, gradient)
            ), metrics

        return nested(
            round,
            init=init,
            broadcast=broadcast,
            client_update=client_update,
            aggregate=sums._replace(finish=finish),
            server_update=server_update,
            traits=round.traits | {"paired_rounds"},
        )

    return transform


def idle_in_even_rounds(local_work: dict[str, Any]) -> dict[str, Any]:
    """The same ``epochs`` or ``steps`` of :func:`fedjax_lab.local_training` in odd rounds, none in even ones."""
    unit = "steps" if local_work.get("steps") is not None else "epochs"
    amount = 1 if local_work.get(unit) is None else local_work[unit]
    checks.positive(amount, unit, integer=True)

    def work(client, key):
        todo: Any = amount(client, key) if callable(amount) else amount
        return jnp.where(client.env.round % 2 == 1, todo, 0)

    return local_work | {unit: work}


def select(condition: jax.Array, chosen: PyTree, other: PyTree) -> PyTree:
    """``chosen`` where the scalar ``condition`` holds, else ``other``, in ``other``'s dtypes."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a.astype(b.dtype), b), chosen, other)


def only(condition: jax.Array, tree: PyTree) -> PyTree:
    """``tree`` where the scalar ``condition`` holds, else zeros."""
    return jax.tree.map(lambda x: jnp.where(condition, x, jnp.zeros_like(x)), tree)
