"""Entropy coding: the integers of a payload in words whose length follows how likely they are.

On the device a payload stays as it is, and the exact length of its code is counted: decoding word by word is no
work for vector machines, and changes nothing. ``wire.serialize`` writes the code itself, of that very length.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab import checks
from fedjax_lab.wire.base import Wire, not_longer
from fedjax_lab.wire.blocks import Blocks
from fedjax_lab.wire.codes import ELIAS, BitReader, Code, bits_to_bytes, rice
from fedjax_lab.wire.packing import Packed, Trits, pack, pack_trits
from fedjax_lab.wire.payload import Reader, check_positions, length, little, read, serialize
from fedjax_lab.wire.selecting import Positions, as_bitmap, index_bits
from fedjax_lab.wire.vectors import INTEGERS

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Coder:
    """Which code is used for what; static data of a payload."""

    family: str
    runs: bool = False
    parameter: int | None = None

    def levels(self) -> Code | None:
        """The code of levels around zero; ``None``: they stay as they are."""
        return ELIAS.get(self.family)

    def gaps(self, count: int, size: int) -> Code:
        """The code of the gaps between ``count`` of ``size`` positions."""
        if self.family in ELIAS:
            return ELIAS[self.family]
        return rice(best_rice(count, size) if self.parameter is None else self.parameter)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coded:
    """A payload of which positions and levels travel in an entropy code."""

    payload: PyTree
    coder: Coder = dataclasses.field(metadata={"static": True})

    def _leaves(self) -> list:
        return jax.tree.leaves(self.payload, is_leaf=_whole)

    def wire_bytes(self) -> jax.Array:
        bits, plain = jnp.uint32(0), 0
        for leaf in self._leaves():
            if _coded(leaf, self.coder):
                bits = bits + _bits_of(leaf, self.coder)
            elif isinstance(leaf, Blocks):
                plain += length(leaf)
            else:
                data = leaf.data if isinstance(leaf, INTEGERS) else leaf
                plain += data.size * data.dtype.itemsize
        return plain + (bits + 7) // 8

    def dump(self) -> bytes:
        plain, bits = [], []
        for leaf in self._leaves():
            if _coded(leaf, self.coder):
                bits += _words(leaf, self.coder)
            elif isinstance(leaf, Blocks):
                plain.append(serialize(leaf))
            else:
                plain.append(little(leaf.data if isinstance(leaf, INTEGERS) else leaf).tobytes())
        return b"".join(plain) + bits_to_bytes(bits)

    def load(self, reader: Reader) -> "Coded":
        leaves, structure = jax.tree.flatten(self.payload, is_leaf=_whole)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Blocks):
                leaves[i] = read(leaf, reader)
            elif not _coded(leaf, self.coder):
                inner = leaf.data if isinstance(leaf, INTEGERS) else leaf
                array = reader.array(inner.shape, inner.dtype)
                leaves[i] = dataclasses.replace(leaf, data=array) if isinstance(leaf, INTEGERS) else array
        bit = BitReader(reader.peek())
        for i, leaf in enumerate(leaves):
            if _coded(leaf, self.coder):
                leaves[i] = _parse(leaf, self.coder, bit)
        reader.take(-(-bit.at // 8))
        return Coded(jax.tree.unflatten(structure, leaves), self.coder)


def elias(code: str = "omega", *, runs: bool = False) -> Wire:
    """Elias coding of levels and positions behind a quantizer or sparsifier (Elias 1975; QSGD, section 3.1).

    Positions are coded by their gaps. Levels around zero: each by itself, zero being the shortest word; with
    ``runs`` only those that aren't zero, each as the gap to the last one, a sign and a magnitude (QSGD's Code_s,
    appendix A.2, for few levels). Scales, values and codes without a zero stay as they are.

    Args:
      code: ``"gamma"``, ``"delta"``, or ``"omega"``, the paper's recursive code.
      runs: see above.

    Raises:
      ValueError: another code.
    """
    if code not in ELIAS:
        near = checks.nearest(str(code), ELIAS)
        raise ValueError(f"elias knows the codes {tuple(ELIAS)}{near}; got {checks.shown(code)}")
    return _coding(Coder(code, runs), f"elias({code!r})")


def golomb(parameter: int | None = None) -> Wire:
    """Golomb coding of the gaps between positions (Sattler et al. 2019, section IV.C, algorithm 3).

    Levels, scales and values stay as they are.

    Args:
      parameter: bits of the remainder, the paper's b*; ``None``: the best one for positions chosen at random.

    Raises:
      ValueError: a negative parameter.
    """
    if parameter is not None:
        checks.not_negative(parameter, "parameter", integer=True)
    return _coding(Coder("golomb", parameter=parameter), "golomb")


def _coding(coder: Coder, name: str) -> Wire:
    def by_block(leaf):
        """Equal blocks are coded one by one, each in whole bytes."""
        if not isinstance(leaf, Blocks):
            return leaf

        def one(part):
            coded = Coded(part, coder)
            return coded, coded.wire_bytes().astype(jnp.uint32)

        parts, sizes = jax.vmap(one)(leaf.parts)
        return dataclasses.replace(leaf, parts=parts, sizes=sizes, rest=(Coded(leaf.rest, coder),))

    def encode(x, state, ctx):
        payload = Coded(jax.tree.map(by_block, x, is_leaf=_whole), coder)
        return payload, state, jnp.uint32(payload.wire_bytes())

    def open_(payload, ctx):
        def plain(leaf):
            if not isinstance(leaf, Blocks):
                return leaf
            return dataclasses.replace(leaf, parts=leaf.parts.payload, sizes=None, rest=leaf.rest[0].payload)

        return jax.tree.map(plain, payload.payload, is_leaf=_whole)

    return Wire(
        encode,
        open=open_,
        varies=True,
        on_codes=True,
        bound=not_longer,
        name=name,
    )


def best_rice(count: int, size: int) -> int:
    """The remainder's bits for gaps between ``count`` of ``size`` random positions (Golomb 1966)."""
    share = count / size
    if share >= 1:
        return 0
    golden = (math.sqrt(5) + 1) / 2
    return max(1 + math.floor(math.log2(math.log(golden - 1) / math.log1p(-share))), 0)


