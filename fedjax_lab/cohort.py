"""The engine's inner part: one cohort's clients, run in lanes, their uploads summed as they come.

One client's computation is an ordinary function with an ordinary loop. The cohort is ordered by work
and run in chunks of ``lanes`` clients (vmap inside, scan outside), so that a chunk's clients make
nearly the same number of steps, and memory is O(lanes x model) and never O(cohort x model).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab.client import ClientData
from fedjax_lab.data import FederatedData
from fedjax_lab.round import Env, Round, nbytes

PyTree = Any
LANES = 10  # clients side by side; small models gain up to about ten on a CPU


class ClientStates(NamedTuple):
    """The population's client states: ``table`` leaves ``[clients, ...]``, ``known: bool[clients]``.

    A row that isn't ``known`` holds zeros; the client's state is made at its first contact. Both are
    ``()`` for rounds whose clients keep nothing.
    """

    table: PyTree
    known: Any


class Turn(NamedTuple):
    """One client's turn, besides what is summed: see :class:`Answers` for the same over a cohort.

    ``alive``: present, and all it computed is finite; its ``state`` is kept. ``counted``: alive, sent, and
    of positive weight. ``kept``: what an aggregator with ``reduce`` gets to see.
    """

    state: PyTree
    alive: jax.Array
    counted: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]
    bytes_up: jax.Array
    bytes_down: jax.Array
    kept: PyTree


class Answers(NamedTuple):
    """What came back from a cohort.

    Attributes:
      sums: ``(value, denominators)`` over the survivors, or the stacked ``(uploads, weights, ok, messages)``
        in the cohort's order for aggregators with ``reduce``.
      clients: the population's next :class:`ClientStates`.
      ids: ``int32[cohort]`` in the order of work, which the next fields share.
      ok: ``bool[cohort]``, clients whose upload counts.
      metrics: ``{name: float[cohort]}`` of each client.
      weights: ``float32[cohort]``, zero where not ``ok``.
      counts: ``{name: int32[]}`` of survivors, non-finite clients, those who kept their upload.
      uplink_bytes, downlink_bytes: exact counters, see :func:`count_bytes`.
    """

    sums: PyTree
    clients: ClientStates
    ids: jax.Array
    ok: jax.Array
    metrics: dict[str, jax.Array]
    weights: jax.Array
    counts: dict[str, jax.Array]
    uplink_bytes: jax.Array
    downlink_bytes: jax.Array


def healthy(tree: PyTree) -> jax.Array:
    """Whether every leaf's float32 sum of squares is finite, ``bool[]``.

    NaN and infinities fail, and so do finite values so large (norms above 1.8e19) that they could only
    overflow in an average.
    """
    squares = [
        jnp.sum(jnp.square(leaf.astype(jnp.float32)))
        for leaf in map(jnp.asarray, jax.tree.leaves(tree))
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    return jnp.isfinite(sum(squares)) if squares else jnp.bool_(True)


def select(condition: jax.Array, chosen: PyTree, other: PyTree) -> PyTree:
    """``chosen`` where the scalar ``condition`` holds, else ``other``, leaf by leaf in ``other``'s dtypes."""
    return jax.tree.map(lambda a, b: jnp.where(condition, jnp.asarray(a, b.dtype), b), chosen, other)


def count_bytes(per_client: jax.Array, counted: jax.Array) -> jax.Array:
    """The exact sum of ``uint32[n]`` where ``counted``, as ``uint32[2]``: multiples of 65536, and the rest.

    JAX has no 64-bit integers by default; :func:`total_bytes` makes a Python integer of it.
    """
    per_client = jnp.where(counted, per_client, 0).astype(jnp.uint32)
    return jnp.stack([jnp.sum(per_client >> 16), jnp.sum(per_client & 0xFFFF)])


def total_bytes(counter: Any) -> int:
    """The number of bytes in a counter of :func:`count_bytes`; extra leading axes are summed over."""
    high, low = np.asarray(counter, np.uint64).reshape(-1, 2).sum(0)
    return int(high) * 65536 + int(low)


