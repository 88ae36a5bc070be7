"""tf.train.Example without TensorFlow: the protobuf wire format, decoded strictly.

An Example is a map of feature names to a list of byte strings, of 32-bit floats or of 64-bit
integers (tensorflow/core/example/feature.proto):

.. code-block:: text

    Example   { Features features = 1 }
    Features  { map<string, Feature> feature = 1 }        an entry: key = 1, value = 2
    Feature   { BytesList = 1 | FloatList = 2 | Int64List = 3 }, each { repeated value = 1 }

Protobuf readers skip what they don't know and take the last of what is doubled. Here both are
errors, because in a file of known layout they mean damage.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

_KINDS = {1: "bytes", 2: "float", 3: "int"}
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5


class Field(NamedTuple):
    """What one field of an example must be.

    Attributes:
      kind: ``"bytes"``, ``"float"`` or ``"int"``.
      shape: the shape in one example; ``()`` is one value. A byte string is always one value.
    """

    kind: str
    shape: tuple[int, ...] = ()


def parse(message: bytes, fields: Mapping[str, Field]) -> dict[str, Any]:
    """The wanted fields of one serialized tf.train.Example.

    Args:
      message: the serialized protobuf message.
      fields: what to decode; other features of the message are skipped over.

    Returns:
      For each field ``bytes``, an ``int``, a ``float``, or an array of the field's shape
      (``float32``, ``int64``).

    Raises:
      ValueError: the message is cut off or no tf.train.Example; a field is missing or doubled, of
        another kind, or of another size. The text names the field.
    """
    found: dict[str, Any] = {}
    for name, start, end in _features(message):
        if name in fields:
            if name in found:
                raise ValueError(f"field {name!r} occurs twice in one example")
            try:
                found[name] = _value(message, start, end, fields[name])
            except ValueError as error:
                raise ValueError(f"field {name!r}: {error}") from None
    for name in fields:
        if name not in found:
            present = sorted(name for name, _, _ in _features(message))
            raise ValueError(f"field {name!r} is missing; the example has {present}")
    return found


def _features(message: bytes) -> Iterator[tuple[str, int, int]]:
    """The name of every feature, and where its Feature message lies."""
    for number, wire, start, end in _parts(message, 0, len(message)):
        _expect(number == 1 and wire == _DELIMITED, "no tf.train.Example", start)
        for number, wire, entry, entry_end in _parts(message, start, end):
            _expect(number == 1 and wire == _DELIMITED, "no map of features", entry)
            spans = {n: (a, b) for n, w, a, b in _parts(message, entry, entry_end) if w == _DELIMITED}
            _expect(set(spans) == {1, 2}, "a feature without name or value", entry)
            a, b = spans[1]
            try:
                name = message[a:b].decode()
            except UnicodeDecodeError:
                raise ValueError(f"a feature's name at byte {a} is not UTF-8") from None
            yield name, *spans[2]


def _value(message: bytes, start: int, end: int, field: Field) -> Any:
    """The contents of one Feature, checked against what the field must be."""
    lists = list(_parts(message, start, end))
    if len(lists) != 1 or lists[0][1] != _DELIMITED or lists[0][0] not in _KINDS:
        raise ValueError("not exactly one list of bytes, floats or integers")
    number, _, start, end = lists[0]
    if _KINDS[number] != field.kind:
        raise ValueError(f"holds {_KINDS[number]} values; expected {field.kind}")
    if field.kind == "bytes":
        values = [_bytes(message, *part) for part in _parts(message, start, end)]
    else:
        decode = _floats if field.kind == "float" else _integers
        parts = [decode(message, *part) for part in _parts(message, start, end)]
        values = parts[0] if len(parts) == 1 else np.concatenate([*parts, decode(b"", 1, 2, 0, 0)])
    if len(values) != math.prod(field.shape):
        raise ValueError(f"has {len(values)} values; expected {math.prod(field.shape)}")
    if isinstance(values, list):
        return values[0]
    return values.reshape(field.shape) if field.shape else values[0].item()


def _bytes(message: bytes, number: int, wire: int, start: int, end: int) -> bytes:
    _expect(number == 1 and wire == _DELIMITED, "not a list of byte strings", start)
    return message[start:end]


def _floats(message: bytes, number: int, wire: int, start: int, end: int) -> np.ndarray:
    _expect(number == 1 and wire in (_DELIMITED, _FIXED32), "not a list of floats", start)
    _expect((end - start) % 4 == 0, "a list of floats is cut off", end)
    return np.frombuffer(message, "<f4", (end - start) // 4, start)


def _integers(message: bytes, number: int, wire: int, start: int, end: int) -> np.ndarray:
    """``int64`` from varints: seven bits a byte, lowest first, the last byte below 128."""
    _expect(number == 1 and wire in (_DELIMITED, _VARINT), "not a list of integers", start)
    if end - start <= 10:  # a label or two: numpy would take longer
        few = []
        while start < end:
            value, start = _varint(message, start, end)
            few.append(value & (2**64 - 1))
        return np.array(few, np.uint64).view(np.int64)
    raw = np.frombuffer(message, np.uint8, end - start, start)
    ends = np.flatnonzero(raw < 0x80)
    _expect(ends.size > 0 and ends[-1] == raw.size - 1, "a list of integers is cut off", end)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    _expect(lengths.max() <= 10, "an integer has more than ten bytes", start)
    shifts = 7 * (np.arange(raw.size) - np.repeat(starts, lengths)).astype(np.uint64)
    return np.add.reduceat((raw & 0x7F).astype(np.uint64) << shifts, starts).view(np.int64)


def _parts(message: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """``(field number, wire type, first byte, end)`` of each field of the message in a span."""
    while start < end:
        tag, start = _varint(message, start, end)
        number, wire = tag >> 3, tag & 7
        if wire == _DELIMITED:
            size, start = _varint(message, start, end)
            stop = start + size
        elif wire == _VARINT:
            stop = _varint(message, start, end)[1]
        elif wire in (_FIXED32, _FIXED64):
            stop = start + (4 if wire == _FIXED32 else 8)
        else:
            raise ValueError(f"unknown protobuf wire type {wire} at byte {start}")
        if number == 0 or stop > end:
            raise ValueError(f"the message is cut off or no protobuf at byte {start}")
        yield number, wire, start, stop
        start = stop


def _varint(message: bytes, start: int, end: int) -> tuple[int, int]:
    """The unsigned integer at ``start``, and where the next thing begins."""
    if start < end and message[start] < 0x80:  # most are this short
        return message[start], start + 1
    value = 0
    for i in range(start, min(end, start + 10)):
        byte = message[i]
        value |= (byte & 0x7F) << 7 * (i - start)
        if byte < 0x80:
            return value, i + 1
    raise ValueError(f"the message is cut off or no protobuf at byte {start}")


def _expect(condition: bool, problem: str, position: int) -> None:
    if not condition:
        raise ValueError(f"{problem} at byte {position}")
