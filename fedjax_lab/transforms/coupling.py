"""Multi-task coupling: a model for each client, drawn to the others' mean, its cluster's, or its neighbours'.

For any model and any local training; for linear models and convex losses :mod:`algorithms.mocha` solves the joint
problem exactly and learns the relations too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab import checks
from fedjax_lab.models.base import Variables
from fedjax_lab.nesting import first_message, nested
from fedjax_lab.ownership import owning
from fedjax_lab.round import Aggregator, Round, Transform, chain_tilts, identity, proximal
from fedjax_lab.transforms import memories

PyTree = Any


class CoupledServer(NamedTuple):
    """The inner server state, and with relations every client's last parameters as ``rows: [clients, ...]``."""

    inner: Any
    rows: PyTree


class CoupledClient(NamedTuple):
    """The client's ``own`` Variables, and the inner state."""

    own: Variables
    inner: Any


class CoupledMessage(NamedTuple):
    """The inner message, and with relations how far from its parameters lies the mean that the client is drawn to.

    As a difference, so that where :func:`private` keeps a leaf from travelling nothing is drawn to zero.
    """

    inner: Any
    offset: PyTree


class CoupledUpload(NamedTuple):
    """The inner upload, and with relations the client's parameters."""

    inner: Any
    row: PyTree


def coupling(lam: Any, relations: Any = None) -> Transform:
    """Clients train models of their own, with a pull to the mean of those they are related to.

    Client k follows ``grad F_k(w_k) + lam (w_k - sum_j a_kj w_j)``: for symmetric relations gradient descent on
    ``sum_k F_k(w_k) + lam/4 sum_kj a_kj |w_k - w_j|^2`` (mean-regularized multi-task learning, Evgeniou and Pontil,
    KDD 2004, for any model; Smith et al., "Federated Multi-Task Learning", 2017, equation 2). Without ``relations``
    all are drawn to the inner round's model, which their updates move as ever: with ``weighting="uniform"`` and
    everyone in every round it is the mean of their models. Kept per client: its model. Travels: nothing more without
    relations, else a model more each way, and the server keeps a model for each client.

    Deviation: a client that hasn't taken part counts in the others' means with the initial model, and absent ones
    with their last.

    Args:
      lam: pull, at least 0; 0 is local training. Times the learning rate it must stay below 2.
      relations: the a_kj, ``float[clients, clients]``, at least 0, each row with sum 1;
        :func:`in_clusters` makes them of clusters.

    Raises:
      ValueError: a negative ``lam``; relations that aren't such a matrix, or of another number of clients when a
        Process is built; a Round that trains no model, has several, or sends a part of one.
    """
    checks.not_negative(lam, "lam")
    mixing = None if relations is None else _mixing(relations)

    def transform(round: Round) -> Round:
        _check_round(round)
        model, view = round.model, round.view

        def init(key, data, params=None):
            server = round.init(key, data, params)
            return CoupledServer(server, () if mixing is None else _copies(model.get(server).params, len(mixing)))

        def broadcast(server, state, client, key):
            message = round.broadcast(server.inner, state.inner, client, key)
            if mixing is None:
                return CoupledMessage(message, ())
            received = view.get(message).params
            center = _center(mixing, server.rows, client, received)
            return CoupledMessage(message, jax.tree.map(jnp.subtract, center, received))

        def init_client(server, client):
            inner = round.init_client(server.inner, client)
            # A new client begins at what it would be sent now.
            message = first_message(round, server.inner, inner, client)
            start = view.get(message)
            return CoupledClient(start._replace(params=_center(mixing, server.rows, client, start.params)), inner)

        def client_update(message, state, client, key, tilt=identity):
            center = view.get(message.inner).params
            if mixing is not None:
                _check_clients(mixing, client)  # not in init, which an evaluation on other clients' data runs too
                center = jax.tree.map(jnp.add, center, message.offset)
            pull = proximal(lam, center)
            own = view.set(message.inner, state.own)
            alone = owning(client, lambda path: True)
            out = round.client_update(own, state.inner, alone, key, tilt=chain_tilts(pull, tilt))
            if out.trained is None:
                raise ValueError("coupling() needs a Round that reports what it trained (ClientOutput.trained)")
            new = out.trained.variables
            if mixing is None:
                return out._replace(state=CoupledClient(new, out.state))
            upload = CoupledUpload(out.upload, new.params)
            parts = None if out.parts is None else CoupledUpload(out.parts, jnp.bool_(True))
            return out._replace(upload=upload, state=CoupledClient(new, out.state), bytes_up=None, parts=parts)

        def server_update(server, aggregate, key):
            part, ids, rows = (aggregate, (), ()) if mixing is None else aggregate
            inner, metrics = round.server_update(server.inner, part, key)
            put = lambda old, new: old.at[ids].set(new.astype(old.dtype), mode="drop")
            return CoupledServer(inner, jax.tree.map(put, server.rows, rows)), metrics

        made = nested(
            round,
            client=True,
            init=init,
            init_client=init_client,
            broadcast=broadcast,
            client_update=client_update,
            server_update=server_update,
            personalize=lambda message, state, client, key: state.own,
            traits=round.traits | {"personal"},
        )
        return made if mixing is None else made._replace(aggregate=_with_rows(round.aggregate))

    return transform


