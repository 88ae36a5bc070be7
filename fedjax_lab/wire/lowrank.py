"""Low-rank links: matrices travel as products of thin ones; leaves of fewer than two axes as they are."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab import checks
from fedjax_lab.wire.base import Like, Wire, is_float, magnitude, not_longer, unbounded, wide
from fedjax_lab.wire.payload import Reader, length, little

PyTree = Any
_EXACT = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
    """A pytree whose matrices are factored: a list with arrays, and something else for each matrix."""

    leaves: list
    like: Like = dataclasses.field(metadata={"static": True})


def low_rank(rank: int, *, iterations: int | None = None) -> Wire:
    """The best approximation of each matrix by a product ``[n, r] x [r, m]`` (truncated SVD, Eckart and Young 1936).

    A leaf of more than two axes is a matrix with its last axis as columns. Leaves for which two factors would be
    no smaller, and those of fewer axes, travel whole.

    Args:
      rank: the paper's r, positive.
      iterations: rounds of subspace iteration (Halko et al. 2011, algorithm 4.4) instead of a full SVD, which takes
        minutes for matrices of thousands of rows; 2 to 4 come close to it.

    Raises:
      ValueError: a rank or a number of iterations that isn't positive.
    """
    if iterations is not None:
        checks.positive(iterations, "iterations", integer=True)

    def factors(matrix, ctx):
        if iterations is None:
            u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
            return u[:, :rank] * s[None, :rank], vt[:rank].T
        # A few more columns than asked for, of which the best are kept.
        wanted = min(rank + 8, *matrix.shape)
        basis = _orthonormal(_times(matrix, _random_start(matrix.shape[1], wanted)))
        for _ in range(iterations):
            basis = _orthonormal(_times(matrix, _orthonormal(_times(matrix.T, basis))))
        u, s, vt = jnp.linalg.svd(_times(basis.T, matrix), full_matrices=False)
        return _times(basis, u[:, :rank]) * s[None, :rank], vt[:rank].T

    return _factoring("low_rank", rank, factors)


def factorize(rank: int, *, sweeps: int = 10, ridge: float = 1e-6) -> Wire:
    """A factorization ``A B'`` of each matrix by alternating least squares, without any SVD.

    Each sweep solves for A with B fixed, then for B with A fixed (as matrix factorization for recommenders does:
    Koren et al. 2009). Cheaper than :func:`low_rank` for large matrices, and close to it after a few sweeps.

    Args:
      rank: columns of A and B, positive.
      sweeps: how many.
      ridge: the regularisation, as a share of the factor's mean squared column norm.

    Raises:
      ValueError: arguments that aren't positive.
    """
    checks.positive(sweeps, "sweeps", integer=True)
    checks.positive(ridge, "ridge")

    def solve(target, factor):
        """The minimiser of ``|target - result factor'|^2 + ridge ...``."""
        gram = _times(factor.T, factor)
        weight = ridge * jnp.trace(gram) / rank
        gram = gram + jnp.where(weight > 0, weight, 1) * jnp.eye(rank, dtype=gram.dtype)
        return jnp.linalg.solve(gram, _times(target, factor).T).T

    def factors(matrix, ctx):
        b, unit = _random_start(matrix.shape[1], rank), magnitude(matrix.reshape(-1))[0]
        matrix = matrix / unit  # squares of very small entries would vanish
        a = solve(matrix, b)
        for _ in range(sweeps):
            b = solve(matrix.T, a)
            a = solve(matrix, b)
        return a * unit, b

    return _factoring("factorize", rank, factors)


def _factoring(name: str, rank: Any, factors: Callable) -> Wire:
    checks.positive(rank, "rank", integer=True)

    def encode(x, state, ctx):
        leaves = [_factor(leaf, ctx) if worth_it(leaf, rank) else leaf for leaf in jax.tree.leaves(x)]
        payload = Factored(leaves, Like.of(x))
        return payload, state, length(payload)

    def _factor(leaf, ctx):
        return dict(zip("ab", factors(as_matrix(leaf), ctx), strict=True))

    def open_(payload, ctx):
        like = jax.tree.leaves(payload.like.shapes())
        out = [
            _times(leaf["a"], leaf["b"].T).reshape(s.shape) if isinstance(leaf, dict) else leaf
            for leaf, s in zip(payload.leaves, like, strict=True)
        ]
        structure: Any = payload.like.structure
        return jax.tree.unflatten(structure, out)

    # Of two factors only the product is bounded.
    return Wire(encode, open_, bound=unbounded, name=name)


