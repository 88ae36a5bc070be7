"""Magnitude pruning while training: the server's model gets sparser, and only what is left of it travels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from fedjax_lab import checks
from fedjax_lab.aggregators import within
from fedjax_lab.models.base import Variables
from fedjax_lab.nesting import nested
from fedjax_lab.round import Lens, Round, Sent, Tilt, Transform, chain_tilts, identity, marked, nbytes, projection
from fedjax_lab.transforms.submodels import restricted

PyTree = Any


class PruningServer(NamedTuple):
    """The inner server's state; which entries are kept, a bit each; how often that changed, and the rounds done."""

    inner: Any
    kept: jax.Array
    version: jax.Array
    rounds: jax.Array


class PrunedMessage(NamedTuple):
    """The inner message, zero where entries were pruned; which are ``kept: uint8[ceil(d/8)]``, and its version."""

    inner: Any
    kept: jax.Array
    version: jax.Array


class PruningClient(NamedTuple):
    """The ``version`` of the mask that this client has, ``int32[]``, and the inner state."""

    version: jax.Array
    inner: Any


class Rule(NamedTuple):
    """What is pruned when: the arguments of :func:`pruning`."""

    sparsity: Any
    start: int
    end: int
    every: int
    predicate: Callable[[str], bool] | None

    def share(self, t: jax.Array) -> jax.Array:
        """The share that is gone after round ``t`` (Zhu and Gupta, equation 1)."""
        if self.end == self.start:
            return jnp.float32(self.sparsity)
        return self.sparsity * (1 - (1 - jnp.clip((t - self.start) / (self.end - self.start), 0, 1)) ** 3)

    def prunable(self, variables: Variables) -> Variables:
        """``True`` for the leaves that may be pruned."""

        def one(path, leaf):
            name, predicate = checks.path_name(path), self.predicate
            chosen = kernels(name, leaf.shape) if predicate is None else name.startswith("params") and predicate(name)
            return bool(chosen) and jnp.issubdtype(leaf.dtype, jnp.floating)

        return jax.tree_util.tree_map_with_path(one, variables)


def kernels(path: str, shape: tuple[int, ...]) -> bool:
    """Matrices and convolutions among the parameters: what is pruned unless something else is said."""
    return path.startswith("params") and len(shape) >= 2


