"""Which parameters are a client's own: what ties clients to each other, such as control variates, leaves them alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.models.base import Variables

PyTree = Any


def owning(client: Any, predicate: Callable[[str], bool]) -> Any:
    """The client for a Round further in, with the leaves that ``predicate`` names as its own.

    For transforms under which a client trains leaves that no server averages (private parts, personal models).

    Args:
      client: a :class:`fedjax_lab.ClientData`, or the oracle's.
      predicate: of a leaf's path, such as ``params/head/kernel``.
    """
    own = (*client.own, predicate)
    return client._replace(own=own) if hasattr(client, "_replace") else dataclasses.replace(client, own=own)


def where_own(client: Any, mine: PyTree, others: PyTree) -> PyTree:
    """Trees shaped as the parameters: ``mine`` in the leaves that are the client's own, else ``others``."""
    if not client.own:
        return others
    pick = lambda path, m, o: m if any(own(checks.path_name(path)) for own in client.own) else o
    return jax.tree_util.tree_map_with_path(pick, Variables(mine), Variables(others)).params


def shared(client: Any, correction: PyTree) -> PyTree:
    """A correction towards the others, shaped as the parameters: zeros in the leaves that are the client's own."""
    return where_own(client, jax.tree.map(jnp.zeros_like, correction), correction) if client.own else correction