# ---- PowerSGD ----


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Side:
    """A matrix seen from one side: ``M Q`` of ``rows`` rows on even turns, ``M' P`` of ``columns`` on odd ones.

    ``data`` has rows for the longer side; those beyond the present one are zeros and don't travel.
    """

    data: jax.Array
    turn: jax.Array
    rows: int = dataclasses.field(metadata={"static": True})
    columns: int = dataclasses.field(metadata={"static": True})

    def _row_bytes(self) -> int:
        return self.data.shape[1] * self.data.dtype.itemsize

    def wire_bytes(self) -> Any:
        if self.rows == self.columns:
            return 1 + self.rows * self._row_bytes()
        return 1 + jnp.where(self.turn == 0, self.rows, self.columns).astype(jnp.uint32) * self._row_bytes()

    def dump(self) -> bytes:
        turn = int(self.turn)
        return bytes([turn]) + little(self.data[: self.columns if turn else self.rows]).tobytes()

    def load(self, reader: Reader) -> "Side":
        turn = reader.take(1)[0]
        count = self.columns if turn else self.rows
        part = np.asarray(reader.array((count, self.data.shape[1]), self.data.dtype))
        data = np.zeros(self.data.shape, self.data.dtype)
        data[:count] = part
        return Side(jnp.asarray(data), jnp.uint8(turn), self.rows, self.columns)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Basis:
    """What a matrix of ``rows`` and ``columns`` is multiplied by: Q, of as many rows as it has columns, or P.

    ``data`` has rows for the longer of the two.
    """

    data: jax.Array
    rows: int = dataclasses.field(metadata={"static": True})
    columns: int = dataclasses.field(metadata={"static": True})

    def row_bytes(self) -> int:
        return self.data.shape[-1] * self.data.dtype.itemsize


def power_sgd(rank: int) -> Wire:
    """Projections onto a subspace that the server improves from round to round (after Vogels et al., NeurIPS 2019).

    PowerSGD's algorithm 1 multiplies by the matrix from both sides in one step, with a sum over the clients after
    each. Here a round is one of its two halves, since it has one upload: on even turns clients send ``M Q``, on odd
    ones ``M' P``; the sum is projected back, and its orthonormalized columns are the next turn's P or Q. Payloads
    add up, so that a secure sum will do. It never lengthens what is left: put it within :func:`error_feedback`.

    Args:
      rank: columns of P and Q, positive.

    Raises:
      ValueError: a rank that isn't positive.
    """
    checks.positive(rank, "rank", integer=True)

    def fresh(leaf):
        rows, columns = _sides(leaf)
        basis = _orthonormal(_random_start(columns, rank)).astype(wide(leaf.dtype))
        whole = jnp.zeros((max(rows, columns), rank), basis.dtype).at[:columns].set(basis)
        return Basis(whole, rows, columns)

    def init(like):
        basis = [fresh(leaf) for leaf in jax.tree.leaves(like) if worth_it(leaf, rank)]
        return {"basis": basis, "turn": jnp.uint8(0)}

    def see(leaf, basis, turn):
        matrix = as_matrix(leaf)
        rows, columns = matrix.shape
        put = lambda y: jnp.zeros(basis.shape, y.dtype).at[: y.shape[0]].set(y)
        right, left = _times(matrix, basis[:columns]), _times(matrix.T, basis[:rows])
        return Side(jnp.where(turn == 0, put(right), put(left)), turn, rows, columns)

    def back(side, basis, turn, shape):
        rows, columns = side.rows, side.columns
        right = _times(side.data[:rows], basis[:columns].T)
        left = _times(basis[:rows], side.data[:columns].T)
        return jnp.where(turn == 0, right, left).reshape(shape)

    def encode(x, state, ctx):
        bases, turn = iter(ctx.state["basis"]), ctx.state["turn"]
        leaves = [see(leaf, next(bases).data, turn) if worth_it(leaf, rank) else leaf for leaf in jax.tree.leaves(x)]
        payload = Factored(leaves, Like.of(x))
        return payload, state, length(payload)

    def decode(total, ctx):
        bases, turn = iter(ctx.state["basis"]), ctx.state["turn"]
        out, new = [], []
        for leaf, s in zip(total.leaves, jax.tree.leaves(total.like.shapes()), strict=True):
            if isinstance(leaf, Side):
                out.append(back(leaf, next(bases).data, turn, s.shape))
                new.append(Basis(_orthonormal(leaf.data), leaf.rows, leaf.columns))
            else:
                out.append(leaf)
        structure: Any = total.like.structure
        state = {"basis": new, "turn": 1 - turn}
        return jax.tree.unflatten(structure, out), state

    def sends_bytes(state):
        """Of the basis of this turn; the rows beyond it are zeros, and don't travel."""
        rows = [jnp.where(state["turn"] == 0, b.columns, b.rows).astype(jnp.uint32) for b in state["basis"]]
        return jnp.uint32(1 + sum(n * b.row_bytes() for n, b in zip(rows, state["basis"], strict=True)))

    return Wire(
        encode,
        open=lambda payload, ctx: payload,
        decode=decode,
        init=init,
        sends_bytes=sends_bytes,
        summable=True,
        varies=True,
        bound=not_longer,
        name="power_sgd",
    )


# ---- matrices ----


def _sides(leaf: Any) -> tuple[int, int]:
    columns = leaf.shape[-1]
    return leaf.size // columns, columns


def worth_it(leaf: Any, rank: int) -> bool:
    """Whether two factors of this rank are smaller than the leaf."""
    if len(leaf.shape) < 2 or not leaf.size or not is_float(leaf):
        return False
    rows, columns = _sides(leaf)
    return rank * (rows + columns) < rows * columns


def as_matrix(leaf: jax.Array) -> jax.Array:
    """``[..., columns] -> [rows, columns]`` in float32 at least."""
    return leaf.reshape(_sides(leaf)).astype(wide(leaf.dtype))


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=_EXACT)


def _orthonormal(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.qr(matrix)[0]


def _random_start(rows: int, columns: int) -> jax.Array:
    """The same for everybody: any matrix in general position will do."""
    return jax.random.normal(jax.random.fold_in(jax.random.key(0x10E), rows), (rows, columns))