def pruning(
    sparsity: Any,
    *,
    start: int = 0,
    end: int = 100,
    every: int = 10,
    predicate: Callable[[str], bool] | None = None,
) -> Transform:
    """Prune the entries of smallest magnitude, more and more of them, while training goes on.

    After the rounds ``start``, ``start + every``, ... up to ``end`` the server keeps the largest entries of all kernels
    together (Han et al., "Learning both Weights and Connections", NIPS 2015, section 3), and the share that is gone
    rises as ``sparsity (1 - (1 - (t - start) / (end - start))^3)`` (Zhu and Gupta, "To prune, or not to prune", 2017,
    equation 1). What is pruned stays zero in local training, at the server, and in whatever else is shaped as the
    model. The server decides by itself, where PruneFL (Jiang et al. 2022) asks clients for the importance of pruned
    entries and may bring them back, and LotteryFL (Li et al. 2020) has each client prune a model of its own.

    Kept per client: a number, the version of the mask it has; all begin with the one that keeps everything. Travels:
    the entries that are left, each way, and to a client whose mask is an older one the new mask, a bit an entry.
    :func:`fedjax_lab.uplink` and ``downlink`` behind it encode whole vectors, zeros included, and count what that
    takes; a coder for runs of zeros, ``fl.wire.elias(runs=True)`` behind a quantizer, shortens them again.

    Args:
      sparsity: the share that is pruned in the end, at least 0 and below 1.
      start, end: rounds between which it rises; both at least 0.
      every: rounds between two prunings.
      predicate: of the parameters' paths that may be pruned; by default all of two axes or more.

    Raises:
      ValueError: a sparsity outside of that, ``end`` before ``start``; a Round that trains no whole model, or whose
        uploads are encoded; when the process is built, if there is nothing to prune.
    """
    _check(sparsity, start, end, every)
    rule = Rule(sparsity, start, end, every, predicate)

    def transform(round: Round) -> Round:
        _check_round(round)
        if isinstance(sparsity, int | float) and sparsity == 0:
            return round
        model, view = round.model, round.view

        def init(key, data, params=None):
            server = round.init(key, data, params)
            everything = _packed(jnp.ones(_room(rule, model.get(server)), bool))
            return PruningServer(server, everything, jnp.int32(0), jnp.int32(0))

        def init_client(server, client):
            return PruningClient(jnp.int32(0), round.init_client(server.inner, client))

        def broadcast(server, state, client, key):
            inner = round.broadcast(server.inner, state.inner, client, key)
            like = model.get(server.inner)
            inner, mask = _masked(rule, server.kept, like, inner)
            size = _kept_bytes(like, mask, inner) + 4
            size = size + jnp.where(state.version == server.version, 0, server.kept.size).astype(jnp.uint32)
            return Sent(PrunedMessage(inner, server.kept, server.version), size)

        def client_update(message, state, client, key, tilt=identity):
            sent = message.content
            like = view.get(sent.inner)
            only = _to_kept(rule, sent.kept, like)
            out = round.client_update(
                sent.inner, state.inner, client, key, tilt=chain_tilts(only, tilt, projection(only))
            )
            upload, mask = _masked(rule, sent.kept, like, out.upload)
            return out._replace(
                upload=upload,
                state=PruningClient(sent.version, out.state),
                bytes_up=_kept_bytes(like, mask, upload, out.parts),
            )

        unwrap = lambda message: message.content.inner
        put = lambda message, part: Sent(message.content._replace(inner=part), message.length)
        personal = round.personalize
        return nested(
            round,
            message=False,
            client=True,
            init=init,
            init_client=init_client,
            broadcast=broadcast,
            client_update=client_update,
            aggregate=within(round.aggregate, unwrap),
            server_update=lambda server, aggregate, key: _step(rule, round, server, aggregate, key),
            personalize=personal and (lambda m, s, client, key: personal(unwrap(m), s.inner, client, key)),
            view=Lens(lambda m: view.get(unwrap(m)), lambda m, variables: put(m, view.set(unwrap(m), variables))),
            traits=round.traits | {"pruned"},
        )

    return transform


def _room(rule: Rule, variables: Variables) -> int:
    """How many entries may be pruned. Raises ValueError if there are none."""
    size = sum(leaf.size for leaf in _chosen(variables, rule.prunable(variables)))
    if not size:
        names = [name for name, _ in checks.named_leaves(variables)]
        raise ValueError(f"pruning() finds nothing to prune: predicate= names none of the parameters in {names}")
    return size


def _step(rule: Rule, round: Round, server: PruningServer, aggregate: PyTree, key: jax.Array):
    """The server after a round, and its metrics: the inner one's step, and a pruning of its model where one is due."""
    model = round.model
    inner, metrics = round.server_update(server.inner, aggregate, key)
    variables = model.get(inner)
    inner = model.set(inner, _masked(rule, server.kept, variables, variables)[0])
    t = server.rounds
    due = (t >= rule.start) & (t <= rule.end) & ((t - rule.start) % rule.every == 0)
    share = rule.share(t)

    def prune(inner):
        variables = model.get(inner)
        kept = _largest(_chosen(variables, rule.prunable(variables)), server.kept, share)
        return model.set(inner, _masked(rule, kept, variables, variables)[0]), kept

    inner, kept = jax.lax.cond(due, prune, lambda inner: (inner, server.kept), inner)
    changed = jnp.any(kept != server.kept)
    left = jnp.sum(jax.lax.population_count(kept).astype(jnp.int32))
    total = sum(leaf.size for leaf in _chosen(variables, rule.prunable(variables)))
    new = PruningServer(inner, kept, server.version + changed, t + 1)
    return new, metrics | {"sparsity": 1 - left / total}


def _chosen(variables: Variables, prunable: Variables) -> list[jax.Array]:
    both = zip(jax.tree.leaves(variables), jax.tree.leaves(prunable), strict=True)
    return [leaf for leaf, chosen in both if chosen]


def _largest(leaves: list[jax.Array], kept: jax.Array, share: jax.Array) -> jax.Array:
    """The bits of what is kept when ``share`` of all entries is gone: the largest of those that were left."""
    magnitude = jnp.concatenate([jnp.abs(leaf.astype(jnp.float32)).reshape(-1) for leaf in leaves])
    left = _bits(kept, magnitude.size)
    order = jnp.argsort(jnp.where(left, magnitude, -1), descending=True, stable=True)
    count = magnitude.size - jnp.floor(share * magnitude.size + 1e-3).astype(jnp.int32)
    chosen = jnp.zeros(magnitude.size, bool).at[order].set(jnp.arange(magnitude.size) < count)
    return _packed(chosen & left)


