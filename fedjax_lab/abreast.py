"""Cohorts of several cells of a sweep: all their clients share the lanes.

Cells side by side by ``vmap`` alone would walk in step: every chunk of clients would take as long as the largest
cell's. Here ``vmap`` over cells makes one cohort of theirs, ordered by work like any other, in which each lane reads
the server, the key and the hyper-parameters of its own cell, and adds to its own cell's sums.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from fedjax_lab.lanes import plan, side_by_side
from fedjax_lab.packing import Parts, in_parts, train
from fedjax_lab.program import Program
from fedjax_lab.states import gather, rows, scatter

PyTree = Any

# Bytes of what all clients of a packed cohort begin with; beyond, they run in chunks.
MOST_HELD = 1 << 26


class Turns(NamedTuple):
    """The turns of the clients of ``count`` cells, and what they read.

    ``turn``: ``(server, data, env, key, *slot)`` of one client, traced with the constants ``consts``. ``given``:
    ``(consts, server, key)``, of each cell where ``own``, else of all; ``env``: of each.
    """

    count: int
    turn: Program
    given: PyTree
    own: PyTree
    data: PyTree
    env: PyTree

    def inputs(self, cell: jax.Array, *slot: PyTree) -> tuple[list[Any], tuple]:
        """The constants and the arguments of the turn of a client of ``cell``."""
        mine = lambda x, own=True: x[jnp.minimum(cell, self.count - 1)] if own else x
        consts, server, key = jax.tree.map(mine, self.given, self.own)
        return consts, (server, self.data, jax.tree.map(mine, self.env), key, *slot)

    def shared(self, *slot: PyTree) -> list[bool]:
        """Which of them, leaf by leaf, are the same for all cells' clients."""
        every = lambda tree, same: jax.tree.map(lambda _: same, tree)
        consts, server, key = jax.tree.map(lambda own: not own, self.own)
        of_turn = (server, every(self.data, True), every(self.env, False), key, *every(slot, False))
        return [*consts, *jax.tree.leaves(of_turn)]


