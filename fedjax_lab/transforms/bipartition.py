"""Dividing clusters in two by the similarity of their members' updates (Sattler, Mueller and Samek 2020)."""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
LINKAGES = ("single", "complete")


def cosines(updates: jax.Array) -> jax.Array:
    """Cosine similarities ``[n, n]`` of rows ``[n, d]``; 0 with a row of zeros."""
    unit = directions(updates)
    return unit @ unit.T


def directions(updates: jax.Array) -> jax.Array:
    """Rows ``[n, d]`` made of length 1; rows of zeros stay."""
    norms = jnp.linalg.norm(updates, axis=1, keepdims=True)
    return updates / jnp.where(norms > 0, norms, 1)


def bipartition(
    similarity: jax.Array, cluster: jax.Array, divided: jax.Array, linkage: str = "single"
) -> tuple[jax.Array, jax.Array]:
    """Divide the members of some clusters in two groups each.

    Members are merged, the most similar ones first, until two groups are left. With single linkage (groups are as
    similar as their most similar members) the two groups have the least possible largest similarity between them,
    which is the paper's optimal bipartition (algorithm 1: similarities in descending order, clusters joined until two
    remain). With complete linkage (as similar as their least similar members) it is what the authors' code does.

    All clusters are divided in one loop of as many passes as their members, each over the whole matrix: ``O(n^3)``,
    and nothing when no cluster is divided.

    Args:
      similarity: ``float[n, n]``, symmetric.
      cluster: ``int[n]``, below ``len(divided)``; whoever belongs to none has a number outside.
      divided: ``bool[clusters]``, which to divide; those of fewer than two members stay whole.
      linkage: ``"single"`` or ``"complete"``.

    Returns:
      ``second: bool[n]``, the members of the group without the cluster's first member, and ``between:
      float[clusters]``, the largest similarity of members of different groups; ``-inf`` where nothing is divided.
    """
    n, count = similarity.shape[0], divided.shape[0]
    inside = (cluster >= 0) & (cluster < count)
    seat = jnp.clip(cluster, 0, count - 1)
    taking = inside & divided[seat]
    together = (cluster[:, None] == cluster[None, :]) & taking[:, None] & taking[None, :]
    others = together & ~jnp.eye(n, dtype=bool)
    members = jnp.zeros(count, jnp.int32).at[seat].add(taking.astype(jnp.int32))
    join = jnp.maximum if linkage == "single" else jnp.minimum

    def merge(carry):
        close, group, left = carry
        ripe = left[seat] > 2
        pair = jnp.argmax(jnp.where(ripe[:, None] & ripe[None, :], close, -jnp.inf))
        i, j = jnp.minimum(pair // n, pair % n), jnp.maximum(pair // n, pair % n)
        row = join(close[i], close[j]).at[i].set(-jnp.inf).at[j].set(-jnp.inf)
        gone = jnp.full(n, -jnp.inf)
        close = close.at[i].set(row).at[:, i].set(row).at[j].set(gone).at[:, j].set(gone)
        return close, jnp.where(group == j, i, group), left.at[seat[i]].add(-1)

    start = (jnp.where(others, similarity, -jnp.inf), jnp.arange(n), members)
    _, group, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[2] > 2), merge, start)
    # A group is named after its first member: merging keeps the smaller number.
    first = jnp.full(count, n).at[seat].min(jnp.where(taking, group, n))
    second = taking & (group != first[seat])
    across = together & (second[:, None] != second[None, :])
    most = jnp.max(jnp.where(across, similarity, -jnp.inf), axis=1)
    return second, jnp.full(count, -jnp.inf).at[seat].max(jnp.where(taking, most, -jnp.inf))


def per_cluster(values: jax.Array, cluster: jax.Array, slots: int) -> jax.Array:
    """Sums over each cluster's members, ``[n, ...] -> [slots, ...]``."""
    return jnp.zeros((slots, *values.shape[1:]), values.dtype).at[cluster].add(values, mode="drop")


def lengths(updates: jax.Array, weights: jax.Array, cluster: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """The length of each cluster's mean update and of its longest one, ``float32[slots]``; 0 for an empty one."""
    total = per_cluster(weights, cluster, slots)
    mean = per_cluster(updates * weights[:, None], cluster, slots) / jnp.where(total > 0, total, 1)[:, None]
    longest = jnp.zeros(slots).at[cluster].max(jnp.linalg.norm(updates, axis=1), mode="drop")
    return jnp.linalg.norm(mean, axis=1), longest


def halves(updates: jax.Array, cluster: jax.Array, second: jax.Array, slots: int) -> jax.Array:
    """The mean direction of the updates of each cluster's halves, ``float32[slots, 2, d]``."""

    def mean(half):
        own = jnp.where(half, cluster, slots)
        total = per_cluster(directions(updates), own, slots)
        return total / jnp.maximum(per_cluster(jnp.ones(len(own)), own, slots), 1)[:, None]

    return jnp.stack([mean(~second), mean(second)], axis=1)
