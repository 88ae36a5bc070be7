"""A loop around a client's local runs."""

from collections.abc import Callable
from typing import Any

import jax

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
