"""The engine's inner part: one cohort's clients, run in lanes, their uploads summed as they come.

One client's computation is an ordinary function with an ordinary loop. The cohort is ordered by work
and cut into chunks of ``lanes`` clients (vmap inside, scan outside), so that a chunk's clients make
nearly the same number of steps, and memory is O(lanes x model) and never O(cohort x model). Over
several devices each chunk is one device's, and only sums and the cohort's own results are exchanged.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_lab import nearby, whole_loops
from fedjax_lab.abreast import in_shared_lanes
from fedjax_lab.data import FederatedData
from fedjax_lab.devices import AXIS
from fedjax_lab.lanes import Plan, choose, plan, plan_own, side_by_side
from fedjax_lab.loops import at_most
from fedjax_lab.program import Program, trace
from fedjax_lab.round import Env, Round
from fedjax_lab.sharding import clients_each
from fedjax_lab.states import ClientStates, are_large, exchange, gather, padded, rows, scatter, zero_unless
from fedjax_lab.turn import Turn, client_turn

PyTree = Any

FEW = 128  # clients that are compared each with each rather than sorted


class Answers(NamedTuple):
    """What came back from a cohort.

    Attributes:
      sums: ``(value, denominators)`` over the survivors, or the stacked ``(uploads, weights, ok, messages)``
        in the cohort's order for aggregators with ``reduce``.
      clients: the population's next :class:`ClientStates`.
      ids: ``int32[cohort]``, in the cohort's order, which the next fields share.
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


def _first_of_each(ids: jax.Array) -> jax.Array:
    """``bool[n]``: entries that don't repeat an earlier one. Samplers promise it; state depends on it."""
    if len(ids) <= FEW:  # one kernel to compile instead of five
        earlier = np.tri(len(ids), k=-1, dtype=bool)
        return ~jnp.any((ids[:, None] == ids[None]) & earlier, axis=1)
    order = jnp.argsort(ids, stable=True)
    repeats = jnp.concatenate([jnp.zeros(1, bool), ids[order][1:] == ids[order][:-1]])
    return jnp.zeros_like(repeats).at[order].set(~repeats)


def make_env(round_number, key, ids, present, population: int) -> Env:
    """The public facts of a round, with duplicate and out-of-range ids made empty slots."""
    invited = (ids >= 0) & (ids < population) & _first_of_each(ids)
    ids = jnp.where(invited, ids, population).astype(jnp.int32)
    present = present & invited
    return Env(round_number, key, ids, invited, present, jnp.int32(population), jnp.sum(present))


def run_cohort(
    round: Round | Callable[[PyTree], Round],
    server: PyTree,
    clients: ClientStates,
    data: FederatedData,
    env: Env,
    key: jax.Array,
    lanes: int | None = None,
    mesh: Mesh | None = None,
    sizes: np.ndarray | None = None,
    data_specs: PyTree = P(),
    beside: PyTree = (),
    beside_specs: PyTree = P(),
    abreast: bool = False,
) -> Answers:
    """Broadcast to a cohort, run its clients, and sum what they upload.

    Args:
      round: what a round computes; or a function of ``beside`` that gives it, for a Round that reads arrays which
        lie apart on the devices.
      server, clients, data: the round's start; over a mesh, the rows of ``clients`` lie along its axis.
      env: the cohort.
      key: the clients' private key, which each folds its id into.
      lanes: clients side by side on each device; ``None`` chooses.
      mesh: devices along an axis ``"clients"``; ``None`` for one device.
      sizes: the population's sizes on the host, which a choice of lanes looks at.
      data_specs: of :func:`fedjax_lab.sharding.placed`; not one for all when every device has its own clients.
      abreast: under ``vmap`` cohorts share their lanes (:mod:`fedjax_lab.abreast`); no mesh, and no ``jax.grad``.
    """

    apart = isinstance(data_specs, FederatedData)
    made = (lambda beside: round) if isinstance(round, Round) else round

    def here(server, clients, data, env, key, beside):
        round = made(beside)
        turn = _traced_turn(round, server, clients, data, env, key)
        if mesh is None:
            return _on_one_device(round, turn, lanes, sizes, abreast)((turn.consts, server, key), clients, data, env)
        devices, cohort, work = mesh.shape[AXIS], len(env.ids), work_of(env, data)
        width = min(lanes or _best_lanes(turn, sizes, cohort, devices), cohort)
        inner = _in_lanes(turn, width)
        one = lambda *slot: inner.call(server, data, env, key, *slot)
        if apart:
            me = jax.lax.axis_index(AXIS)
            mine = env.ids // clients_each(data.num_clients, devices) == me
            schedule = plan_own(work, mine & env.invited, width, me)
        else:
            schedule = plan(work, width, devices, _homes(clients, env.ids, data.num_clients))
            schedule = _brought_near(schedule, data, clients, env.ids, jax.lax.axis_index(AXIS))
        return _on_device(round, one, turn.results, clients, data.num_clients, env, schedule, AXIS, apart)

    if mesh is not None:
        clients = padded(clients, mesh.shape[AXIS])
        placed = (P(), P(AXIS), data_specs, P(), P(), beside_specs)
        here = jax.shard_map(
            here, mesh=mesh, in_specs=placed, out_specs=(P(), P(), P(AXIS)), axis_names={AXIS}, check_vma=False
        )
    sums, turns, clients = here(server, clients, data, env, key, beside)
    told = turns.facts
    counted, uplink = told.counted, told.bytes_up
    counts = {
        "invited": jnp.sum(env.invited),
        "survivors": jnp.sum(counted),
        "non_finite": jnp.sum(env.present & ~told.alive),
    }
    return Answers(
        sums=sums if made(beside).aggregate.reduce is None else turns.kept,
        clients=clients,
        ids=env.ids,
        ok=counted,
        metrics=told.metrics,
        weights=told.weight,
        counts=counts,
        uplink_bytes=count_bytes(uplink, uplink > 0),
        downlink_bytes=count_bytes(told.bytes_down, env.invited),
    )


