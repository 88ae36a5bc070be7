"""Clusters of clients with a model each, which every client chooses by its own loss: IFCA and HypCluster."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.local import mean_loss
from fedjax_lab.round import Aggregator, Env, Lens, Round, Transform, identity, through
from fedjax_lab.transforms import memories, stacked
from fedjax_lab.transforms.personal import received_model
from fedjax_lab.turn import select

PyTree = Any


class ClusterServer(NamedTuple):
    """The inner server's state of every cluster, leaves ``[k, ...]``."""

    models: PyTree


class Chosen(NamedTuple):
    """The inner ``upload``, and the ``cluster`` that it is for, an integer ``[]``."""

    upload: PyTree
    cluster: jax.Array


class Clustered(NamedTuple):
    """The inner aggregate of every cluster, leaves ``[k, ...]``, and its survivors ``counts: float32[k]``."""

    means: PyTree
    counts: jax.Array


def clusters(k: int, *, divide_by: str = "cluster", spread: Any = 0.0) -> Transform:
    """Train ``k`` models; each client trains the one with the least loss on its data (IFCA, Ghosh, Chung, Yin and
    Ramchandran, NeurIPS 2020, algorithm 1; HypCluster, Mansour, Mohri, Ro and Suresh, 2020, section 3).

    In every round a client is sent all the models, estimates its cluster by the loss of each on all its examples,
    does what the inner round does with that model, and says which one it was. The server then makes the inner
    round's step in each cluster by itself; one that nobody chose stays as it was. Each client would use the model
    that it chooses, also one that never took part. Kept per client: the inner round's state, one for all models.
    Travels: ``k`` messages down; up what the inner round sends, and the cluster's number.

    The server's metrics ``cluster_0``, ``cluster_1``, ... count who chose each model. ``process.params`` gives the
    first one; all are in ``process.server(state).models``, leaves ``[k, ...]``. A start is ``k`` models too:
    ``process.init(key, params)`` takes leaves ``[k, ...]``; by default each is initialised with its own key.

    Args:
      k: the number of clusters; 1 is the inner round itself.
      divide_by: ``"cluster"``: each model moves by the mean over the clients that chose it (the paper's option II,
        model averaging). ``"cohort"``: those that chose another one count as zero updates, so that a cluster
        moves by its share (option I, gradient averaging).
      spread: standard deviation of normal noise added to each model's start. Models that start alike, as linear
        ones at zero do, stay alike without it.

    Raises:
      ValueError: ``k`` below 1, another ``divide_by``, a negative ``spread``; a Round without a model or a loss;
        when the process is built, more clusters than clients in a round, or a start of another number of models.
    """
    checks.positive(k, "k", integer=True)
    k = int(k)
    checks.not_negative(spread, "spread")
    _check_denominator(divide_by)

    def transform(round: Round) -> Round:
        model, view = _one_model(round)
        if k == 1:
            return round
        _check_messages(round)
        memories.of_one_model(round, "clusters() lets clients go from one model to another")
        choose = _least_loss(round)
        number = jnp.uint8 if k <= 256 else jnp.int32

        def init(key, data, params=None):
            given = stacked.one_each(params, k, f"clusters({k})")
            each = zip(stacked.keys_of(key, k), given, strict=True)
            return ClusterServer(stacked.stack([_start(round, own, data, start, spread) for own, start in each]))

        def broadcast(server, state, client, key):
            return jax.vmap(lambda one: round.broadcast(one, state, client, key))(server.models)

        def client_update(message, state, client, key, tilt=identity):
            cluster = choose(message, state, client, key)
            out = round.client_update(stacked.pick(message, cluster), state, client, key, tilt=tilt)
            cluster = cluster.astype(number)
            more = None if out.bytes_up is None else out.bytes_up + cluster.dtype.itemsize
            parts = None if out.parts is None else Chosen(out.parts, jnp.bool_(True))
            return out._replace(upload=Chosen(out.upload, cluster), bytes_up=more, parts=parts)

        def server_update(server, aggregate, key):
            keys = jax.random.split(key, k)
            new, metrics = jax.vmap(round.server_update)(server.models, aggregate.means, keys)
            kept = jax.vmap(select)(aggregate.counts > 0, new, server.models)
            share = aggregate.counts / jnp.maximum(jnp.sum(aggregate.counts), 1)
            metrics = {name: jnp.sum(share * values) for name, values in metrics.items()}
            return ClusterServer(kept), metrics | {f"cluster_{j}": aggregate.counts[j] for j in range(k)}

        def personalize(message, state, client, key):
            return round.personalize(stacked.pick(message, choose(message, state, client, key)), state, client, key)

        inside = lambda server: stacked.pick(server.models, 0)
        put = lambda server, part: ClusterServer(stacked.replaced(server.models, 0, part))
        return round._replace(
            init=init,
            init_client=lambda server, client: round.init_client(inside(server), client),
            broadcast=broadcast,
            client_update=client_update,
            aggregate=_by_cluster(round.aggregate, k, divide_by == "cohort"),
            server_update=server_update,
            personalize=personalize,
            model=through(inside, put, model),
            view=_first(view),
            traits=round.traits | {"many_models", "chosen", "personal"},
        )

    return transform


