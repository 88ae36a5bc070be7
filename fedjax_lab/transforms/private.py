"""Models of which a part stays with each client: FedBN, FedPer, FedRep, LG-FedAvg, local statistics.

The private part is taken out of everything that travels: out of the model, and out of whatever else
in a message or an upload is shaped like it (control variates, momenta).
"""

import fnmatch
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.models.base import Variables
from fedjax_lab.ownership import owning
from fedjax_lab.round import LocalTraining, Round, Sent, Tilt, Transform, chain_tilts, identity, projection

PyTree = Any


class PrivateState(NamedTuple):
    """The client's ``part``: Variables with ``None`` for every shared leaf; and the inner state."""

    part: Variables
    inner: Any


def batch_norm(path: str) -> bool:
    """FedBN's predicate: batch-norm layers, their parameters and their running statistics."""
    return "batchnorm" in path.lower().replace("_", "") or statistics(path)


def statistics(path: str) -> bool:
    """The predicate of everything in the model's state (running statistics), and no parameter."""
    return path.startswith("model_state/")


def leaves(*patterns: str) -> Callable[[str], bool]:
    """The predicate of the leaves whose path matches one of the patterns, such as ``"params/Dense_1/*"``."""
    return lambda path: any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def private(predicate: Callable[[str], bool], *, alternating: LocalTraining | bool = False) -> Transform:
    """Keep the leaves that ``predicate`` names with each client, and train them with the rest or before it.

    FedBN (Li et al. 2021) is ``private(batch_norm)``; FedPer (Arivazhagan et al. 2019) names the last layers, LG-FedAvg
    (Liang et al. 2020) the first ones; FedRep (Collins et al. 2021) alternates, :mod:`algorithms.fedrep`. Each client's
    part starts from the server's initial model. Kept per client: the private part. Travels: the rest, each way.

    Args:
      predicate: of a leaf's path in Variables, such as ``params/Dense_1/kernel`` or
        ``model_state/batch_stats/BatchNorm_0/mean``. See :func:`leaves`.
      alternating: train the private parameters alone first, with the others held, and then the others with these
        held: by this :func:`fedjax_lab.local_training`, or with ``True`` by the inner round's own. ``False``: all
        of them jointly.

    Raises:
      ValueError: a Round without a model, or whose uploads are encoded or are parts of one; when the process is built,
        if nothing or everything is private, or messages are encoded.
    """

    checks.predicate(predicate)

    def transform(round: Round) -> Round:
        _check_round(round)
        view, model, first = round.view, round.model, _first_phase(round, alternating)

        def init(key, data, params=None):
            server = round.init(key, data, params)
            splits(predicate, model.get(server))
            return server

        def init_client(server, client):
            return PrivateState(keep(predicate, model.get(server)), round.init_client(server, client))

        def broadcast(server, state, client, key):
            message = round.broadcast(server, state.inner, client, key)
            message = strip(predicate, model.get(server), not_encoded(message, "private()"))
            if not jax.tree.leaves(view.get(message)):
                raise ValueError("this private() and those inside it make everything private: nothing is left to share")
            return message

        def received(message, state):
            """The inner message as the client completes it."""
            whole = fill(state.part, message)
            return view.set(whole, merge(state.part, view.get(whole)))

        def client_update(message, state, client, key, tilt=identity):
            whole = received(message, state)
            if first:
                start = view.get(whole)
                run = first(start, client, jax.random.fold_in(key, 0xFE9), tilt=holding(lambda p: not predicate(p)))
                whole = view.set(whole, merge(keep(predicate, run.variables), start))
                tilt = chain_tilts(tilt, holding(predicate))
            out = round.client_update(whole, state.inner, owning(client, predicate), key, tilt=tilt)
            if out.trained is None:
                raise ValueError("private() needs a Round that reports what it trained (ClientOutput.trained)")
            part = keep(predicate, out.trained.variables)
            if first:  # held, whatever an optimizer does to parameters without a gradient
                part = part._replace(params=keep(predicate, view.get(whole)).params)
            upload = strip(predicate, view.get(whole), out.upload)
            parts = strip(predicate, view.get(whole), out.parts)
            return out._replace(upload=upload, state=PrivateState(part, out.state), bytes_up=None, parts=parts)

        def server_update(server, aggregate, key):
            # The server's own copy of the private leaves gets zero updates: it stays where it began.
            return round.server_update(server, fill(keep(predicate, model.get(server)), aggregate), key)

        def personalize(message, state, client, key):
            return round.personalize(received(message, state), state.inner, client, key)

        return round._replace(
            init=init,
            init_client=init_client,
            broadcast=broadcast,
            client_update=client_update,
            server_update=server_update,
            personalize=personalize,
            traits=round.traits | {"personal", "partial", "split"},
        )

    return transform


