"""Links that send few entries: the largest, random ones, or those above a threshold."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab import checks, shuffle
from fedjax_lab.wire import hashing
from fedjax_lab.wire.base import Wire, float_size, identity, not_longer
from fedjax_lab.wire.payload import Reader, check_positions, little
from fedjax_lab.wire.seeds import own_seed
from fedjax_lab.wire.selecting import as_bitmap, index_bits, largest
from fedjax_lab.wire.vectors import on_vector


def top_k(k: Any) -> Wire:
    """The entries of largest magnitude, and where they stand (Aji and Heafield, EMNLP 2017, section 3).

    Positions travel as indices of ``ceil(log2 d)`` bits or as a bitmap, whichever is shorter; entropy coding
    (:func:`elias`, :func:`golomb`) shortens them further. It is biased: use it within :func:`error_feedback`.

    Args:
      k: how many entries: a share of all of them between 0 and 1, or an integer count.

    Raises:
      ValueError: none, or more than there are; the latter when the process is built.
    """
    check_amount(k, "k")
    if _all(k):
        return identity()

    def encode(vector, ctx):
        size = vector.shape[0]
        count = amount(k, size, "top_k")
        if count == size:
            return {"values": vector}
        values, where = largest(vector, count)
        return {"values": values, "where": where}

    def decode(code, ctx, size):
        return code["where"].scatter(code["values"]) if "where" in code else code["values"]

    return on_vector("top_k", encode, decode, bound=not_longer)


def random_k(k: Any, *, unbiased: bool = True) -> Wire:
    """Random entries, the same for all clients of a round (Konečný et al. 2016, section 2, random mask).

    Positions follow from the round's public key and don't travel, so that payloads can be summed.

    Args:
      k: how many entries: a share of all of them between 0 and 1, or an integer count.
      unbiased: scale by ``d/k``, so that the expectation is the vector itself. Within :func:`error_feedback`,
        which corrects the loss anyway and would diverge, give ``False``.

    Raises:
      ValueError: none, or more than there are; the latter when the process is built.
    """
    check_amount(k, "k")
    if _all(k):
        return identity()

    def where(ctx, size):
        seed = hashing.seed_of(ctx.public)
        return shuffle.permute(jnp.arange(amount(k, size, "random_k")), size, seed)

    def encode(vector, ctx):
        return vector.at[where(ctx, vector.shape[0])].get(unique_indices=True)

    def decode(values, ctx, size):
        scale = size / values.shape[0] if unbiased else 1.0
        return jnp.zeros(size, values.dtype).at[where(ctx, size)].set(values * scale, unique_indices=True)

    def gain(norm, like):
        size = float_size(like)
        return norm if norm is None or not unbiased else norm * size / amount(k, size, "random_k")

    return on_vector("random_k", encode, decode, summable=True, bound=not_longer, gain=gain)


def rand_mask(k: Any, *, unbiased: bool = True) -> Wire:
    """Random entries, others for each client, whose seed travels along (Konečný et al. 2016, section 2).

    Args:
      k, unbiased: as for :func:`random_k`.
    """
    return own_seed(random_k(k, unbiased=unbiased))._replace(name="rand_mask")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Above:
    """A vector of which only the entries that aren't zero travel: their count, values and positions."""

    dense: jax.Array

    def wire_bytes(self) -> jax.Array:
        size = self.dense.shape[0]
        count = jnp.sum(self.dense != 0, dtype=jnp.uint32)
        return 4 + count * self.dense.dtype.itemsize + jnp.minimum(-(-size // 8), _ceil8(count, index_bits(size)))

    def dump(self) -> bytes:
        dense = np.asarray(self.dense)
        chosen = dense != 0
        where, bits = np.flatnonzero(chosen), index_bits(len(dense))
        if as_bitmap(len(where), len(dense)):
            marks = np.packbits(chosen, bitorder="little")
        else:
            marks = np.packbits((where[:, None] >> np.arange(bits)) & 1, bitorder="little")
        return np.array(len(where), "<u4").tobytes() + little(dense[chosen]).tobytes() + marks.tobytes()

    def load(self, reader: Reader) -> "Above":
        size, dtype = self.dense.shape[0], np.dtype(self.dense.dtype)
        count = int(np.frombuffer(reader.take(4), "<u4")[0])
        values = np.frombuffer(reader.take(count * dtype.itemsize), dtype.newbyteorder("<"))
        bits = index_bits(size)
        bitmap = as_bitmap(count, size)
        raw = np.frombuffer(reader.take(-(-size // 8) if bitmap else -(-count * bits // 8)), np.uint8)
        marks = np.unpackbits(raw, bitorder="little")
        if bitmap:
            where = np.flatnonzero(marks[:size])
        else:
            where = (marks[: count * bits].reshape(count, bits).astype(np.int64) << np.arange(bits)).sum(1)
        check_positions(where, count, size)
        dense = np.zeros(size, dtype)
        dense[where] = values
        return Above(jnp.asarray(dense))


def _ceil8(count: jax.Array, bits: int) -> jax.Array:
    """``ceil(count * bits / 8)`` in uint32, for counts up to 2^31 and 32 bits."""
    return count // 8 * bits + -(-(count % 8 * bits).astype(jnp.int32) // 8).astype(jnp.uint32)


def threshold(value: Any) -> Wire:
    """Entries whose magnitude reaches a threshold, and where they stand (Strom, Interspeech 2015, section 3).

    How many they are depends on the data, and so do the bytes.

    Args:
      value: the least magnitude that is sent; positive.
    """
    checks.positive(value, "threshold's value")

    def encode(vector, ctx):
        # A NaN reaches any threshold, so that a poisoned update can't hide.
        return Above(jnp.where(jnp.abs(vector) < value, 0, vector))

    return on_vector("threshold", encode, lambda code, ctx, size: code.dense, varies=True, bound=not_longer)


def amount(k: Any, size: int, name: str) -> int:
    """The number of entries that ``k`` asks for, at least one.

    Raises:
      ValueError: it is more than there are.
    """
    if not isinstance(k, float | np.floating):
        if k > max(size, 1):
            raise ValueError(f"{name} was asked for {k} entries, but what it encodes has {size}")
        return int(k)
    return max(round(k * size), 1)


def _all(k: Any) -> bool:
    """A share of 1 is known to be everything before anything is encoded."""
    return isinstance(k, float | np.floating) and k == 1


def check_amount(k: Any, name: str) -> None:
    """Refuse what is neither a share up to 1 nor a positive count."""
    checks.positive(k, name, unit=": a share of the entries such as 0.05, or an integer count")
    if isinstance(k, bool | jax.Array) or not isinstance(k, int | float | np.integer | np.floating):
        raise ValueError(f"{name} decides on shapes and must be a Python number; got {checks.shown(k)}")
    if isinstance(k, float | np.floating) and k > 1:
        raise ValueError(f"{name} must be a share between 0 and 1, or an integer count; got {k!r}")
