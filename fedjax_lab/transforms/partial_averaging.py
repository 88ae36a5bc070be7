"""Partial and periodic averaging: each round averages some of the model's leaves, the others stay local."""

import fnmatch
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.aggregators import within
from fedjax_lab.models.base import Variables
from fedjax_lab.round import (
    Aggregator,
    ClientOutput,
    Lens,
    Round,
    Sometimes,
    Transform,
    identity,
    marked,
    through,
    unmarked,
)

PyTree = Any
# (path of a leaf, number of the round) -> whether it is averaged then; the number may be traced
Schedule = Callable[[str, Any], Any]


class PartialServer(NamedTuple):
    """The inner server's state; each leaf's ``version: int32[]``, one more than the round that last averaged it."""

    inner: Any
    version: Variables


class PartialClient(NamedTuple):
    """The inner state, the client's ``own`` Variables, and the ``version`` of each leaf that it last received."""

    inner: Any
    own: Variables
    version: Variables


class PartialMessage(NamedTuple):
    """The inner message, of whose model only what is new to this client travels; and the leaves' ``version``."""

    inner: Any
    version: Variables


def periods(patterns: Mapping[str, int], default: int = 1) -> Schedule:
    """The schedule by which a leaf is averaged every so many rounds: in rounds ``period - 1, 2 period - 1, ...``

    Args:
      patterns: ``{pattern of paths: rounds}``, such as ``{"params/Dense_1/*": 4}``; the first that matches counts, and
        0 is never.
      default: of the other leaves.

    Raises:
      ValueError: a period that is no integer of at least 0.
    """
    for name, period in (*patterns.items(), ("default", default)):
        checks.not_negative(period, f"the period of {name!r}", integer=True)

    def averaged(path: str, round: Any) -> Any:
        period = next((p for pattern, p in patterns.items() if fnmatch.fnmatchcase(path, pattern)), default)
        return jnp.asarray(round) % max(period, 1) == period - 1 if period else jnp.bool_(False)

    return averaged


def partial_averaging(averaged: Schedule) -> Transform:
    """Average only those leaves that a schedule names; clients train on with their own values of the others.

    A client begins a round with its own model, in which every leaf that was averaged since it last took part is the
    server's. It trains all of it, and sends the leaves that are averaged in this round: their mean is the server's
    new value. With :func:`periods` this is periodic averaging by layers (Chen, Sun and Jin, "Communication-Efficient
    Federated Deep Learning With Layerwise Asynchronous Model Update", IEEE TNNLS 2020, section III, has deep layers
    averaged in some rounds only; all layers every tau rounds is local SGD with tau times the steps). Kept per client: a
    model and a number for each leaf. Travels: down the leaves that are new to the client and a number for each leaf,
    up the averaged leaves. Each of these goes through the links of ``fl.uplink`` and ``fl.downlink`` by itself.

    Evaluation has both models: the server's, and as ``personal_...`` each client's own.

    Args:
      averaged: ``(path, round) -> bool``, of a leaf's path in Variables, such as ``params/Dense_1/kernel``.

    Raises:
      ValueError: a schedule that gives no truth value; a Round that sends no whole model or whose upload isn't shaped
        as the model, when the process is built.
    """
    if not callable(averaged):
        raise ValueError(f"averaged must be a function of (path, round), such as periods({{...}}); got {averaged!r}")

    now = functools.partial(_averaged, averaged)

    def transform(round: Round) -> Round:
        model, view = _lenses(round)

        def init(key, data, params=None):
            server = round.init(key, data, params)
            return PartialServer(server, jax.tree.map(lambda _: jnp.int32(0), model.get(server)))

        def init_client(server, client):
            own = model.get(server.inner)
            never = jax.tree.map(lambda _: jnp.int32(-1), own)
            return PartialClient(round.init_client(server.inner, client), own, never)

        def broadcast(server, state, client, key):
            message = round.broadcast(server.inner, state.inner, client, key)
            whole = marked(view.get(message), newer(server.version, state.version))
            return PartialMessage(view.set(message, whole), server.version)

        def received(message, state):
            """The inner message with the model that the client begins with, and the server's model."""
            content = unmarked(message.inner)
            theirs, new = view.get(content), newer(message.version, state.version)
            start = jax.tree.map(lambda n, a, b: jnp.where(n, a, b), new, theirs, state.own)
            return view.set(content, start), start, theirs

        def client_update(message, state, client, key, tilt=identity):
            content, start, theirs = received(message, state)
            out = round.client_update(content, state.inner, client, key, tilt=tilt)
            own = _trained(out, theirs)
            chosen = now(theirs, client.env.round)
            # The change is counted from what the server has, which the client may have left behind rounds ago.
            moved = lambda c, u, a, b: jnp.where(c, u + (a - b).astype(u.dtype), jnp.zeros_like(u))
            upload = jax.tree.map(moved, chosen, out.upload, start, theirs)
            new = PartialClient(out.state, own, message.version)
            return out._replace(upload=upload, state=new, bytes_up=None, parts=chosen)

        def server_update(server, aggregate, key):
            found, number = aggregate
            inner, metrics = round.server_update(server.inner, found, key)
            old = model.get(server.inner)
            chosen = now(old, number)
            # Whatever the server's optimizer makes of no update at all, a leaf that isn't averaged stays.
            kept = jax.tree.map(lambda c, a, b: jnp.where(c, a, b), chosen, model.get(inner), old)
            version = jax.tree.map(lambda c, v: jnp.where(c, number + 1, v), chosen, server.version)
            return PartialServer(model.set(inner, kept), version), metrics

        personal = round.personalize

        def personalize(message, state, client, key):
            content, start, _ = received(message, state)
            return start if personal is None else personal(content, state.inner, client, key)

        inside = lambda message: unmarked(message.inner)

        def put(message, part):
            there = jax.tree.map(lambda x: x.there, view.get(message.inner), is_leaf=lambda x: isinstance(x, Sometimes))
            return message._replace(inner=view.set(part, marked(view.get(part), there)))

        return round._replace(
            init=init,
            init_client=init_client,
            broadcast=broadcast,
            client_update=client_update,
            aggregate=_with_round(within(round.aggregate, inside)),
            server_update=server_update,
            personalize=personalize,
            model=through(lambda server: server.inner, lambda server, part: server._replace(inner=part), model),
            view=through(inside, put, view),
            traits=round.traits | {"personal", "by_leaf"},
        )

    return transform


