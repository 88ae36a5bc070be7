"""Sketches: summable summaries of fixed size, from shared hashes of the positions."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.wire import hashing
from fedjax_lab.wire.base import Like, Wire, float_size, unbounded
from fedjax_lab.wire.selecting import largest_positions
from fedjax_lab.wire.sparsify import amount, check_amount
from fedjax_lab.wire.vectors import Vector, on_vector, size_of, unravel


class _Hashes(NamedTuple):
    """Row ``r`` of a table puts entry i into ``bucket(r, n)[i]``, with ``sign(r, n)[i]``."""

    key: jax.Array
    width: int
    signed: bool

    def bucket(self, row: Any, size: int) -> jax.Array:
        return hashing.buckets(hashing.seed_of(self.key, 2 * row), size, self.width)

    def sign(self, row: Any, size: int) -> Any:
        return hashing.signs(hashing.seed_of(self.key, 2 * row + 1), size) if self.signed else 1.0

    def table(self, vector: jax.Array, rows: int) -> jax.Array:
        """``float[rows, width]``; one row's hashes in memory at a time."""

        def one(row):
            values = self.sign(row, vector.shape[0]) * vector
            return jnp.zeros(self.width, vector.dtype).at[self.bucket(row, vector.shape[0])].add(values)

        return jax.lax.map(one, jnp.arange(rows))

    def read(self, table: jax.Array, size: int) -> list[jax.Array]:
        """What each row says of each entry, ``rows`` arrays ``float[size]``."""
        return [row[self.bucket(r, size)] * self.sign(r, size) for r, row in enumerate(table)]


def count_sketch(rows: int = 5, *, width: Any) -> Wire:
    """A count sketch with shared hashes, read as the median of its rows (Charikar et al. 2002, section 3).

    Payloads add up, and the sum is read once. Of each entry, the error exceeds ``2 |x| / sqrt(width)`` in a row
    with probability at most 1/4, and in the median of more rows ever more rarely.

    Args:
      rows: of the table, odd ones best.
      width: buckets a row: an integer, or a share of the entries between 0 and 1.

    Raises:
      ValueError: rows or width that aren't positive.
    """
    _check(rows, width)

    def encode(vector, ctx):
        return _Hashes(ctx.public, amount(width, _any(width, vector.shape[0]), "width"), True).table(vector, rows)

    def decode(table, ctx, size):
        return _median(_Hashes(ctx.public, table.shape[1], True).read(table, size))

    def bound(norm, like):
        # A row is no longer than |x|_1.
        return None if norm is None else norm * (rows * float_size(like)) ** 0.5

    # Every entry may read the largest bucket.
    gain = lambda norm, like: None if norm is None else norm * float_size(like) ** 0.5
    # A sum's median isn't the sum of medians.
    return on_vector("count_sketch", encode, decode, summable=True, additive=rows == 1, bound=bound, gain=gain)


def count_mean_sketch(rows: int = 5, *, width: Any) -> Wire:
    """A count-mean sketch: no signs, the mean of the rows without what others are expected to add. Unbiased.

    Made for counts (Apple's Differential Privacy Team 2017, algorithm "count mean sketch"); reading it is linear.

    Args:
      rows, width: as for :func:`count_sketch`.
    """
    _check(rows, width)

    def encode(vector, ctx):
        return _Hashes(ctx.public, amount(width, _any(width, vector.shape[0]), "width"), False).table(vector, rows)

    def decode(table, ctx, size):
        buckets = table.shape[1]
        mean = functools.reduce(jnp.add, _Hashes(ctx.public, buckets, False).read(table, size)) / rows
        others = jnp.sum(table) / rows  # the sum of all entries
        return mean if buckets == 1 else (mean - others / buckets) * (buckets / (buckets - 1))

    def bound(norm, like):
        return None if norm is None else norm * (rows * float_size(like)) ** 0.5

    return on_vector("count_mean_sketch", encode, decode, summable=True, bound=bound, gain=unbounded)


class SketchMemory(NamedTuple):
    """The server's tables of FetchSGD: ``momentum`` and ``error``, ``float[rows, width]``."""

    momentum: jax.Array
    error: jax.Array


def fetch_sgd(rows: int = 5, *, width: Any, k: Any, momentum: Any = 0.9) -> Wire:
    """Clients send sketches; the server keeps momentum and error in the sketch (FetchSGD, Rothchild et al., ICML 2020).

    Algorithm 1: of the accumulated sketch only the k largest entries are applied, and taken out again. The uploads
    already hold the learning rate. Clients keep nothing, so that each may take part once only. The hashes are the
    same in every round: they come from no key.

    Args:
      rows, width: as for :func:`count_sketch`.
      k: entries applied in a round: a share of all of them between 0 and 1, or an integer count.
      momentum: the paper's rho, at least 0 and below 1.

    Raises:
      ValueError: arguments out of their range.
    """
    _check(rows, width)
    check_amount(k, "k")
    checks.momentum(momentum)

    def hashes(buckets):
        return _Hashes(jax.random.key(0xFE7C), buckets, True)

    def buckets_of(size):
        return amount(width, _any(width, size), "width")

    def encode(vector, ctx):
        return hashes(buckets_of(vector.shape[0])).table(vector, rows)

    plain = on_vector("fetch_sgd", encode, lambda table, ctx, size: table, summable=True)

    def decode(total: Vector, ctx):
        size = size_of(total.like)
        if not size:
            return unravel(jnp.zeros(0), total.rest, total.like), ctx.state
        family = hashes(total.code.shape[1])
        velocity = momentum * ctx.state.momentum + total.code
        error = ctx.state.error + velocity
        read = _median(family.read(error, size))
        count = amount(k, size, "k")
        where = largest_positions(read, count)
        chosen = jnp.zeros(size, read.dtype).at[where].set(read[where], unique_indices=True)
        # What was applied is taken out of both tables: exactly of the error, and as buckets of the momentum.
        applied = family.table(chosen, rows)
        state = SketchMemory(jnp.where(applied != 0, 0, velocity), error - applied)
        return unravel(chosen, total.rest, total.like), state

    def init(like):
        zeros = jnp.zeros((rows, buckets_of(size_of(Like.of(like)))))
        return SketchMemory(zeros, zeros)

    return plain._replace(
        decode=decode,
        init=init,
        sends=lambda state: (),
        collective=True,
        bound=lambda norm, like: None if norm is None else norm * (rows * float_size(like)) ** 0.5,
        gain=unbounded,
    )


def _median(rows: list[jax.Array]) -> jax.Array:
    """The median over a few arrays, entry by entry."""
    rows, count = list(rows), len(rows)
    # Odd-even transposition: minima and maxima fuse into one pass, where a sort of each entry's rows took seconds.
    for turn in range(count):
        for i in range(turn % 2, count - 1, 2):
            rows[i], rows[i + 1] = jnp.minimum(rows[i], rows[i + 1]), jnp.maximum(rows[i], rows[i + 1])
    middle = count // 2
    return rows[middle] if count % 2 else (rows[middle - 1] + rows[middle]) / 2


def _any(width: Any, size: int) -> int:
    """A share is of the entries; a number of buckets may exceed them."""
    return size if isinstance(width, float) else max(size, int(width))


def _check(rows: Any, width: Any) -> None:
    checks.positive(rows, "rows", integer=True)
    check_amount(width, "width")