def _homes(clients: ClientStates, ids: jax.Array, population: int) -> jax.Array | None:
    """Which device has a client's state, where it is large: then it had better run there (``int32[cohort]``)."""
    if not (jax.tree.leaves(clients.table) and are_large(clients)):
        return None
    held = clients.known.shape[0]  # rows on each device
    return jnp.minimum(ids // held, (population - 1) // held)


def _traced_turn(round: Round, server, clients: ClientStates, data: FederatedData, env: Env, key) -> Program:
    """``(server, data, env, key, client_id, present, state, known)`` -> what :func:`client_turn` gives."""
    one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    slot = (env.ids[0], env.present[0], jax.tree.map(one, clients.table), jax.ShapeDtypeStruct((), bool))
    turn = lambda server, data, env, key, *slot: client_turn(round, server, data, env, key, *slot)
    return trace(turn, server, data, env, key, *slot)


def _on_one_device(round: Round, turn: Program, lanes: int | None, sizes: np.ndarray | None, abreast: bool) -> Callable:
    """``(given, clients, data, env)`` -> as :func:`_on_device`; ``abreast``: cohorts under ``vmap`` share lanes."""

    def width(clients: int, cohorts: int = 1, packed: bool = False) -> int:
        return min(lanes * cohorts if lanes else _best_lanes(turn, sizes, clients, packed=packed), clients)

    def alone(given, clients, data, env):
        consts, server, key = given
        lanes = width(len(env.ids))
        call = _in_lanes(turn, lanes).given(consts)
        one = lambda *slot: call(server, data, env, key, *slot)
        schedule = _brought_near(plan(work_of(env, data), lanes), data, clients, env.ids, 0)
        return _on_device(round, one, turn.results, clients, data.num_clients, env, schedule, None, False)

    inner = functools.partial(_in_lanes, turn)
    return in_shared_lanes(alone, inner, width, work_of, round.aggregate.reduce is None) if abreast else alone


def _brought_near(schedule: Plan, data: FederatedData, clients: ClientStates, ids: jax.Array, device: Any) -> Plan:
    """The schedule, after what the device's clients will read was read; the states it has follow those of the last."""
    mine = jnp.where((schedule.device == device)[:, None], schedule.slots, len(ids))
    own = ids.at[mine.reshape(-1)].get(mode="fill", fill_value=-1, wrap_negative_indices=False)
    first = device * len(clients.known)
    return schedule._replace(slots=nearby.read_first(schedule.slots, data, clients, own, first))


def _best_lanes(turn: Program, sizes: np.ndarray | None, clients: int, devices: int = 1, packed: bool = False) -> int:
    if whole_loops.suit(turn.jaxpr):
        return 1
    return choose(turn.flops, sizes, clients, devices, packed)


def _in_lanes(turn: Program, lanes: int) -> Program:
    """The turn in the form that is fast for so many side by side."""
    return whole_loops.row_by_row(turn) if lanes == 1 and whole_loops.suit(turn.jaxpr) else turn


def work_of(env: Env, data: FederatedData) -> jax.Array:
    """What each client's turn costs, ``int32[cohort]``, negative for empty slots.

    By size alone: an absent client keeps its place, so that the others' sums keep their order and bits.
    """
    sizes = jnp.asarray(data.sizes).at[jnp.clip(env.ids, 0, data.num_clients - 1)].get(wrap_negative_indices=False)
    return jnp.where(env.invited, sizes, -1)


def _on_device(
    round: Round,
    turn: Callable,
    results: PyTree,
    clients: ClientStates,
    population: int,
    env: Env,
    schedule: Plan,
    axis: str | None,
    apart: bool,
) -> tuple[PyTree, Turn, ClientStates]:
    """The chunks of one device: sums, turns ``[cohort, ...]`` and client states; ``results``: shapes of a turn's."""
    cohort, (chunks, lanes) = env.ids.shape[0], schedule.slots.shape
    slots = schedule.slots.reshape(-1)
    ids = env.ids.at[slots].get(mode="fill", fill_value=population, wrap_negative_indices=False)
    present = env.present.at[slots].get(mode="fill", fill_value=False, wrap_negative_indices=False)
    runs = None if axis is None or apart else jnp.repeat(schedule.device, lanes)
    by_chunk = lambda x: x.reshape(chunks, lanes, *x.shape[1:])

    def run(ids, present, states, known):
        return _summed(round, side_by_side(turn, lanes)(ids, present, states, known))

    summands, told = results
    zeros = () if round.aggregate.reduce is not None else jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), summands)
    if axis is not None:
        states, known = gather(clients, ids, axis, runs)
        mine = schedule.device == jax.lax.axis_index(axis)
        facts = jax.tree.map(by_chunk, (ids, present))
        sums, turns = _own_chunks(run, (zeros, told), facts, states, by_chunk(known), mine)
    elif are_large(clients):  # each read when its chunk is
        fetched = lambda ids, present: run(ids, present, *gather(clients, ids))
        sums, turns = _chunk_by_chunk(fetched, zeros, jax.tree.map(by_chunk, (ids, present)))
    else:
        entries = jax.tree.map(by_chunk, (ids, present, *gather(clients, ids)))
        sums, turns = _chunk_by_chunk(run, zeros, entries)
    turns = jax.tree.map(lambda x: x.reshape(chunks * lanes, *x.shape[2:]), turns)
    new, alive = turns.state, turns.facts.alive
    turns = turns._replace(state=())
    if chunks > 1 or apart:  # back into the cohort's order; client states go to their rows from where they are
        seat = jnp.full(cohort, -1).at[slots].set(jnp.arange(chunks * lanes), mode="drop", wrap_negative_indices=False)
        turns = jax.tree.map(lambda x: rows(x, jnp.maximum(seat, 0), seat >= 0 if apart else None), turns)
    if axis is not None and apart:  # a device holds the rows of its own clients
        sums, turns = exchange((sums, turns), axis)
    elif axis is not None and are_large(clients):
        sums, turns, alive = exchange((sums, turns, alive), axis)
    elif axis is not None:
        ran = runs == jax.lax.axis_index(axis)
        new = jax.tree.map(lambda x: zero_unless(ran, x), new)
        sums, turns, new, alive = exchange((sums, turns, new, alive), axis)
        runs = None
    return sums, turns, scatter(clients, ids, alive, new, axis, runs)