def _packed(bits: jax.Array) -> jax.Array:
    return jnp.packbits(bits)


def _bits(packed: jax.Array, size: int) -> jax.Array:
    return jnp.unpackbits(packed, count=size).astype(bool)


def _unpacked(packed: jax.Array, like: Variables, prunable: Variables) -> Variables:
    """``bool`` arrays for the leaves that may be pruned, ``None`` for others."""
    bits, at, out = _bits(packed, sum(leaf.size for leaf in _chosen(like, prunable))), 0, []
    for leaf, chosen in zip(jax.tree.leaves(like), jax.tree.leaves(prunable), strict=True):
        out.append(bits[at : at + leaf.size].reshape(leaf.shape) if chosen else None)
        at += leaf.size if chosen else 0
    return jax.tree.unflatten(jax.tree.structure(like), out)


def _masked(rule: Rule, kept: jax.Array, like: Variables, tree: PyTree) -> tuple[PyTree, Variables]:
    """Zeros for what was pruned, in every part that is shaped as the model; and the mask of the parameters."""
    mask = _unpacked(kept, like, rule.prunable(like))
    return _over(like, lambda x, m: x if m is None else jnp.where(m, x, jnp.zeros_like(x)), mask, tree), mask


def _to_kept(rule: Rule, kept: jax.Array, like: Variables) -> Tilt:
    """The tilt to parameters that are zero, and stay so, where they were pruned."""
    mask = _unpacked(kept, like, rule.prunable(like))
    return restricted(jax.tree.map(lambda x, m: jnp.ones_like(x, bool) if m is None else m, like.params, mask.params))


def _over(like: Variables, change: Callable, mask: Variables, tree: PyTree) -> PyTree:
    """``change(leaf, mask or None)`` in every part of a tree that is shaped as the model or its params."""
    shape = lambda t: (jax.tree.structure(t), tuple(jnp.shape(x) for x in jax.tree.leaves(t)))
    known = {shape(like): mask, shape(like.params): mask.params}

    def one(part):
        found = known.get(shape(part))
        return part if found is None else jax.tree.map(change, part, found)

    return jax.tree.map(one, tree, is_leaf=lambda part: shape(part) in known)


def _kept_bytes(like: Variables, mask: Variables, tree: PyTree, parts: PyTree = None) -> jax.Array:
    """Bytes of a tree, or those ``parts`` of it that travel, without the entries that were pruned, ``uint32[]``."""

    def size(x, m):
        entries = x.size if m is None else jnp.sum(m, dtype=jnp.uint32)
        return Sent((), jnp.uint32(entries) * jnp.dtype(x.dtype).itemsize)

    return jnp.uint32(nbytes(marked(_over(like, size, mask, tree), parts)))


def _check(sparsity: Any, start: int, end: int, every: int) -> None:
    checks.not_negative(sparsity, "sparsity")
    if not isinstance(sparsity, Tracer) and sparsity >= 1:
        raise ValueError(f"sparsity must be below 1, the share of entries that is pruned in the end; got {sparsity!r}")
    for name, value in (("start", start), ("end", end)):
        checks.integer(value, name, 0)
    checks.integer(every, "every", 1)
    if end < start:
        raise ValueError(f"pruning() ends after it starts: end={end} is before start={start}")


def _check_round(round: Round) -> None:
    if round.model is None or round.view is None:
        raise ValueError("pruning() prunes the server's model, but this Round has none or sends none")
    if {"encoded", "summed"} & round.traits:
        raise ValueError("pruning() shortens uploads, but this Round's are encoded already: put fl.uplink behind it")
    if {"sub_models", "pruned", "split", "chosen"} & round.traits:
        raise ValueError(
            "pruning() needs a Round that sends one whole model, but this one sends parts of it (federated dropout, "
            "width slices, pruning, private leaves) or several to choose from (clusters), which don't go together"
        )
    if {"partial", "many_models"} & round.traits:
        raise ValueError("pruning() comes before transforms that multiply the model: put it first")