def in_clusters(assignment: Sequence[int] | np.ndarray) -> np.ndarray:
    """Relations of clients that are drawn to their cluster's mean, ``float32[clients, clients]``.

    Args:
      assignment: ``int[clients]``, each client's cluster, in the data's order.
    """
    found = np.asarray(assignment)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "iu":
        raise ValueError(f"assignment must be an integer for each client; got {checks.shown(assignment)}")
    same = found[:, None] == found[None, :]
    return (same / same.sum(1, keepdims=True)).astype(np.float32)


def _mixing(relations: Any) -> np.ndarray:
    found = np.asarray(relations)
    if found.ndim != 2 or found.shape[0] != found.shape[1] or found.dtype.kind not in "iuf" or not found.size:
        raise ValueError(f"relations must be a square matrix, [clients, clients]; got {checks.shown(relations)}")
    found = found.astype(np.float32)
    wrong = np.flatnonzero(~(np.isfinite(found).all(1) & (found >= 0).all(1) & (np.abs(found.sum(1) - 1) < 1e-3)))
    if len(wrong):
        raise ValueError(f"each row of relations must be at least 0 and sum to 1; row {wrong[0]} doesn't")
    return found


def _check_round(round: Round) -> None:
    """Refuse a Round that doesn't send one whole model, the same units each time."""
    if round.model is None or round.view is None:
        raise ValueError("coupling() trains each client's own model, but this Round sends none")
    if {"partial", "many_models"} & round.traits:
        raise ValueError("coupling() comes before transforms that split or multiply the model: put it first")
    memories.of_units(round, "coupling()")


def _check_clients(mixing: np.ndarray, client: Any) -> None:
    """Refuse relations of another number of clients than the data have."""
    if getattr(client, "population", None) not in (None, len(mixing)):
        raise ValueError(f"relations are of {len(mixing)} clients, but the data have {client.population}")


def _copies(params: PyTree, clients: int) -> PyTree:
    """The parameters as every client's, ``[clients, ...]``."""
    return jax.tree.map(lambda w: jnp.broadcast_to(w, (clients, *w.shape)), params)


def _center(mixing: np.ndarray | None, rows: PyTree, client: Any, otherwise: PyTree) -> PyTree:
    """The mean of those that a client is related to; ``otherwise`` for one that isn't known."""
    if mixing is None:
        return otherwise
    known = (client.id >= 0) & (client.id < len(mixing))
    weights = jnp.asarray(mixing)[jnp.clip(client.id, 0, len(mixing) - 1)]
    mean = lambda r, w: jnp.where(known, jnp.tensordot(weights, r.astype(jnp.float32), 1), w).astype(w.dtype)
    return jax.tree.map(mean, rows, otherwise)


def _with_rows(inner: Aggregator) -> Aggregator:
    """The inner aggregate, beside the survivors' ids and rows."""

    def lift(upload, weight, message, env):
        return inner.lift(upload.inner, weight, message.inner, env)

    def reduce(uploads, weights, ok, messages, env):
        ids = jnp.where(ok, env.ids, env.population)
        if inner.reduce is not None:
            part = inner.reduce(uploads.inner, weights, ok, messages.inner, env)
        else:
            lifted = jax.vmap(lambda u, w, m: inner.lift(u, w, m, env))(uploads.inner, weights, messages.inner)
            present = lambda x: jnp.where(ok.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
            part = inner.finish(jax.tree.map(lambda x: jnp.sum(present(x), 0), lifted), env)
        return part, ids, uploads.row

    return Aggregator(lift, inner.finish, reduce)