def empty_states(round: Round, server: PyTree, data: FederatedData) -> ClientStates:
    """The states of a population that nobody has contacted."""
    shape = jax.eval_shape(lambda s, d: round.init_client(s, d.view(jnp.int32(0))), server, data)
    if not jax.tree.leaves(shape):
        return ClientStates(shape, ())
    zeros = lambda s: jnp.zeros((data.num_clients, *s.shape), s.dtype)
    return ClientStates(jax.tree.map(zeros, shape), jnp.zeros(data.num_clients, bool))


def _first_of_each(ids: jax.Array) -> jax.Array:
    """``bool[n]``: entries that don't repeat an earlier one. Samplers promise it; state depends on it."""
    order = jnp.argsort(ids, stable=True)
    repeats = jnp.concatenate([jnp.zeros(1, bool), ids[order][1:] == ids[order][:-1]])
    return jnp.zeros_like(repeats).at[order].set(~repeats)


def make_env(round_number, key, ids, present, population: int) -> Env:
    """The public facts of a round, with duplicate and out-of-range ids made empty slots."""
    invited = (ids >= 0) & (ids < population) & _first_of_each(ids)
    ids = jnp.where(invited, ids, population).astype(jnp.int32)
    present = present & invited
    return Env(round_number, key, ids, invited, present, jnp.int32(population), jnp.sum(present))