def _check_round(round: Round) -> None:
    """Refuse a Round without a model, or that doesn't send all of its leaves together as they are."""
    if round.view is None or round.model is None:
        raise ValueError("private() splits a model, but this Round has none")
    if "many_models" in round.traits:
        raise ValueError("private() comes before transforms that multiply the model: put it first")
    if "members" in round.traits:
        raise ValueError("private() takes leaves out of uploads, but this Round's server keeps whole models")
    if {"encoded", "summed"} & round.traits:
        raise ValueError("private() takes leaves out of uploads, but this Round's are encoded: put fl.uplink behind it")
    if "by_leaf" in round.traits:
        raise ValueError(
            "private() takes leaves out of messages, but this Round's travel in rounds of their own: have "
            "partial_averaging() never average them instead (a period of 0)"
        )
    if {"sub_models", "pruned", "merged"} & round.traits:
        raise ValueError(
            "private() takes leaves out of whole models, but this Round sends parts of one (federated dropout, "
            "width slices, pruning, merged adapters), which don't go together"
        )


def _first_phase(round: Round, alternating: LocalTraining | bool) -> LocalTraining | None:
    """What trains the private parameters alone before the others; ``None`` where all train jointly."""
    first = round.local if alternating is True else alternating
    if first is None:
        raise ValueError("private() alternates by the Round's local training, but this Round has none")
    if first and "split" in round.traits:
        raise ValueError(
            "private(alternating=...) trains from whole models, but of this Round's some leaves stay with the "
            "clients: put it first"
        )
    return first or None


def holding(predicate: Callable[[str], bool]) -> Tilt:
    """The projection that gives the parameters that ``predicate`` names no gradient."""

    def tilt(oracle):
        def tilted(params, inputs, key):
            grads, aux = oracle(params, inputs, key)
            hold = lambda path, g: jnp.zeros_like(g) if predicate(checks.path_name(path)) else g
            return jax.tree_util.tree_map_with_path(hold, Variables(grads)).params, aux

        return tilted

    return projection(tilt)


def keep(predicate, variables: Variables) -> Variables:
    """Variables with ``None`` for the leaves that aren't private."""
    pick = lambda path, leaf: leaf if predicate(checks.path_name(path)) else None
    return jax.tree_util.tree_map_with_path(pick, variables)


def merge(part: Variables, shared: Variables) -> Variables:
    """``part`` where it has a leaf, else ``shared``."""
    return jax.tree.map(lambda p, s: s if p is None else p, part, shared, is_leaf=_is_none)


def splits(predicate: Callable[[str], bool], variables: Variables) -> None:
    """Raises ValueError if the predicate names none or all of the leaves."""
    names = [name for name, _ in checks.named_leaves(variables)]
    chosen = [bool(predicate(name)) for name in names]
    if all(chosen) or not any(chosen):
        raise ValueError(f"the predicate makes {'everything' if all(chosen) else 'nothing'} private of {names}")


def not_encoded(message: PyTree, who: str) -> PyTree:
    """The message, if leaves can be taken out of it. Raises ValueError if it is encoded and counted already."""
    if any(isinstance(part, Sent) for part in jax.tree.leaves(message, is_leaf=lambda x: isinstance(x, Sent))):
        raise ValueError(
            f"{who} takes leaves out of messages, but this Round's are encoded and counted already: put fl.downlink, "
            "or whatever does that, behind it"
        )
    return message


def strip(predicate, like: Variables, tree: PyTree) -> PyTree:
    """``tree`` with ``None`` for the private leaves of every subtree shaped as ``like`` or its params.

    What another transform took out before is ``None`` already, and counts as a leaf.
    """
    gone = jax.tree_util.tree_map_with_path(lambda path, _: predicate(checks.path_name(path)), like, is_leaf=_is_none)
    shapes = {_structure(like): gone, _structure(like.params): gone.params}

    def one(subtree):
        mask = shapes.get(_structure(subtree))
        return subtree if mask is None else jax.tree.map(lambda g, x: None if g else x, mask, subtree)

    return jax.tree.map(one, tree, is_leaf=lambda t: _structure(t) in shapes)


def fill(part: Variables, tree: PyTree) -> PyTree:
    """Zeros for the private leaves that :func:`strip` took out, so that the inner round finds its shapes."""
    templates = {_structure(part): part, _structure(part.params): part.params}

    def one(subtree):
        template = templates.get(_structure(subtree))
        if template is None:
            return subtree
        zero = lambda p, x: x if p is None else jnp.zeros_like(p)
        return jax.tree.map(zero, template, subtree, is_leaf=_is_none)

    return jax.tree.map(one, tree, is_leaf=lambda t: _structure(t) in templates)


def _is_none(x: Any) -> bool:
    return x is None


def _structure(tree: PyTree) -> Any:
    return jax.tree.structure(tree, is_leaf=_is_none)
