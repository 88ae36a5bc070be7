"""The population's client states: one stacked table, gathered for a cohort and scattered after it."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab.data import FederatedData
from fedjax_lab.loops import at_most
from fedjax_lab.round import Round

PyTree = Any


class ClientStates(NamedTuple):
    """The population's client states: ``table`` leaves ``[clients, ...]``, ``known: bool[clients]``.

    A row that isn't ``known`` holds zeros; the client's state is made at its first contact. Both are
    ``()`` for rounds whose clients keep nothing. ``members: int32[rows]``, increasing, says whose the rows are
    where only a cohort's are at hand.
    """

    table: PyTree
    known: Any
    members: Any = ()


def empty_states(round: Round, server: PyTree, data: FederatedData, devices: int = 1) -> ClientStates:
    """The states of a population that nobody has contacted.

    The table has as many rows as clients, rounded up to a multiple of ``devices``.
    """
    shape = jax.eval_shape(lambda s, d: round.init_client(s, d.view(jnp.int32(0))), server, data)
    if not jax.tree.leaves(shape):
        return ClientStates(shape, ())
    rows = -(-data.num_clients // devices) * devices
    zeros = lambda s: jnp.zeros((rows, *s.shape), s.dtype)
    return ClientStates(jax.tree.map(zeros, shape), jnp.zeros(rows, bool))


def padded(clients: ClientStates, devices: int) -> ClientStates:
    """The same states, their rows rounded up to a multiple of ``devices``."""
    if not jax.tree.leaves(clients.table) or not (missing := -clients.known.shape[0] % devices):
        return clients
    more = lambda x: jnp.concatenate([x, jnp.broadcast_to(x[:1], (missing, *x.shape[1:]))])
    return ClientStates(jax.tree.map(more, clients.table), more(clients.known))


def of_population(clients: ClientStates, num_clients: int) -> ClientStates:
    """The same states without the rows that only fill up a device's block."""
    if not jax.tree.leaves(clients.table) or clients.known.shape[0] == num_clients:
        return clients
    return jax.tree.map(lambda x: x[:num_clients], clients)


def gather(
    clients: ClientStates, ids: jax.Array, axis: str | None = None, runs: jax.Array | None = None
) -> tuple[PyTree, jax.Array]:
    """The states of the clients ``ids: int32[n]`` and which of them are known, ``bool[n]``.

    With ``axis``, a mesh axis inside ``shard_map``, each device holds its own block of the table's rows, and gets
    those of the clients that it ``runs``, ``int32[n]`` of devices; without that, it asks for rows of its own only.
    """
    if not jax.tree.leaves(clients.table):
        return clients.table, jnp.ones(ids.shape, bool)
    seats, here = _seats(clients, ids, axis)
    seats, held = jnp.where(here, seats, 0), (clients.table, clients.known)
    if axis is None or runs is None:
        return jax.tree.map(lambda t: rows(t, seats), held)
    if not are_large(clients):
        return exchange(jax.tree.map(lambda t: rows(t, seats, here), held), axis)
    mine = runs == jax.lax.axis_index(axis)
    found = jax.tree.map(lambda t: rows(t, seats, here & mine), held)
    asked, count = _elsewhere(clients, ids, runs)

    def send(k, found):
        i = asked[k]
        row = exchange(jax.tree.map(lambda t: _row(t, seats[i], here[i]), held), axis)
        return jax.tree.map(lambda x, new: _put(x, i, new, mine[i]), found, row)

    return at_most(len(ids), count, send, found)


