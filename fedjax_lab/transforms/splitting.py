"""Clustered federated learning by the similarity of updates: clusters that divide in two when they have settled."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from fedjax_lab import checks
from fedjax_lab.models.base import Variables
from fedjax_lab.nesting import first_turn
from fedjax_lab.round import Aggregator, Env, Round, Transform, through
from fedjax_lab.transforms import memories, split_tree, stacked
from fedjax_lab.transforms.bipartition import LINKAGES, bipartition, cosines, halves, lengths, per_cluster
from fedjax_lab.transforms.split_tree import Places, Tree
from fedjax_lab.turn import select

PyTree = Any


class SplitServer(NamedTuple):
    """The server's clusters.

    Attributes:
      models: the inner server's state of each cluster, ``[max_clusters, ...]``.
      tree: the divisions that were made.
      places: where each client of the population is.
      count: ``int32[]``, how many clusters there are.
      round: ``int32[]``, rounds done.
    """

    models: PyTree
    tree: Tree
    places: Places
    count: jax.Array
    round: jax.Array

    @property
    def cluster(self) -> jax.Array:
        """The number of each client's cluster, ``int32[population]``."""
        return self.places.cluster


class Collected(NamedTuple):
    """A cohort's uploads as the server looks at them.

    Attributes:
      lifted: what the inner aggregator lifted, leaves ``[cohort, ...]``.
      updates: ``float32[cohort, parameters]``.
      weights: ``float32[cohort]``; 0 where not ``ok``.
      ok: ``bool[cohort]``.
      env: the round's public facts.
    """

    lifted: PyTree
    updates: jax.Array
    weights: jax.Array
    ok: jax.Array
    env: Env


class Rule(NamedTuple):
    """When clusters are divided: the arguments of :func:`split_clusters`."""

    slots: int
    eps1: Any
    eps2: Any
    gamma_max: Any
    min_rounds: int
    linkage: str


class Divisions(NamedTuple):
    """Which clusters are divided.

    Attributes:
      second: ``bool[cohort]``, who is in the second half of a cluster.
      divided: ``bool[slots]``.
      number: ``int32[slots]``, of the cluster that a second half becomes.
      metrics: the lengths that were looked at.
    """

    second: jax.Array
    divided: jax.Array
    number: jax.Array
    metrics: dict[str, jax.Array]


