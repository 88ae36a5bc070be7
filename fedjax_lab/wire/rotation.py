"""Rotations that spread a vector evenly over its entries, so that few bits lose little."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab import checks, shuffle
from fedjax_lab.wire import hashing
from fedjax_lab.wire.base import Wire, l2_norm, not_longer
from fedjax_lab.wire.vectors import on_vector

BLOCK = 8192
LARGEST_BLOCK = 2**27  # 0.5 GB of float32, of which the transform holds two or three
LARGEST_DENSE = 4096
_FACTOR = 32


def hadamard(block: int = BLOCK) -> Wire:
    """Randomized Hadamard rotation, ``H D x / sqrt(B)`` with random signs D (Suresh et al., ICML 2017, section 3).

    The vector is cut into blocks of a power of two and the last one filled up, so that the payload is up to a
    sixteenth longer than the vector. The signs follow from the round's public key and don't travel; payloads can
    be summed, and are rotated back once.

    Args:
      block: the most entries that are rotated together, a power of two; less where that wastes less.

    Raises:
      ValueError: a block that is no power of two, or too large for memory.
    """
    check_block(block)

    def encode(vector, ctx):
        rows = in_rows(vector, block_of(vector.shape[0], block))
        return transform(rows * _signs(ctx, rows.shape)).reshape(-1)

    def decode(code, ctx, size):
        rows = code.reshape(-1, block_of(size, block))
        return (transform(rows) * _signs(ctx, rows.shape)).reshape(-1)[:size]

    return on_vector("hadamard", encode, decode, summable=True, bound=not_longer)


def kashin(redundancy: float = 1.25, *, block: int = BLOCK, iterations: int = 6) -> Wire:
    """Kashin's representation: more coefficients than entries, none of them large.

    Coefficients in a random orthonormal frame, of which the large ones are cut and what they stood for is spread
    again over all (Lyubarskii and Vershynin, "Uncertainty principles and vector quantization", 2010, section 3.2;
    Safaryan et al. 2020). The limit is what an even spread of the rest would have, where the paper lets it fall
    at a fixed rate. Decoding is linear, so that payloads can be summed. Quantize behind it.

    Args:
      redundancy: coefficients for each entry, above 1.
      block: as for :func:`hadamard`.
      iterations: how often large coefficients are cut.

    Raises:
      ValueError: arguments out of their range.
    """
    check_block(block)
    checks.positive(redundancy, "redundancy")
    checks.positive(iterations, "iterations", integer=True)
    if redundancy <= 1:
        raise ValueError(f"redundancy must be above 1, more coefficients than entries; got {redundancy!r}")

    def sizes(size):
        """Coefficients and entries of a block."""
        width = block_of(math.ceil(size * redundancy), block)
        return width, max(int(width / redundancy), 1)

    # Entries take random places in a block: side by side, coefficients would come in equal pairs that can't help
    # each other out.
    def places(ctx, width, entries):
        return shuffle.permute(jnp.arange(entries), width, hashing.seed_of(ctx.public, 1))

    def frame(rows, width, ctx):
        """Coefficients ``[blocks, width]`` of ``[blocks, entries]``: an isometry."""
        wide = jnp.zeros((rows.shape[0], width), rows.dtype)
        wide = wide.at[:, places(ctx, width, rows.shape[1])].set(rows, unique_indices=True)
        return transform(wide * _signs(ctx, wide.shape))

    def back(coefficients, entries, ctx):
        entries_of = transform(coefficients) * _signs(ctx, coefficients.shape)
        return entries_of[:, places(ctx, coefficients.shape[1], entries)]

    def encode(vector, ctx):
        width, entries = sizes(vector.shape[0])
        rest = in_rows(vector, entries)

        def step(i, carry):
            total, rest = carry
            limit = l2_norm(rest)[:, None] / math.sqrt(width)
            cut = jnp.clip(frame(rest, width, ctx), -limit, limit)
            return total + cut, rest - back(cut, entries, ctx)

        start = (jnp.zeros((rest.shape[0], width), rest.dtype), rest)
        total, rest = jax.lax.fori_loop(0, iterations, step, start)
        # What is still left goes uncut, so that nothing is lost.
        return (total + frame(rest, width, ctx)).reshape(-1)

    def decode(code, ctx, size):
        width, entries = sizes(size)
        return back(code.reshape(-1, width), entries, ctx).reshape(-1)[:size]

    def bound(norm, like):
        # Each cut is no longer than what was left, and leaves no more than there was.
        return None if norm is None else norm * (iterations + 1)

    return on_vector("kashin", encode, decode, summable=True, bound=bound)


def dense_rotation() -> Wire:
    """A uniformly random rotation: a matrix of ``d x d``, for small vectors and for comparisons.

    Raises:
      ValueError: when the process is built, more than 4,096 entries.
    """

    def matrix(ctx, size):
        if size > LARGEST_DENSE:
            raise ValueError(
                f"dense_rotation() of {size} entries needs a matrix of {4 * size * size / 1e9:.1f} GB: use "
                "wire.hadamard(), or apply it to smaller blocks with wire.grouped(wire.dense_rotation(), size=1024)"
            )
        q, r = jnp.linalg.qr(jax.random.normal(ctx.public, (size, size)))
        return q * jnp.where(jnp.diag(r) < 0, -1, 1)[None]

    times = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return on_vector(
        "dense_rotation",
        lambda vector, ctx: times(matrix(ctx, vector.shape[0]), vector),
        lambda code, ctx, size: times(matrix(ctx, size).T, code),
        summable=True,
        bound=not_longer,
    )


# ---- the fast transform ----


def check_block(block: Any) -> None:
    checks.positive(block, "block", integer=True)
    if block & (block - 1):
        raise ValueError(f"block must be a power of two; got {block}")
    if block > LARGEST_BLOCK:
        raise ValueError(
            f"a rotation of {block} entries at once takes {12 * block / 1e9:.0f} GB of memory: a block of at most "
            f"{LARGEST_BLOCK} will do as well"
        )


def block_of(size: int, most: int = BLOCK) -> int:
    """The largest power of two up to ``most`` that fills up ``size`` entries by no more than a sixteenth.

    Small vectors have no such block above 64: theirs wastes the least.
    """
    widest = min(most, 1 << max(size - 1, 0).bit_length())
    choices = [b for b in (widest >> i for i in range(28)) if b >= min(64, widest)]
    for b in choices:
        if -size % b <= size // 16:
            return b
    return min(choices, key=lambda b: -size % b)


def in_rows(vector: jax.Array, width: int) -> jax.Array:
    """``[n] -> [ceil(n / width), width]``, filled up with zeros."""
    pad = -vector.shape[0] % width
    return (jnp.concatenate([vector, jnp.zeros(pad, vector.dtype)]) if pad else vector).reshape(-1, width)


def _signs(ctx, shape: tuple[int, ...]) -> jax.Array:
    return hashing.signs(hashing.seed_of(ctx.public), shape[0] * shape[1]).reshape(shape)


def transform(rows: jax.Array) -> jax.Array:
    """The orthonormal Walsh-Hadamard transform of each row, ``[n, B]`` with B a power of two; its own inverse.

    A Hadamard matrix is the Kronecker product of small ones: each pass multiplies by one of at most 32 x 32, so
    that it costs ``d log_32 B`` products of matrices and no memory beyond another copy of the rows.
    """
    count, width = rows.shape
    done, left = count, width
    while left > 1:
        factor = min(_FACTOR, left)
        left //= factor
        # Fixed by its size alone, so it may be a constant of the program; float64 where the rows are.
        matrix = _small(factor).astype(rows.dtype)
        rows = jnp.einsum("asb,st->atb", rows.reshape(done, factor, left), matrix, precision=jax.lax.Precision.HIGHEST)
        done *= factor
    return rows.reshape(count, width)


def _small(size: int) -> np.ndarray:
    """The orthonormal Hadamard matrix in its natural order, ``float32[size, size]``."""
    matrix = np.ones((1, 1), np.float32)
    while matrix.shape[0] < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(math.sqrt(size))