def _check_denominator(divide_by: Any) -> None:
    """Refuse what is no way to divide."""
    if divide_by not in ("cluster", "cohort"):
        near = checks.nearest(str(divide_by), ("cluster", "cohort"))
        raise ValueError(f"divide_by must be 'cluster' or 'cohort'; got {checks.shown(divide_by)}{near}")


def _one_model(round: Round) -> tuple[Lens, Lens]:
    """The lenses ``model`` and ``view`` of a Round; one that doesn't train one model is refused."""
    model, view = round.model, round.view
    if model is None or view is None or round.loss is None or round.personalize is None:
        raise ValueError("clusters() chooses among models by their loss, but this Round trains none")
    if "many_models" in round.traits:
        raise ValueError("clusters() multiplies a Round's model, but this Round has several already")
    return model, view


def _check_messages(round: Round) -> None:
    """Refuse a Round that sends a client what is new to it of the one model that it holds."""
    if "by_leaf" in round.traits:
        raise ValueError(
            "clusters() sends several models, but partial_averaging() sends a client what is new to it of one: "
            "leave one of the two out"
        )
    if {"pruned", "in_step"} & round.traits:
        raise ValueError(
            "clusters() sends several models, but this Round (pruning, lag_ps, fl.downlink) sends what is new to a "
            "client that holds one: put fl.downlink behind clusters(), and leave the others out"
        )


def _least_loss(round: Round) -> Callable[[PyTree, PyTree, Any, jax.Array], jax.Array]:
    """``(messages, state, client, key) -> int32[]``: which of the models has the least loss on a client's examples."""
    loss: Any = round.loss
    sent = received_model(round, "clusters()")

    def choose(messages, state, client, key):
        def of(one):
            value = mean_loss(loss, sent(one, state, client, key), client, key)
            return jnp.where(jnp.isnan(value), jnp.inf, value)  # a model that diverged is nobody's choice

        return jnp.argmin(jax.vmap(of)(messages))

    return choose


def _start(round: Round, key: jax.Array, data: Any, params: PyTree, spread: Any) -> PyTree:
    """One cluster's inner server state, its model spread out from its own initialisation or the given one."""
    server = round.init(key, data, params)
    if isinstance(spread, int | float) and spread == 0:
        return server
    lens: Any = round.model
    return round.init(key, data, stacked.spread_out(lens.get(server).params, spread, key))


def _first(view: Lens) -> Lens:
    return through(
        lambda message: stacked.pick(message, 0), lambda message, part: stacked.replaced(message, 0, part), view
    )


def _by_cluster(inner: Aggregator, k: int, cohort_wide: bool) -> Aggregator:
    """The inner aggregator in every cluster by itself."""

    def enough(env: Env) -> None:
        cohort = env.ids.shape[0]
        if k > cohort:
            raise ValueError(f"{k} clusters are more than the {cohort} clients of a round: some could never be chosen")

    def lift(chosen, weight, message, env):
        here = jnp.arange(k) == chosen.cluster
        value, below = inner.lift(chosen.upload, weight, stacked.pick(message, chosen.cluster), env)
        return stacked.placed(value, here), (stacked.placed(below, here), here.astype(jnp.float32))

    def finish(sums, env):
        enough(env)
        value, (below, counts) = sums
        # Of this many survivors, also where schedules discount what they add up.
        shares = counts / jnp.maximum(jnp.sum(counts), jnp.finfo(jnp.float32).tiny)
        survivors = env.survivors * shares
        if cohort_wide:
            below = jax.tree.map(lambda d: jnp.broadcast_to(d.sum(0, keepdims=True), d.shape), below)
            survivors = jnp.broadcast_to(jnp.asarray(env.survivors, jnp.float32), shares.shape)
        one = lambda value, below, survivors: inner.finish((value, below), env._replace(survivors=survivors))
        return Clustered(jax.vmap(one)(value, below, survivors), counts)

    if inner.reduce is None:
        return Aggregator(lift, finish)
    if cohort_wide:
        raise ValueError("divide_by='cohort' needs an aggregator that adds up, and this Round's sees every upload")
    whole: Any = inner.reduce

    def reduce(chosen, weights, ok, messages, env):
        enough(env)

        def one(j, messages):
            mine = ok & (chosen.cluster == j)
            zeros = lambda x: jnp.where(mine.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros_like(x))
            own = env._replace(survivors=jnp.sum(mine))
            return whole(jax.tree.map(zeros, chosen.upload), zeros(weights), mine, messages, own)

        means = jax.vmap(one, in_axes=(0, 1))(jnp.arange(k), messages)
        counts = jnp.sum(ok[:, None] & (chosen.cluster[:, None] == jnp.arange(k)[None]), 0, dtype=jnp.float32)
        return Clustered(means, counts)

    return Aggregator(lift, finish, reduce)
