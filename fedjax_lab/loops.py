"""A loop around a client's local runs."""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer

from fedjax_lab.client import ClientData

PyTree = Any


def client_loop(client: ClientData, count: Any, body: Callable[[Any, PyTree], PyTree], carry: PyTree) -> PyTree:
    """``body(i, carry) -> carry`` for ``i`` in ``range(count)``, where the body reads the client's examples.

    One compiled loop for a client inside the engine, whose size is traced; a plain loop for a client of known size,
    as in :func:`fedjax_lab.oracle_run`, whose clients can't be read from compiled code.
    """
    if isinstance(client.size, Tracer):
        return jax.lax.fori_loop(0, count, body, carry)
    for i in range(int(count)):
        carry = body(i, carry)
    return carry
