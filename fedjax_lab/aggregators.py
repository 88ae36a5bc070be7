"""Aggregators: how a cohort's uploads become one aggregate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lab.round import Aggregator, Env
from fedjax_lab.turn import select

PyTree = Any


def _wide(leaf: jax.Array) -> jax.Array:
    """Sums are taken in float32 at least, whatever the clients compute in."""
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def divide(value: PyTree, denominator: jax.Array) -> PyTree:
    """``value / denominator``, and zeros where the denominator is zero."""
    empty = denominator == 0
    safe = jnp.where(empty, 1, denominator)
    means = jax.tree.map(lambda v: v / safe, value)
    return select(empty, jax.tree.map(jnp.zeros_like, means), means)


def mean() -> Aggregator:
    """The weighted mean, ``sum_k w_k u_k / sum_k w_k``: FedAvg's (McMahan et al. 2017, algorithm 1)."""

    def lift(upload, weight, message, env):
        return jax.tree.map(lambda u: _wide(u) * weight, upload), weight

    return Aggregator(lift, lambda sums, env: divide(*sums))


def per_population(aggregator: Aggregator) -> Aggregator:
    """A mean over survivors times their share of the population: absent clients count as zero uploads.

    What a server needs that keeps a running mean over all clients (SCAFFOLD's control variate).
    """

    def finish(sums, env: Env):
        share = env.survivors / env.population
        return jax.tree.map(lambda x: x * share, aggregator.finish(sums, env))

    return aggregator._replace(finish=finish)


def within(aggregator: Aggregator, unwrap: Callable[[PyTree], PyTree]) -> Aggregator:
    """The aggregator of a Round whose message travels inside a larger one, which ``unwrap`` opens.

    Every transform that changes the message wraps the inner Round's aggregator so.
    """

    def lift(upload, weight, message, env):
        return aggregator.lift(upload, weight, unwrap(message), env)

    if aggregator.reduce is None:
        return aggregator._replace(lift=lift)

    def reduce(uploads, weights, ok, messages, env):
        return aggregator.reduce(uploads, weights, ok, unwrap(messages), env)

    return Aggregator(lift, aggregator.finish, reduce)


def pair(first: Aggregator, second: Aggregator) -> Aggregator:
    """Aggregate a pair of uploads ``(a, b)``, each its own way, into a pair."""
    if first.reduce or second.reduce:
        raise ValueError("pair() takes additive aggregators: one that sees all uploads can't be paired")

    def lift(upload, weight, message, env):
        a = first.lift(upload[0], weight, message, env)
        b = second.lift(upload[1], weight, message, env)
        return (a[0], b[0]), (a[1], b[1])

    def finish(sums, env):
        values, denominators = sums
        return (
            first.finish((values[0], denominators[0]), env),
            second.finish((values[1], denominators[1]), env),
        )

    return Aggregator(lift, finish)