def in_shared_lanes(
    alone: Callable,
    turn_in: Callable[[int], Program],
    width: Callable[[int, int, bool], int],
    work: Callable,
    summed: bool,
) -> Callable:
    """``alone``, which under ``vmap`` runs the clients of all cells in the same lanes.

    Args:
      alone: ``(given, clients, data, env) -> (sums, turns, clients)``, one cell's cohort; ``given`` is what its
        clients' turns read besides the data and the round's public facts: ``(consts, server, key)``.
      turn_in: ``lanes ->`` the program ``(server, data, env, key, client_id, present, state, known) -> (summands,
        turn)`` of one client, in the form that is fast for so many side by side.
      width: ``(clients, cohorts, packed) -> lanes``.
      work: ``(env, data) -> int[cohort]``, what each client's turn costs.
      summed: whether the summands are added up.
    """
    function = custom_vmap(alone)

    @function.def_vmap
    def of_cells(cells: int, batched: list, given: PyTree, clients: PyTree, data: PyTree, env: PyTree):
        own_given, own_clients, own_data, own_env = batched
        if any(jax.tree.leaves(own_data)):  # each cell has a population of its own
            axes = jax.tree.map(lambda own: 0 if own else None, (own_given, own_clients, own_data, own_env))
            out = jax.vmap(alone, axes, axis_size=cells)(given, clients, data, env)
            return out, jax.tree.map(lambda _: True, out)
        whole = lambda x, own: x if own else jnp.broadcast_to(x, (cells, *x.shape))
        clients, env = jax.tree.map(whole, (clients, env), (own_clients, own_env))
        ids, cohort = env.ids, env.ids.shape[1]
        count = cells * cohort
        costs = jax.vmap(lambda env: work(env, data))(env)
        states, known = _gathered(clients, ids)
        all_ = Turns(cells, turn_in(width(count, cells, True)), given, own_given, data, env)
        slot = (jnp.int32(0), *jax.tree.map(lambda x: x[0, 0], (ids, env.present, states, known)))
        parts = None
        if width(count, cells, True) > 1:  # else there is no chunk to fill
            parts = in_parts(all_.turn.jaxpr, all_.shared(*slot[1:]))
        if parts is not None and count * _held(all_, parts, slot) > MOST_HELD:
            parts = None
        slots = plan(costs.reshape(count), width(count, cells, parts is not None)).slots
        order = slots.reshape(-1)
        take = lambda x: rows(x.reshape(count, *x.shape[2:]), jnp.minimum(order, count - 1))
        there = env.present.reshape(count).at[order].get(mode="fill", fill_value=False)
        entries = (order // cohort, take(ids), there, jax.tree.map(take, states), take(known))
        entries = jax.tree.map(lambda x: x.reshape(*slots.shape, *x.shape[1:]), entries)
        seat = jnp.zeros(count, jnp.int32).at[order].set(jnp.arange(len(order), dtype=jnp.int32), mode="drop")
        back = lambda x: rows(x.reshape(len(order), *x.shape[2:]), seat).reshape(cells, cohort, *x.shape[2:])
        if parts is not None:
            summands, turns = jax.tree.map(back, _packed(all_, parts, entries, slot))
            sums = jax.tree.map(lambda x: jnp.sum(x, 1, x.dtype), summands) if summed else ()
        else:
            sums, turns = _chunk_by_chunk(all_, entries, summed)
            turns = jax.tree.map(back, turns)
        out = (sums, turns._replace(state=()), _scattered(clients, ids, turns))
        return out, jax.tree.map(lambda _: True, out)

    return function


def _chunk_by_chunk(all_: Turns, entries: PyTree, summed: bool) -> tuple[PyTree, PyTree]:
    """Each cell's sums, and turns ``[chunks, lanes, ...]``."""
    lanes = entries[0].shape[1]

    def one(*entry):
        consts, arguments = all_.inputs(*entry)
        return all_.turn.given(consts)(*arguments)

    def add(sums, chunk):
        summands, turns = side_by_side(one, lanes)(*chunk)
        if summed:
            sums = jax.tree.map(lambda a, b: a.at[chunk[0]].add(b, mode="drop"), sums, summands)
        return sums, turns

    zeros = ()
    if summed:
        zeros = jax.tree.map(lambda s: jnp.zeros((all_.count, *s.shape), s.dtype), all_.turn.results[0])
    return jax.lax.scan(add, zeros, entries)


def _packed(all_: Turns, parts: Parts, entries: PyTree, slot: PyTree) -> tuple[PyTree, PyTree]:
    """Every client's summands and turn, ``[chunks, lanes, ...]``, whose training loops are packed."""
    chunks, lanes = entries[0].shape
    public, begin = _beginning(all_, parts, slot)
    begun = jax.lax.scan(lambda _, chunk: ((), side_by_side(begin, lanes)(*chunk)), (), entries)[1]
    facts, carry, kept = jax.tree.map(lambda x: x.reshape(chunks * lanes, *x.shape[2:]), begun)
    carry = train(parts, public, facts, carry, lanes)
    out = jax.vmap(lambda kept, carry: parts.finish(public, kept, carry))(kept, carry)
    return all_.turn.structure.unflatten([x.reshape(chunks, lanes, *x.shape[1:]) for x in out])


def _beginning(all_: Turns, parts: Parts, slot: PyTree) -> tuple[list, Callable]:
    """What is the same for all clients, and how each begins; ``slot`` is anyone's."""
    shared = all_.shared(*slot[1:])

    def split(entry, same: bool) -> list:
        consts, arguments = all_.inputs(*entry)
        values = [*consts, *jax.tree.leaves(arguments)]
        return [value for value, is_shared in zip(values, shared, strict=True) if is_shared == same]

    public = parts.once(split(slot, True))
    return public, lambda *entry: parts.begin(public, split(entry, False))


def _held(all_: Turns, parts: Parts, slot: PyTree) -> int:
    """Bytes of what a client begins with."""
    each = jax.eval_shape(lambda slot: _beginning(all_, parts, slot)[1](*slot), slot)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(each))


def _gathered(clients: PyTree, ids: jax.Array) -> tuple[PyTree, jax.Array]:
    """The cohorts' states, leaves ``[cells, cohort, ...]``, and which are known."""
    if not jax.tree.leaves(clients.table):
        return clients.table, jnp.ones(ids.shape, bool)
    return jax.vmap(gather)(clients, ids)


def _scattered(clients: PyTree, ids: jax.Array, turns: PyTree) -> PyTree:
    if not jax.tree.leaves(clients.table):
        return clients
    return jax.vmap(scatter)(clients, ids, turns.facts.alive, turns.state)
