"""The tree of clusters that were divided, and how a client goes down it by its updates (Sattler et al. 2020)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lab.transforms import stacked

PyTree = Any


class Tree(NamedTuple):
    """What is kept of each division, in the order of their making: the ``s``-th made cluster ``s + 1``.

    Attributes:
      models: the inner server's state that the divided cluster had, leaves ``[divisions, ...]``.
      halves: ``float32[divisions, 2, parameters]``, the mean direction of each half's updates.
      divided: ``int32[divisions]``, which cluster it was, whose number its first half keeps; -1 for none yet.
    """

    models: PyTree
    halves: jax.Array
    divided: jax.Array


class Places(NamedTuple):
    """Where clients are, ``int32`` of one shape each.

    Attributes:
      cluster: the number of each one's cluster.
      parent: the number before the last division that gave it another.
      passed: of which division on a client hasn't been asked; of those before it, its cluster knows.
    """

    cluster: jax.Array
    parent: jax.Array
    passed: jax.Array


def seed(model: PyTree, parameters: int, divisions: int) -> Tree:
    """A tree without divisions, for at most so many (and room for one at least, so that shapes aren't empty)."""
    room = max(divisions, 1)
    models = jax.tree.map(lambda x: jnp.stack([x] * room), model)
    return Tree(models, jnp.zeros((room, 2, parameters)), jnp.full(room, -1, jnp.int32))


def where(tree: Tree, places: Places, count: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which cluster one client is in, whether it has yet to choose a half of it as it was, and of which division.

    A number from ``count`` on is that of a cluster which was not kept (``fl.cold_start`` lets newcomers move but not
    the server): it is still in the one before.
    """
    cluster = jnp.where(places.cluster < count, places.cluster, places.parent)
    order = jnp.arange(len(tree.divided))
    open_ = (tree.divided == cluster) & (order >= places.passed)
    return cluster, jnp.any(open_), jnp.argmax(open_)


def choose(tree: Tree, places: Places, cluster: jax.Array, division: jax.Array, updates: jax.Array) -> Places:
    """The places after clients went on to the half that their updates ``[n, parameters]`` are closer to."""
    likeness = jnp.einsum("nd,nhd->nh", updates, tree.halves[division])
    second = likeness[:, 1] > likeness[:, 0]
    after = jnp.where(second, division + 1, cluster).astype(jnp.int32)
    return Places(after, jnp.where(second, cluster, places.parent), division.astype(jnp.int32) + 1)


def grown(tree: Tree, models: PyTree, halves: jax.Array, divided: jax.Array, number: jax.Array) -> Tree:
    """The tree with new divisions.

    Args:
      models: of all clusters, before they are divided; leaves ``[clusters, ...]``.
      halves: ``float32[clusters, 2, parameters]``, the halves' mean directions.
      divided: ``bool[clusters]``, which are divided.
      number: ``int32[clusters]``, what their second halves are called.
    """
    at = jnp.where(divided, number - 1, len(tree.divided))
    put = lambda old, new: old.at[at].set(new, mode="drop")
    own = jnp.arange(len(divided), dtype=jnp.int32)
    return Tree(jax.tree.map(put, tree.models, models), put(tree.halves, halves), put(tree.divided, own))


def model_for(tree: Tree, models: PyTree, cluster: jax.Array, asked: jax.Array, division: jax.Array) -> PyTree:
    """The inner server's state of one client: its cluster's, or that of the division it is asked about."""
    own, before = stacked.pick(models, cluster), stacked.pick(tree.models, division)
    return jax.tree.map(lambda a, b: jnp.where(asked, a, b), before, own)