def scatter(
    clients: ClientStates,
    ids: jax.Array,
    alive: jax.Array,
    states: PyTree,
    axis: str | None = None,
    runs: jax.Array | None = None,
) -> ClientStates:
    """Write the survivors' states; every other row keeps its bits.

    With ``runs``, as for :func:`gather`, each device has the states of the clients that it ran.
    """
    if not jax.tree.leaves(clients.table):
        return clients
    seats, here = _seats(clients, ids, axis)
    mine = here if runs is None or axis is None else here & (runs == jax.lax.axis_index(axis))
    end = clients.known.shape[0]
    target = jnp.where(alive & mine, seats, end)
    known = clients.known.at[jnp.where(alive & here, seats, end)].set(True, mode="drop", wrap_negative_indices=False)
    if axis is None or runs is None:
        put = lambda table, new: table.at[target].set(new.astype(table.dtype), mode="drop", wrap_negative_indices=False)
        return clients._replace(table=jax.tree.map(put, clients.table, states), known=known)
    own = jnp.argsort(target == end, stable=True)

    def keep(k, table):  # those of this device only: a scatter would read and write a row for the others' as well
        i = own[k]
        return jax.tree.map(lambda t, new: _put(t, target[i], new[i], jnp.bool_(True)), table, states)

    table = at_most(len(ids), jnp.sum(target < end), keep, clients.table)
    asked, count = _elsewhere(clients, ids, runs)

    def send(k, table):
        i = asked[k]
        ran, kept = runs[i] == jax.lax.axis_index(axis), alive[i] & here[i]
        row = exchange(jax.tree.map(lambda x: _row(x, i, ran), states), axis)
        return jax.tree.map(lambda t, new: _put(t, jnp.where(kept, seats[i], 0), new, kept), table, row)

    return clients._replace(table=at_most(len(ids), count, send, table), known=known)