def split_clusters(
    max_clusters: int,
    *,
    eps1: Any,
    eps2: Any,
    gamma_max: Any = 0.0,
    min_rounds: int = 20,
    linkage: str = "single",
) -> Transform:
    """Divide clusters of clients in two whose updates disagree (CFL, Sattler, Mueller and Samek, "Clustered Federated
    Learning: Model-Agnostic Distributed Multitask Optimization under Privacy Constraints", 2020, algorithms 1 to 3).

    All clients begin in one cluster. A cluster whose mean update has become short, ``|mean| < eps1``, while a member's
    is long, ``max |update| > eps2``, has settled where it doesn't suit its members: it is divided by the cosine
    similarity of their updates (:func:`fedjax_lab.transforms.bipartition.bipartition`), each half going on from the
    cluster's model with its own mean. Means are by weight. Kept per client: the inner round's state; its cluster is
    kept on the server. Travels: what the inner round sends, each way. The server looks at every client's own
    update, so that an ``fl.uplink`` around it can't hide them in a sum.

    A client that comes to a cluster after its division goes down the tree (algorithm 3): it is sent the model as it
    was, and goes on to the half whose updates its own is closer to; that update moves no model. So do newcomers
    (``fl.cold_start``), one division in each of their rounds, and clients that were absent when their cluster was
    divided. The paper goes by the most similar update of each half; here it is the mean of their directions,
    so that the server needn't keep every update.

    The server's metrics: ``clusters``, and over clusters ``largest_mean_update`` and ``longest_update``, by which to
    choose eps1 and eps2. ``process.params`` gives the first cluster's model; all are in
    ``process.server(state).models``, who is where in ``.cluster``.

    Args:
      max_clusters: how many models there may be; a cluster is not divided beyond it.
      eps1: how short the mean update must be.
      eps2: how long a member's, above ``eps1``.
      gamma_max: a bound of how far each client's update may lie from its distribution's, relative to its length; a
        division counts as right if ``gamma_max < sqrt((1 - alpha) / 2)`` with ``alpha`` the largest similarity between
        the halves, and is not made otherwise. 0: always made.
      min_rounds: rounds before the first division (the authors' code waits for 20).
      linkage: ``"single"``, the paper's optimal bipartition; ``"complete"``, what the authors' code does.

    Raises:
      ValueError: fewer than 1 cluster; eps that aren't positive, or ``eps1 >= eps2``; a ``gamma_max`` outside 0..1;
        another linkage; a Round that trains no model, has several, sees every upload already, or encodes them.
    """
    rule = _checked(Rule(max_clusters, eps1, eps2, gamma_max, min_rounds, linkage))
    slots = rule.slots

    def transform(round: Round) -> Round:
        _check(round)
        inner, model = round.aggregate, round.model

        def alone(upload, message, env):
            """What a client would change if it were the only one."""
            return flat_update(inner.finish(inner.lift(upload, jnp.float32(1), message, env), env))

        def update_of_one(server, data):
            output, message, env = first_turn(round, server, data)
            return alone(output.upload, message, env)

        def init(key, data, params=None):
            one = round.init(key, data, params)
            models = jax.tree.map(lambda x: jnp.stack([x] * slots), one)
            size = jax.eval_shape(update_of_one, one, data).size
            places = Places(*(jnp.zeros(data.num_clients, jnp.int32) for _ in Places._fields))
            tree = split_tree.seed(one, size, slots - 1)
            return SplitServer(models, tree, places, jnp.int32(1), jnp.int32(0))

        def own(server, client):
            """The inner server that a client is to work with."""
            # Whoever is not of the population is at the root.
            place = jax.tree.map(lambda x: x.at[client.id].get(mode="fill", fill_value=0), server.places)
            known = jax.tree.map(lambda x: jnp.where(client.id >= 0, x, 0), place)
            return split_tree.model_for(server.tree, server.models, *split_tree.where(server.tree, known, server.count))

        def reduce(uploads, weights, ok, messages, env):
            def one(upload, weight, ok, message):
                lifted = inner.lift(upload, weight, message, env)
                zeros = lambda tree: jax.tree.map(lambda x: jnp.where(ok, x, jnp.zeros_like(x)), tree)
                return zeros(lifted), zeros(alone(upload, message, env))

            lifted, updates = jax.vmap(one)(uploads, weights, ok, messages)
            return Collected(lifted, updates, weights, ok, env)

        inside = lambda server: stacked.pick(server.models, 0)
        put = lambda server, part: server._replace(models=stacked.replaced(server.models, 0, part))
        return round._replace(
            init=init,
            init_client=lambda server, client: round.init_client(own(server, client), client),
            broadcast=lambda server, state, client, key: round.broadcast(own(server, client), state, client, key),
            aggregate=Aggregator(inner.lift, inner.finish, reduce),
            server_update=lambda server, collected, key: _step(rule, round, server, collected, key),
            model=model and through(inside, put, model),
            traits=round.traits | {"many_models", "personal"},
        )

    return transform


def flat_update(aggregate: PyTree) -> jax.Array:
    """What a client changes in the parameters, ``float32[n]``: those of the first Variables, or else all floats."""
    parts = jax.tree.leaves(aggregate, is_leaf=lambda x: isinstance(x, Variables))
    found = [part.params for part in parts if isinstance(part, Variables)][:1] or [aggregate]
    leaves = [x for x in jax.tree.leaves(found) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)]
    return jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in leaves])


def _checked(rule: Rule) -> Rule:
    """The rule if it makes sense, with its number of slots as an ``int``."""
    checks.positive(rule.slots, "max_clusters", integer=True)
    for value, name in ((rule.eps1, "eps1"), (rule.eps2, "eps2")):
        checks.positive(value, name)
    if not isinstance(rule.eps1, Tracer) and not isinstance(rule.eps2, Tracer) and rule.eps1 >= rule.eps2:
        raise ValueError(
            f"eps1 must be below eps2, as a mean is no longer than the longest update; got {rule.eps1} and {rule.eps2}"
        )
    checks.probability(rule.gamma_max, "gamma_max")
    checks.not_negative(rule.min_rounds, "min_rounds", integer=True)
    if rule.linkage not in LINKAGES:
        near = checks.nearest(str(rule.linkage), LINKAGES)
        raise ValueError(f"linkage must be one of {LINKAGES}; got {checks.shown(rule.linkage)}{near}")
    return rule._replace(slots=int(rule.slots))


