"""FedJAX's SQLite files: one row a client, its examples as zlib-compressed msgpack.

Table ``federated_data(client_id BLOB PRIMARY KEY, data BLOB, num_examples INTEGER)``. ``data``
decompresses to a map of field names to arrays, each array a msgpack extension: type 1 is
``(shape, dtype name, row-major bytes)``, type 4, for byte strings, ``(shape, list)`` (fedjax
``core/serialization.py`` and ``core/sqlite_federated_data.py``). Nothing is unpickled; what isn't
of this form is refused.
"""

import contextlib
import math
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fedjax_lab import checks
from fedjax_lab.datasets import sqlite_reading
from fedjax_lab.datasets.tf_example import Field

TABLES = {"federated_data": ("client_id", "data", "num_examples")}
MOST_BYTES = 2**28  # of one client, decompressed; a stream that grows further is refused
_NDARRAY, _BYTES_NDARRAY = 1, 4
_EXTENSIONS = {2: "a complex number", 3: "a scalar"}
_NUMBERS = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
_NUMBERS += ["float16", "float32", "float64"]
_KINDS = {"int": "iu", "float": "f"}


@contextlib.contextmanager
def open_file(
    path: str | pathlib.Path, fields: Mapping[str, Field], *, most_bytes: int = MOST_BYTES
) -> Iterator[sqlite_reading.Reader]:
    """Open a file, which holds one split.

    Args:
      path: the SQLite file.
      fields: the fields that every client must have; others are dropped.
      most_bytes: the most that one client may decompress to.

    Yields:
      A :class:`~fedjax_lab.datasets.sqlite_reading.Reader`; memory is that of the ids and of the
      one client being read. Reading a client is a look-up by row number.

    Raises:
      ImportError: msgpack is not installed.
      ValueError: the file is damaged or of another kind. Reading a client checks the checksum of
        its compressed data, every array's type and size, and ``num_examples``.
    """
    _msgpack()
    path = pathlib.Path(path)
    with sqlite_reading.connect(path) as connection:
        with sqlite_reading.naming(path):
            sqlite_reading.require(connection, TABLES)
            file_bytes = path.stat().st_size
            # Without num_examples: it lies behind the data, which SQLite would have to walk
            # through.
            query = "SELECT client_id, rowid FROM federated_data"
            places: dict[str, int] = {}
            for raw, row in sqlite_reading.rows(connection, file_bytes, query):
                client = sqlite_reading.text(raw, "client_id")
                if client in places:
                    raise ValueError(f"client {client!r} occurs twice")
                places[client] = row
            places = dict(sorted(places.items()))

        def read(client_id: str, limit: int | None = None) -> dict[str, Any]:
            query = "SELECT client_id, data, num_examples FROM federated_data WHERE rowid = ?"
            row = places[client_id]
            with sqlite_reading.naming(f"{path}, client {client_id!r}"):
                found = list(sqlite_reading.rows(connection, file_bytes, query, [row]))
                if len(found) != 1 or sqlite_reading.text(found[0][0], "client_id") != client_id:
                    raise ValueError("the table and its index disagree; the file is damaged")
                size = sqlite_reading.count(found[0][2], "num_examples")
                arrays = unpack(decompress(sqlite_reading.blob(found[0][1], "data"), most_bytes))
                values = {name: _checked(arrays, name, f, size) for name, f in fields.items()}
                return {name: value[:limit] for name, value in values.items()}

        yield sqlite_reading.Reader(path, path.stem, tuple(places), read)


def client_ids(path: str | pathlib.Path) -> tuple[str, ...]:
    """The ids of all clients of a file, ascending."""
    with open_file(path, {}) as reader:
        return reader.ids


def read_client(path: str | pathlib.Path, client_id: str, fields: Mapping[str, Field]) -> dict[str, Any]:
    """One client's examples; to read many, :func:`open_file` once. Raises as that does."""
    with open_file(path, fields) as reader:
        if client_id not in reader.ids:
            near = checks.nearest(client_id, reader.ids)
            raise KeyError(f"no client {client_id!r} in {path}{near}")
        return reader.read(client_id)