def are_large(clients: ClientStates) -> bool:
    """Is a client's state so large that it is better moved by itself?"""
    sizes = [x.size // x.shape[0] * x.dtype.itemsize for x in jax.tree.leaves(clients.table)]
    return sum(sizes) >= LARGE_ROW


def _elsewhere(clients: ClientStates, ids: jax.Array, runs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Clients that another device runs than the one that has their row: places in ``ids``, and how many."""
    moves = ids // clients.known.shape[0] != runs
    return jnp.argsort(~moves, stable=True), jnp.sum(moves)


def _row(x: jax.Array, i: jax.Array, keep: jax.Array) -> jax.Array:
    return zero_unless(keep[None], jax.lax.dynamic_index_in_dim(x, i))[0]


def _put(x: jax.Array, i: jax.Array, row: jax.Array, where: jax.Array) -> jax.Array:
    old = jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(x, jnp.where(where, row.astype(x.dtype), old), i, 0)


def _seats(clients: ClientStates, ids: jax.Array, axis: str | None) -> tuple[jax.Array, jax.Array]:
    """Each client's row among those that are held here, and whether it is held here."""
    rows = clients.known.shape[0]
    if isinstance(clients.members, jax.Array):
        seats = jnp.searchsorted(clients.members, ids)
        return seats, clients.members.at[seats].get(mode="fill", fill_value=-1) == ids
    seats = ids if axis is None else ids - jax.lax.axis_index(axis) * rows
    return seats, (seats >= 0) & (seats < rows)


# From this size on a row is copied faster by itself: XLA:CPU gathers element by element (4.8 MB rows: 1.4 GB a second).
LARGE_ROW = 1 << 16


def rows(x: jax.Array, index: jax.Array, keep: jax.Array | None = None) -> jax.Array:
    """``x[index]`` for ``index: int32[n]``, with zeros where ``keep: bool[n]`` doesn't hold."""
    small = x.dtype.itemsize * math.prod(x.shape[1:]) < LARGE_ROW
    if small or jax.default_backend() != "cpu" or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        found = x.at[index].get(wrap_negative_indices=False)
        return found if keep is None else zero_unless(keep, found)

    def row(i, kept=None):
        copy = lambda: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
        return copy() if kept is None else jax.lax.cond(kept, copy, lambda: jnp.zeros(x.shape[1:], x.dtype))

    return jax.lax.map(row, index) if keep is None else jax.lax.map(lambda slot: row(*slot), (index, keep))


def zero_unless(keep: jax.Array, x: jax.Array) -> jax.Array:
    """``x: [n, ...]`` with zeros where ``keep: bool[n]`` doesn't hold; PRNG keys become their data."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(zero_unless(keep, jax.random.key_data(x)), impl=jax.random.key_impl(x))
    return jnp.where(keep.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))


def exchange(tree: PyTree, axis: str) -> PyTree:
    """The sum over a mesh axis of every leaf, in its own type; for what only one device has, its value.

    Small leaves travel in one float32 message (those of 64 bits in one more for each type), large ones by themselves,
    as they lie in memory. Each message waits for the last: a CPU's devices share threads, and wait for ever when
    they are held up in different ones.
    """
    leaves, structure = jax.tree.flatten(tree)
    plain = [_plain(x) for x in leaves]
    carriers = [_carrier(x, axis) for x in plain]
    alone = [i for i, x in enumerate(plain) if x.dtype == carriers[i] and x.nbytes >= LARGE_MESSAGE]
    sums: dict[int, jax.Array] = {}
    last = None
    for dtype in sorted(set(carriers), key=str):
        mine = [i for i in range(len(plain)) if carriers[i] == dtype and i not in alone]
        if not mine:
            continue
        packed = [_packed(plain[i], dtype) for i in mine]
        total = jax.lax.psum(after(last, jnp.concatenate([p.ravel() for p in packed])), axis)
        last = total if total.size else last
        ends = np.cumsum([p.size for p in packed])[:-1]
        for i, p, part in zip(mine, packed, jnp.split(total, ends), strict=True):
            sums[i] = _unpacked(part.reshape(p.shape), plain[i].dtype)
    for i in alone:
        last = sums[i] = jax.lax.psum(after(last, plain[i]), axis)
    return jax.tree.unflatten(structure, [_like(sums[i], x) for i, x in enumerate(leaves)])


# Copies into a common message and out of it took as long as the message itself (4.8 MB: 6.8 against 3.5 ms; from which
# size on a message of one's own pays was not measured).
LARGE_MESSAGE = 1 << 18


def after(last: jax.Array | None, message: jax.Array) -> jax.Array:
    """The message, which can't be made before ``last`` has come: a condition on it that the compiler can't know."""
    if last is None:
        return message
    first = last.ravel()[0]
    if jnp.issubdtype(first.dtype, jnp.complexfloating):
        first = first.real
    bits = jax.lax.bitcast_convert_type(first, jnp.dtype(f"int{8 * first.dtype.itemsize}"))
    return jnp.where(bits | 1 != 0, message, jnp.zeros((), message.dtype))


# Sums of as many 16-bit numbers are exact in float32.
MOST_DEVICES = 256


def _carrier(x: jax.Array, axis: str) -> np.dtype:
    """The type of the message that ``x`` travels in."""
    small = x.dtype == jnp.int32 and jax.lax.axis_size(axis) <= MOST_DEVICES
    real = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize <= 4
    return np.dtype(np.float32) if small or real else x.dtype


def _packed(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """``x`` in a message's type; an int32 as the two halves of its bits, which add up exactly."""
    if x.dtype != jnp.int32 or dtype != jnp.float32:
        return x.astype(dtype)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.stack([bits >> 16, bits & 0xFFFF]).astype(dtype)


def _unpacked(x: jax.Array, dtype: np.dtype) -> jax.Array:
    if dtype != jnp.int32 or x.dtype != jnp.float32:
        return x.astype(dtype)
    high, low = x.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((high << 16) + low, jnp.int32)


def _plain(x: jax.Array) -> jax.Array:
    """Numbers that can be added: truth values and small integers as int32, unsigned ones by their bits."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.uint32:
        return jax.lax.bitcast_convert_type(x, jnp.int32)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) or x.dtype.itemsize > 4 else x.astype(jnp.int32)


def _like(x: jax.Array, model: jax.Array) -> jax.Array:
    """What :func:`_plain` did, undone."""
    if jnp.issubdtype(model.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_like(x, jax.random.key_data(model)), impl=jax.random.key_impl(model))
    return jax.lax.bitcast_convert_type(x, jnp.uint32) if model.dtype == jnp.uint32 else x.astype(model.dtype)