def _lenses(round: Round) -> tuple[Lens, Lens]:
    """Into the server's state and into messages. Raises ValueError for a Round that sends no whole model."""
    model, view = round.model, round.view
    if model is None or view is None:
        raise ValueError("partial_averaging() averages a model's leaves, but this Round sends none")
    if "split" in round.traits:
        raise ValueError(
            "partial_averaging() averages leaves of whole models, but this Round (private(), reconstruction()) "
            "never sends some: leave that out, and give leaves that stay with each client a period of 0"
        )
    if {"sub_models", "chosen"} & round.traits:
        raise ValueError(
            "partial_averaging() has each client hold one model's leaves, but this Round sends parts of them "
            "(federated dropout, width slices) or several models (clusters), which don't go together"
        )
    if {"partial", "many_models", "encoded"} & round.traits:
        raise ValueError(
            "partial_averaging() comes before transforms that split, multiply or encode the model: put it first"
        )
    return model, view


def _trained(out: ClientOutput, theirs: Variables) -> Variables:
    """What a client trained. Raises ValueError if that isn't said, or the upload isn't shaped as the model."""
    if out.trained is None:
        raise ValueError("partial_averaging() needs a Round that reports what it trained (ClientOutput.trained)")
    if jax.tree.structure(out.upload) != jax.tree.structure(theirs):
        raise ValueError("partial_averaging() sends parts of an upload that is shaped as the model; this Round's isn't")
    return out.trained.variables


def _averaged(schedule: Schedule, like: Variables, round: Any) -> Variables:
    """For each leaf whether it is averaged in a round."""

    def one(path, leaf):
        name = checks.path_name(path)
        found = jnp.asarray(schedule(name, round))
        if found.shape or found.dtype != bool:
            raise ValueError(f"averaged({name!r}, round) must give one truth value; it gives {checks.shown(found)}")
        return found

    return jax.tree_util.tree_map_with_path(one, like)


def _with_round(aggregate: Aggregator) -> Aggregator:
    """Gives the round's number beside what the aggregator gives."""
    reduce = aggregate.reduce
    if reduce is None:
        return Aggregator(aggregate.lift, lambda value, env: (aggregate.finish(value, env), env.round))
    return Aggregator(
        aggregate.lift,
        lambda value, env: (value, env.round),
        lambda uploads, weights, ok, messages, env: (reduce(uploads, weights, ok, messages, env), env.round),
    )


def newer(theirs: PyTree, mine: PyTree) -> PyTree:
    """For each leaf whether the server's version is one that the client hasn't received."""
    return jax.tree.map(lambda a, b: a > b, theirs, mine)