def balanced_lanes(cohort: int, limit: int = LANES) -> int:
    """The number of lanes up to ``limit`` that leaves the fewest empty slots in the last chunk."""
    chunks = -(-cohort // limit)
    return -(-cohort // chunks)


def run_cohort(
    round: Round,
    server: PyTree,
    clients: ClientStates,
    data: FederatedData,
    env: Env,
    key: jax.Array,
    lanes: int,
) -> Answers:
    """Broadcast to a cohort, run its clients, and sum what they upload."""
    cohort = env.ids.shape[0]
    chunks = -(-cohort // lanes)
    pad = chunks * lanes - cohort
    # By size alone: an absent client keeps its place, so that the others' sums keep their order and bits.
    work = jnp.where(env.invited, jnp.asarray(data.sizes)[jnp.clip(env.ids, 0, data.num_clients - 1)], -1)
    order = jnp.argsort(-work, stable=True) if chunks > 1 else jnp.arange(cohort)
    ids = jnp.concatenate([env.ids[order], jnp.full(pad, data.num_clients, jnp.int32)])
    present = jnp.concatenate([env.present[order], jnp.zeros(pad, bool)])
    states, known = _gather(clients, ids)

    def one(client_id, present, state, known):
        return client_turn(round, server, data, env, key, client_id, present, state, known)

    slots = (ids, present, states, known)
    if chunks == 1:
        sums, turns = _summed(round, jax.vmap(one)(*slots))
    else:
        slots = jax.tree.map(lambda x: x.reshape(chunks, lanes, *x.shape[1:]), slots)
        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype),
            jax.eval_shape(lambda s: _summed(round, jax.vmap(one)(*s))[0], jax.tree.map(lambda x: x[0], slots)),
        )

        def chunk(sums, slots):
            new, outputs = _summed(round, jax.vmap(one)(*slots))
            return jax.tree.map(jnp.add, sums, new), outputs

        sums, turns = jax.lax.scan(chunk, zeros, slots)
        turns = jax.tree.map(lambda x: x.reshape(chunks * lanes, *x.shape[2:]), turns)

    turns = jax.tree.map(lambda x: x[:cohort], turns)
    ids, present = ids[:cohort], present[:cohort]
    if round.aggregate.reduce is not None:
        slot_of = jnp.zeros(cohort, jnp.int32).at[order].set(jnp.arange(cohort))
        sums = jax.tree.map(lambda x: x[slot_of], turns.kept)
    invited = ids < data.num_clients
    counts = {
        "invited": jnp.sum(invited),
        "survivors": jnp.sum(turns.counted),
        "non_finite": jnp.sum(present & ~turns.alive),
    }
    return Answers(
        sums=sums,
        clients=_scatter(clients, ids, turns.alive, turns.state),
        ids=ids,
        ok=turns.counted,
        metrics=turns.metrics,
        weights=turns.weight,
        counts=counts,
        uplink_bytes=count_bytes(turns.bytes_up, turns.bytes_up > 0),
        downlink_bytes=count_bytes(turns.bytes_down, invited),
    )


def client_turn(round: Round, server, data, env, key, client_id, present, state, known):
    """One client's turn, from broadcast to what may be summed; ordinary code, vmapped by the caller."""
    client = data.view(client_id, env, present)
    client_key = jax.random.fold_in(key, client_id)
    broadcast_key, update_key = jax.random.fold_in(client_key, 0), jax.random.fold_in(client_key, 1)
    if jax.tree.leaves(state):
        # First contact, with the data it has even if it will not answer.
        fresh = round.init_client(server, data.view(client_id, env))
        state = select(known, state, fresh)
    message = round.broadcast(server, state, client, broadcast_key)
    output = round.client_update(message, state, client, update_key)
    weight = jnp.asarray(output.weight, jnp.float32)
    value, denominators = round.aggregate.lift(output.upload, weight, message, env)
    alive = present & healthy((value, denominators, weight, output.state, output.metrics)) & _sane(client)
    sent = jnp.asarray(output.sent, bool)
    counted = alive & sent & (weight > 0)
    zero_unless = lambda tree: jax.tree.map(lambda x: jnp.where(counted, x, jnp.zeros_like(x)), tree)
    kept = ()
    if round.aggregate.reduce is not None:
        kept = (zero_unless(output.upload), jnp.where(counted, weight, 0), counted, message)
    bytes_up = nbytes(output.upload) if output.bytes_up is None else output.bytes_up
    turn = Turn(
        output.state,
        alive,
        counted,
        jnp.where(counted, weight, 0),
        {name: jnp.asarray(value, jnp.float32) for name, value in output.metrics.items()},
        jnp.where(present & sent, jnp.asarray(bytes_up, jnp.uint32), 0),
        jnp.uint32(nbytes(message)),
        kept,
    )
    return zero_unless((value, denominators)), turn


def _sane(client: ClientData) -> jax.Array:
    """Whether the client's own examples are :func:`healthy`, ``bool[]``.

    A saturated softmax turns a feature of 1e38 into a gradient of zero: such data need not show in the
    update. One pass over the rows, in pieces.
    """
    floats = [a for a in jax.tree.leaves(client.arrays) if jnp.issubdtype(a.dtype, jnp.inexact)]
    if not floats:
        return jnp.bool_(True)

    def add(total, batch, mask, positions, key):
        for leaf in jax.tree.leaves(batch):
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                # Masked rows repeat the client's own last row: they can't spoil a sum of squares that is fine.
                total += jnp.sum(jnp.square(leaf.astype(jnp.float32)))
        return total

    return jnp.isfinite(client.fold(add, jnp.float32(0)))


def _summed(round: Round, outputs):
    """Sums over the lanes of what may be summed, and each slot's own turn."""
    lifted, turn = outputs
    if round.aggregate.reduce is not None:
        return (), turn
    return jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), lifted), turn


def _gather(clients: ClientStates, ids: jax.Array):
    if not jax.tree.leaves(clients.table):
        return clients.table, jnp.ones(ids.shape, bool)
    inside = jnp.clip(ids, 0, clients.known.shape[0] - 1)
    return jax.tree.map(lambda t: t[inside], clients.table), clients.known[inside]


def _scatter(clients: ClientStates, ids: jax.Array, alive: jax.Array, states: PyTree) -> ClientStates:
    """Write the survivors' states; every other row keeps its bits."""
    if not jax.tree.leaves(clients.table):
        return clients
    target = jnp.where(alive, ids, clients.known.shape[0])
    put = lambda table, new: table.at[target].set(new.astype(table.dtype), mode="drop")
    return ClientStates(jax.tree.map(put, clients.table, states), clients.known.at[target].set(True, mode="drop"))