def _whole(x: Any) -> bool:
    return isinstance(x, (*INTEGERS, Blocks))


def _coded(leaf: Any, coder: Coder) -> bool:
    if isinstance(leaf, Positions):
        return True
    return isinstance(leaf, Packed | Trits) and leaf.zero is not None and coder.levels() is not None


# ---- lengths, on the device ----


def _bits_of(leaf: Any, coder: Coder) -> jax.Array:
    if isinstance(leaf, Positions):
        return jnp.sum(coder.gaps(leaf.count, leaf.size).length(_gaps(leaf.indices())), dtype=jnp.uint32)
    code: Any = coder.levels()
    level = leaf.codes().astype(jnp.int32) - leaf.zero
    if not coder.runs:
        return jnp.sum(code.length(_folded(level)), dtype=jnp.uint32)
    # A gap's length, a sign, a magnitude; and in front how many they are.
    there = level != 0
    at = jnp.arange(level.shape[0], dtype=jnp.int32)
    last = jax.lax.cummax(jnp.where(there, at, -1))
    before = jnp.concatenate([jnp.full(1, -1, jnp.int32), last[:-1]])
    word = code.length((at - before).astype(jnp.uint32)) + 1 + code.length(jnp.abs(level).astype(jnp.uint32))
    head = code.length(jnp.sum(there, dtype=jnp.uint32)[None] + 1)[0]
    return head + jnp.sum(jnp.where(there, word, 0), dtype=jnp.uint32)


def _gaps(indices: jax.Array) -> jax.Array:
    before = jnp.concatenate([jnp.full(1, -1, indices.dtype), indices[:-1]])
    return (indices - before).astype(jnp.uint32)


def _folded(level: jax.Array) -> jax.Array:
    """0, 1, -1, 2, -2, ... as 1, 2, 3, 4, 5, ..."""
    return jnp.where(level > 0, 2 * level, 1 - 2 * level).astype(jnp.uint32)


# ---- the words themselves, on the host ----


def _words(leaf: Any, coder: Coder) -> list[int]:
    bits: list[int] = []
    if isinstance(leaf, Positions):
        write = coder.gaps(leaf.count, leaf.size).write
        for gap in np.asarray(_gaps(leaf.indices())).tolist():
            bits += write(gap)
        return bits
    code: Any = coder.levels()
    level = np.asarray(leaf.codes()).astype(np.int64) - leaf.zero
    if not coder.runs:
        for value in level.tolist():
            bits += code.write(2 * value if value > 0 else 1 - 2 * value)
        return bits
    there = np.flatnonzero(level)
    bits += code.write(len(there) + 1)
    for gap, value in zip(np.diff(there, prepend=-1).tolist(), level[there].tolist(), strict=True):
        bits += [*code.write(gap), int(value < 0), *code.write(abs(value))]
    return bits


def _parse(leaf: Any, coder: Coder, bit: Callable[[], int]) -> Any:
    if isinstance(leaf, Positions):
        read = coder.gaps(leaf.count, leaf.size).read
        where = np.cumsum([read(bit) for _ in range(leaf.count)]) - 1
        check_positions(where, leaf.count, leaf.size)
        return _positions_like(leaf, where)
    code: Any = coder.levels()
    level = np.zeros(leaf.count, np.int64)
    if not coder.runs:
        for i in range(leaf.count):
            folded = code.read(bit)
            level[i] = folded // 2 if folded % 2 == 0 else -(folded // 2)
    else:
        at = -1
        for _ in range(code.read(bit) - 1):
            at += code.read(bit)
            check_positions([at], 1, leaf.count)
            negative = bit()
            level[at] = -code.read(bit) if negative else code.read(bit)
    codes = jnp.asarray((level + leaf.zero).astype(np.uint32))
    return pack_trits(codes) if isinstance(leaf, Trits) else pack(codes, leaf.bits, leaf.zero)


def _positions_like(leaf: Positions, where: np.ndarray) -> Positions:
    if not as_bitmap(leaf.count, leaf.size):
        return Positions(pack(jnp.asarray(where.astype(np.uint32)), index_bits(leaf.size)).data, leaf.count, leaf.size)
    mask = np.zeros(leaf.size, bool)
    mask[where] = True
    return Positions(jnp.asarray(np.packbits(mask, bitorder="little")), leaf.count, leaf.size)