def _check(round: Round) -> None:
    if round.model is None or round.view is None or round.personalize is None:
        raise ValueError("split_clusters() trains a model for each cluster, but this Round trains none")
    if "many_models" in round.traits:
        raise ValueError("split_clusters() multiplies a Round's model, but this Round has several already")
    memories.of_one_model(round, "split_clusters() takes clients to another model")
    if "encoded" in round.traits:
        raise ValueError("split_clusters() compares updates, and these are encoded: put uplink() after it")
    if round.aggregate.reduce is not None:
        raise ValueError("split_clusters() needs an aggregator that adds up, and this Round's sees every upload itself")


def _step(rule: Rule, round: Round, server: SplitServer, collected: Collected, key: jax.Array):
    """The server after a round, and its metrics: clusters divide, each model moves, clients go where they belong."""
    slots, env, ok, updates = rule.slots, collected.env, collected.ok, collected.updates
    here = jax.tree.map(lambda x: x.at[env.ids].get(mode="fill", fill_value=0), server.places)
    find = lambda places: split_tree.where(server.tree, places, server.count)
    member, asked, division = jax.vmap(find)(here)
    chosen = split_tree.choose(server.tree, here, member, division, updates)
    # Whoever is asked about an old division, or didn't answer, moves no cluster.
    cluster = jnp.where(ok & ~asked, member, slots)
    second, divided, number, found = _divisions(rule, server, collected, cluster)
    seat = jnp.clip(cluster, 0, slots - 1)
    taking = divided[seat] & (cluster < slots)
    moved = second & taking
    after = jnp.where(moved, number[seat], cluster)
    tree = split_tree.grown(server.tree, server.models, halves(updates, cluster, second, slots), divided, number)
    models = _grown(server.models, divided, number, slots)
    models, metrics = _served(round, models, collected, after, key, slots)
    stay = Places(member, here.parent, jnp.where(taking, number[seat], here.passed))
    moves = Places(after, member, number[seat])
    placed = jax.vmap(select)(moved, moves, jax.vmap(select)(asked, chosen, stay))
    rows = jnp.where(ok & (asked | taking), env.ids, server.cluster.shape[0])
    places = jax.tree.map(lambda x, new: x.at[rows].set(new, mode="drop"), server.places, placed)
    count = server.count + jnp.sum(divided)
    metrics |= {"clusters": count.astype(jnp.float32)} | found
    return SplitServer(models, tree, places, count, server.round + 1), metrics


def _divisions(rule: Rule, server: SplitServer, collected: Collected, cluster: jax.Array) -> Divisions:
    """The clusters, by number ``int32[cohort]``, that have settled where it doesn't suit their members."""
    slots, updates = rule.slots, collected.updates
    means, longest = lengths(updates, collected.weights, cluster, slots)
    members = per_cluster(collected.ok.astype(jnp.int32), cluster, slots)
    settled = (means < rule.eps1) & (longest > rule.eps2) & (members > 2) & (server.round >= rule.min_rounds)
    second, between = bipartition(cosines(updates), cluster, settled & (server.count < slots), rule.linkage)
    settled = settled & (rule.gamma_max < jnp.sqrt(jnp.maximum(1 - between, 0) / 2)) & (between > -jnp.inf)
    # New clusters get the next numbers, as far as there are any.
    number = server.count + jnp.cumsum(settled) - 1
    metrics = {"largest_mean_update": jnp.max(means), "longest_update": jnp.max(longest)}
    return Divisions(second, settled & (number < slots), number, metrics)


def _grown(models: PyTree, divided: jax.Array, number: jax.Array, slots: int) -> PyTree:
    """The models, with that of each divided cluster copied to its new number."""
    source = jnp.arange(slots).at[jnp.where(divided, number, slots)].set(jnp.arange(slots), mode="drop")
    return stacked.pick(models, source)


def _served(round: Round, models: PyTree, collected: Collected, cluster: jax.Array, key, slots: int):
    """The inner server's step in every cluster that somebody of it survived, and its metrics' means over them."""
    env = collected.env
    counts = per_cluster(collected.ok.astype(jnp.float32), cluster, slots)
    value, below = jax.tree.map(lambda x: per_cluster(x, cluster, slots), collected.lifted)

    def one(server, value, below, survivors, key):
        aggregate = round.aggregate.finish((value, below), env._replace(survivors=survivors))
        return round.server_update(server, aggregate, key)

    new, metrics = jax.vmap(one)(models, value, below, counts, jax.random.split(key, slots))
    whole = jax.vmap(select)(counts > 0, new, models)
    share = counts / jnp.maximum(jnp.sum(counts), 1)
    return whole, {name: jnp.sum(share * values) for name, values in metrics.items()}
