"""One client's turn in a round: from the broadcast to what may be summed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lab import keys
from fedjax_lab.client import ClientData
from fedjax_lab.facts import Facts, facts
from fedjax_lab.round import Round, nbytes, upload_bytes

PyTree = Any


class Turn(NamedTuple):
    """One client's turn, besides what is summed: see :class:`Answers` for the same over a cohort.

    ``state`` is kept if the client is ``facts.alive``. ``kept``: what an aggregator with ``reduce`` gets to see.
    """

    state: PyTree
    facts: Facts
    kept: PyTree


def healthy(tree: PyTree) -> jax.Array:
    """Whether every leaf's float32 sum of squares is finite, ``bool[]``.

    NaN and infinities fail, and so do finite values so large (norms above 1.8e19) that they could only
    overflow in an average.
    """
    squares = [
        jax.lax.reduce_sum(jax.lax.square(leaf.astype(jnp.float32)), range(leaf.ndim))
        for leaf in map(jnp.asarray, jax.tree.leaves(tree))
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    return jnp.isfinite(sum(squares)) if squares else jnp.bool_(True)


def select(condition: jax.Array, chosen: PyTree, other: PyTree) -> PyTree:
    """``chosen`` where the scalar ``condition`` holds, else ``other``, leaf by leaf in ``other``'s dtypes."""

    def one(a, b):
        a, b = jnp.asarray(a, b.dtype), jnp.asarray(b)
        if a.shape != b.shape or condition.shape not in ((), b.shape):
            return jnp.where(condition, a, b)
        return jax.lax.select_n(condition, b, a)  # jnp.where is traced and lowered anew for each shape, a millisecond

    condition = jnp.asarray(condition, bool)
    return jax.tree.map(one, chosen, other)


def client_turn(round: Round, server, data, env, key, client_id, present, state, known):
    """One client's turn, from broadcast to what may be summed; ordinary code, vmapped by the caller."""
    client = data.view(client_id, env, present)
    broadcast_key, update_key = keys.of_client(key, client_id)
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
    zero_unless = lambda tree: select(counted, tree, jax.tree.map(jnp.zeros_like, tree))
    kept = ()
    if round.aggregate.reduce is not None:
        kept = (zero_unless(output.upload), jnp.where(counted, weight, 0), counted, message)
    told = facts(
        alive,
        counted,
        jnp.where(counted, weight, 0),
        jnp.where(present & sent, jnp.asarray(upload_bytes(output), jnp.uint32), 0),
        jnp.uint32(nbytes(message)),
        output.metrics,
    )
    return zero_unless((value, denominators)), Turn(output.state, told, kept)


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
