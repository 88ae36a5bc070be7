"""Cohorts of several cells of a sweep: all their clients share the lanes.

Cells side by side by ``vmap`` alone would walk in step: every chunk of clients would take as long as the largest
cell's. Here ``vmap`` over cells makes one cohort of theirs, ordered by work like any other, in which each lane reads
the server, the key and the hyper-parameters of its own cell, and adds to its own cell's sums.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from fedjax_lab.lanes import plan, side_by_side
from fedjax_lab.states import gather, rows, scatter

PyTree = Any


def in_shared_lanes(
    alone: Callable, turn: Callable, width: Callable[[int, int], int], work: Callable, summed: bool
) -> Callable:
    """``alone``, which under ``vmap`` runs the clients of all cells in the same lanes.

    Args:
      alone: ``(given, clients, data, env) -> (sums, turns, clients)``, one cell's cohort; ``given`` is what its
        clients' turns read besides the data and the round's public facts.
      turn: ``(given, data, env, client_id, present, state, known) -> (summands, turn)``, one client's.
      width: ``(clients, cohorts) -> lanes``.
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
        slots = plan(costs.reshape(count), width(count, cells)).slots
        order = slots.reshape(-1)
        states, known = _gathered(clients, ids)
        take = lambda x: rows(x.reshape(count, *x.shape[2:]), jnp.minimum(order, count - 1))
        there = env.present.reshape(count).at[order].get(mode="fill", fill_value=False)
        entries = (order // cohort, take(ids), there, jax.tree.map(take, states), take(known))
        entries = jax.tree.map(lambda x: x.reshape(*slots.shape, *x.shape[1:]), entries)

        def lane(cell, *slot):
            mine = lambda x, own=True: x[jnp.minimum(cell, cells - 1)] if own else x
            return turn(jax.tree.map(mine, given, own_given), data, jax.tree.map(mine, env), *slot)

        def add(sums, chunk):
            summands, turns = side_by_side(lane, slots.shape[1])(*chunk)
            if summed:
                sums = jax.tree.map(lambda a, b: a.at[chunk[0]].add(b, mode="drop"), sums, summands)
            return sums, turns

        zeros = ()
        if summed:
            shapes = jax.eval_shape(lane, *jax.tree.map(lambda x: x[0, 0], entries))[0]
            zeros = jax.tree.map(lambda s: jnp.zeros((cells, *s.shape), s.dtype), shapes)
        sums, turns = jax.lax.scan(add, zeros, entries)
        seat = jnp.zeros(count, jnp.int32).at[order].set(jnp.arange(len(order)), mode="drop")
        back = lambda x: rows(x.reshape(len(order), *x.shape[2:]), seat).reshape(cells, cohort, *x.shape[2:])
        turns = jax.tree.map(back, turns)
        out = (sums, turns._replace(state=()), _scattered(clients, ids, turns))
        return out, jax.tree.map(lambda _: True, out)

    return function


def _gathered(clients: PyTree, ids: jax.Array) -> tuple[PyTree, jax.Array]:
    """The cohorts' states, leaves ``[cells, cohort, ...]``, and which are known."""
    if not jax.tree.leaves(clients.table):
        return clients.table, jnp.ones(ids.shape, bool)
    return jax.vmap(gather)(clients, ids)


def _scattered(clients: PyTree, ids: jax.Array, turns: PyTree) -> PyTree:
    if not jax.tree.leaves(clients.table):
        return clients
    return jax.vmap(scatter)(clients, ids, turns.alive, turns.state)
