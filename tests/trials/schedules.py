"""Trials of Process: the same Rounds without a server, and without waiting."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fedjax_lab as fl
from fedjax_lab.cohort import make_env
from fedjax_lab.states import empty_states
from fedjax_lab.turn import client_turn


class NodeState(NamedTuple):
    servers: Any  # a whole ServerState for each node
    clients: Any
    round: Any
    key: Any


def gossip(round: fl.Round, data, mixing) -> fl.Process:
    """Every node runs the Round on its own ServerState; lifted uploads and states are mixed by neighbours.

    Args:
      mixing: ``float[clients, clients]``, rows sum to 1.
    """
    data, n = data.on_device(), data.num_clients
    sampler_ids, here = jnp.arange(n), jnp.ones(n, bool)
    mix = lambda x: jnp.tensordot(mixing, x, 1) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def init(key, params=None):
        server_key, run_key = jax.random.split(key)
        server = round.init(server_key, data, params)
        clients = empty_states(round, server, data)
        servers = jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), server)
        return NodeState(servers, clients, jnp.int32(0), run_key)

    @jax.jit
    def step(state, data):
        key = jax.random.fold_in(state.key, state.round)
        public, clients_key, serving = (jax.random.fold_in(key, i) for i in range(3))
        env = make_env(state.round, public, sampler_ids, here, n)
        known = state.clients.known if jax.tree.leaves(state.clients.table) else here

        def node(server, k, table, known):
            return client_turn(round, server, data, env, clients_key, k, jnp.bool_(True), table, known)

        lifted, turns = jax.vmap(node)(state.servers, sampler_ids, state.clients.table, known)
        env = env._replace(survivors=jnp.sum(turns.facts.counted))

        def serve(server, sums):
            return round.server_update(server, round.aggregate.finish(sums, env), serving)[0]

        servers = jax.vmap(serve)(jax.tree.map(mix, state.servers), jax.tree.map(mix, lifted))
        clients = state.clients
        if jax.tree.leaves(clients.table):
            clients = clients._replace(table=turns.state, known=here)
        return NodeState(servers, clients, state.round + 1, state.key), {}

    first = lambda state: jax.tree.map(lambda x: x[0], state.servers)
    return fl.Process(
        init, step, data, lambda s: round.model.get(first(s)).params, lambda s: round.model.get(first(s)), first,
        lambda s: s.clients, round,
    )  # fmt: skip


class BufferState(NamedTuple):
    past: Any  # a ring of ServerStates, newest first
    clients: Any
    round: Any
    key: Any


def buffered_asynchronous(round: fl.Round, data, sampler, staleness) -> fl.Process:
    """FedBuff (Nguyen et al. 2022): each update of the buffer began from a server state ``s`` versions old.

    Args:
      staleness: ``(key, slots) -> int32[slots]``, how old the state was that each slot's client started from.
    """
    data = data.on_device()
    depth = 4

    def init(key, params=None):
        server_key, run_key = jax.random.split(key)
        server = round.init(server_key, data, params)
        past = jax.tree.map(lambda x: jnp.broadcast_to(x, (depth, *x.shape)), server)
        return BufferState(past, empty_states(round, server, data), jnp.int32(0), run_key)

    @jax.jit
    def step(state, data):
        key = jax.random.fold_in(state.key, state.round)
        public, clients_key, serving = (jax.random.fold_in(key, i) for i in range(3))
        ids, here, _ = sampler.sample((), public, data, None)
        env = make_env(state.round, public, ids, here, data.num_clients)
        age = jnp.minimum(staleness(public, len(ids)), depth - 1)
        tables = jax.tree.map(lambda t: t[ids], state.clients.table)
        known = state.clients.known[ids] if jax.tree.leaves(tables) else here

        def one(k, age, table, known):
            old = jax.tree.map(lambda p: p[age], state.past)
            lifted, turn = client_turn(round, old, data, env, clients_key, k, jnp.bool_(True), table, known)
            # A mean's value and denominators scale together: staleness changes weights, never the scale.
            return jax.tree.map(lambda x: x / jnp.sqrt(1.0 + age), lifted), turn

        lifted, turns = jax.vmap(one)(env.ids, age, tables, known)
        env = env._replace(survivors=jnp.sum(turns.facts.counted))
        current = jax.tree.map(lambda p: p[0], state.past)
        sums = jax.tree.map(lambda x: jnp.sum(x, 0), lifted)
        server, _ = round.server_update(current, round.aggregate.finish(sums, env), serving)
        past = jax.tree.map(lambda s, p: jnp.concatenate([s[None], p[:-1]]), server, state.past)
        clients = state.clients
        if jax.tree.leaves(tables):
            put = lambda t, new: t.at[env.ids].set(new)
            clients = clients._replace(
                table=jax.tree.map(put, clients.table, turns.state), known=clients.known.at[env.ids].set(True)
            )
        return BufferState(past, clients, state.round + 1, state.key), {}

    newest = lambda state: jax.tree.map(lambda p: p[0], state.past)
    return fl.Process(
        init, step, data, lambda s: round.model.get(newest(s)).params, lambda s: round.model.get(newest(s)), newest,
        lambda s: s.clients, round,
    )  # fmt: skip
