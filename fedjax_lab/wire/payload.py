"""Payloads as bytes: how long one is, writing it down, and reading it back.

A payload is a pytree of arrays. What is not simply an array on the wire is a *node*, a pytree class of its own with
``wire_bytes() -> bytes`` (an integer, or a traced ``uint32[]`` where it depends on the data), ``dump() -> bytes``
and ``load(reader) -> node``, which a node of the same static structure reads its values with. Structure, shapes
and counts are known to both sides and don't travel.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab.round import nbytes

PyTree = Any


def _is_node(x: Any) -> bool:
    return hasattr(x, "wire_bytes")


def length(payload: PyTree) -> Any:
    """Bytes of a payload on the wire: a Python integer, or ``uint32[]`` where it depends on the data."""
    total = nbytes(payload)
    return total if isinstance(total, int) else total.astype(jnp.uint32)


def serialize(payload: PyTree) -> bytes:
    """One client's payload as the bytes that would travel, little-endian, on the host."""
    parts = []
    for leaf in jax.tree.leaves(payload, is_leaf=_is_node):
        parts.append(leaf.dump() if _is_node(leaf) else little(leaf).tobytes())
    return b"".join(parts)


def deserialize(data: bytes, template: PyTree) -> PyTree:
    """The payload that ``serialize`` wrote.

    Args:
      data: the bytes.
      template: any payload of the same link for the same kind of input; its structure and shapes are used.

    Raises:
      ValueError: more or fewer bytes than the payload has.
    """
    reader = Reader(data)
    payload = read(template, reader)
    if reader.left():
        raise ValueError(f"the payload ends {reader.left()} bytes before its data do: is it another link's?")
    return payload


def read(template: PyTree, reader: "Reader") -> PyTree:
    """The next payload of a reader."""
    leaves, structure = jax.tree.flatten(template, is_leaf=_is_node)
    return jax.tree.unflatten(
        structure, [x.load(reader) if _is_node(x) else reader.array(x.shape, x.dtype) for x in leaves]
    )


def little(array: Any) -> np.ndarray:
    """A NumPy array with its least significant bytes first."""
    array = np.asarray(array)
    return array.astype(array.dtype.newbyteorder("<"))


def check_positions(where: Any, count: int, size: int) -> None:
    """Refuse what was read as ``count`` positions in ``0..size-1`` and isn't that."""
    where = np.asarray(where)
    if len(where) != count or (len(where) and not 0 <= where.min() <= where.max() < size):
        raise ValueError(
            f"the payload has positions beyond {size} entries, or not {count} of them: is it another link's?"
        )


class Reader:
    """Bytes, read from the front."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left():
            raise ValueError(f"the payload needs {count} more bytes, but {self.left()} are left: is it another link's?")
        self._at += count
        return self._data[self._at - count : self._at]

    def peek(self) -> bytes:
        """All that is left; nothing is taken."""
        return self._data[self._at :]

    def array(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        dtype = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        values = np.frombuffer(self.take(count * dtype.itemsize), dtype.newbyteorder("<"))
        return jnp.asarray(values.astype(dtype).reshape(shape))
