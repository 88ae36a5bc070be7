"""Loops with a number of turns that is known only when they run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr

from fedjax_lab.client import ClientData

PyTree = Any


def client_loop(client: ClientData, count: Any, body: Callable[[Any, PyTree], PyTree], carry: PyTree) -> PyTree:
    """``body(i, carry) -> carry`` for ``i`` in ``range(count)``, where the body reads the client's examples.

    One compiled loop for a :class:`fedjax_lab.ClientData`; a plain one for the clients of
    :func:`fedjax_lab.oracle_run`, which can't be read from compiled code.
    """
    if isinstance(client, ClientData):
        return jax.lax.fori_loop(0, count, body, carry)
    for i in range(int(count)):
        carry = body(i, carry)
    return carry


def at_most(length: int, count: jax.Array, body: Callable[[jax.Array, PyTree], PyTree], carry: PyTree) -> PyTree:
    """``jax.lax.fori_loop(0, count, body, carry)`` for ``count <= length``, which ``jax.grad`` goes through as well.

    Only under differentiation it is a loop of ``length`` turns, of which those from ``count`` on do nothing.
    """
    traced, structure = jax.make_jaxpr(body)(jnp.int32(0), carry), jax.tree.structure(carry)

    def turn(t, carry, consts):  # what the body closes over must be an argument, to be differentiated by
        return structure.unflatten(eval_jaxpr(traced.jaxpr, consts, t, *jax.tree.leaves(carry)))

    @jax.custom_jvp
    def loop(count, carry, consts):
        return jax.lax.fori_loop(0, count, lambda t, carry: turn(t, carry, consts), carry)

    def whole(count, carry, consts):
        idle = lambda t, carry, consts: carry
        step = lambda carry, t: (jax.lax.cond(t < count, turn, idle, t, carry, consts), None)
        return jax.lax.scan(step, carry, jnp.arange(length))[0]

    loop.defjvp(lambda primals, tangents: jax.jvp(whole, primals, tangents))
    return loop(count, carry, traced.consts)