def _chunk_by_chunk(run: Callable, zeros: PyTree, entries: tuple) -> tuple[PyTree, Turn]:
    """The chunks one after the other: sums, from ``zeros`` on, and turns ``[chunks, lanes, ...]``."""
    if len(jax.tree.leaves(entries)[0]) == 1:
        sums, turns = run(*jax.tree.map(lambda x: x[0], entries))
        return sums, jax.tree.map(lambda x: x[None], turns)

    def add(sums, chunk):
        new, turns = run(*chunk)
        return jax.tree.map(jnp.add, sums, new), turns

    return jax.lax.scan(add, zeros, entries)


def _own_chunks(
    run: Callable, begin: tuple[PyTree, Turn], facts: tuple, states: PyTree, known: jax.Array, mine: jax.Array
) -> tuple[PyTree, Turn]:
    """The same of a device that runs some chunks, ``mine: bool[chunks]``, where the others' turns are zeros.

    ``begin``: the sums' zeros, and shapes of one turn. ``states``, leaves ``[chunks * lanes, ...]``, make room for
    those that follow them; the others' are of no use.
    """
    lanes = known.shape[1]
    # Not as [chunks, lanes, ...]: for one lane XLA would copy them all into another layout of the same.
    forward = {"allow_negative_indices": False}
    held = lambda x, chunk: jax.lax.dynamic_slice_in_dim(x, chunk * lanes, lanes, **forward)
    at = lambda x, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False, **forward)

    sums, turn = begin
    turns = jax.tree.map(lambda s: jnp.zeros((*known.shape, *s.shape), s.dtype), turn._replace(state=()))
    own = jnp.argsort(~mine, stable=True)

    def step(t, carry):
        sums, turns, states = carry
        chunk = at(own, t)
        of = lambda take, tree: jax.tree.map(lambda x: take(x, chunk), tree)
        new, out = run(*of(at, facts), of(held, states), at(known, chunk))
        put = lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, chunk, 0, **forward)
        turns = jax.tree.map(put, turns, out._replace(state=()))
        keep = lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), chunk * lanes, 0, **forward)
        return jax.tree.map(jnp.add, sums, new), turns, jax.tree.map(keep, states, out.state)

    sums, turns, states = at_most(len(mine), jnp.sum(mine), step, (sums, turns, states))
    by_lane = lambda x: x.reshape(len(mine), lanes, *x.shape[1:])
    return sums, turns._replace(state=jax.tree.map(by_lane, states))


def _summed(round: Round, outputs):
    """Sums over the lanes of what may be summed, and each slot's own turn."""
    lifted, turn = outputs
    if round.aggregate.reduce is not None:
        return (), turn
    return jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), lifted), turn