def decompress(data: bytes, most_bytes: int = MOST_BYTES) -> bytes:
    """A whole zlib stream, its checksum verified, of at most ``most_bytes`` decompressed."""
    stream = zlib.decompressobj()
    try:
        out = stream.decompress(data, most_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"column data is no zlib stream, or damaged: {error}") from None
    if len(out) > most_bytes:
        raise ValueError(f"column data decompresses to more than {most_bytes} bytes; not read")
    if not stream.eof:
        raise ValueError("column data is a truncated zlib stream")
    if stream.unused_data:
        raise ValueError(f"column data has {len(stream.unused_data)} bytes behind its zlib stream")
    return out


def unpack(data: bytes) -> dict[str, Any]:
    """A msgpack map of names to arrays; byte-string arrays come as lists.

    Raises:
      ValueError: it is anything else: another extension type, an unknown dtype, a size that does
        not fit the shape.
    """
    try:
        out = _msgpack().unpackb(data, raw=False, ext_hook=_array)
    except (ValueError, TypeError) as error:  # msgpack's own errors are ValueErrors too
        raise ValueError(f"column data is not msgpack of arrays: {error}") from None
    if not isinstance(out, dict):
        raise ValueError(f"column data holds a {type(out).__name__}; expected a map of arrays")
    return out


def _array(code: int, data: bytes) -> Any:
    if code not in (_NDARRAY, _BYTES_NDARRAY):
        what = _EXTENSIONS.get(code, f"msgpack extension type {code}")
        raise ValueError(f"{what} where an array (type {_NDARRAY} or {_BYTES_NDARRAY}) is expected")
    parts = _msgpack().unpackb(data, raw=True)
    if not isinstance(parts, list) or len(parts) != (3 if code == _NDARRAY else 2):
        raise ValueError("an array that is not (shape, dtype, bytes) or (shape, byte strings)")
    shape, values = parts[0], parts[-1]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"an array of shape {shape!r}")
    if code == _BYTES_NDARRAY:
        strings = isinstance(values, list) and all(isinstance(v, bytes) for v in values)
        if not strings or shape != [len(values)]:
            raise ValueError(f"an array of byte strings that are not, or not of its shape {shape}")
        return values
    name = parts[1].decode("ascii", "replace") if isinstance(parts[1], bytes) else repr(parts[1])
    if name not in _NUMBERS:
        raise ValueError(f"an array of dtype {name!r}; expected one of {', '.join(_NUMBERS)}")
    dtype = np.dtype(name).newbyteorder("<")
    if not isinstance(values, bytes) or len(values) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of shape {shape} and dtype {name} with bytes of another length")
    return np.frombuffer(values, dtype).reshape(shape)


def _checked(arrays: dict[str, Any], name: str, field: Field, size: int) -> Any:
    """One field's values, if they are what the field must be."""
    if name not in arrays:
        raise ValueError(f"field {name!r} is missing; the client has {sorted(map(str, arrays))}")
    value = arrays[name]
    strings = isinstance(value, list)
    if strings != (field.kind == "bytes") or not isinstance(value, list | np.ndarray):
        raise ValueError(f"field {name!r} is not an array of {field.kind} values")
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in _KINDS[field.kind]:
            raise ValueError(f"field {name!r} has dtype {value.dtype}; expected {field.kind}")
        if value.shape[1:] != field.shape or not value.ndim:
            raise ValueError(f"field {name!r} has shape {value.shape}; expected rows of {field.shape}")
    if len(value) != size:
        raise ValueError(f"field {name!r} has {len(value)} rows; num_examples is {size}")
    return value


def _msgpack() -> Any:
    return checks.optional("msgpack", "reading FedJAX's SQLite files")
