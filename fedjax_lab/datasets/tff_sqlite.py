"""TensorFlow Federated's SQLite files: one row an example, read client by client.

Tables ``client_metadata(client_id, split_name, num_examples)`` and ``examples(client_id,
split_name, serialized_example_proto)``, each example a tf.train.Example (tensorflow_federated
``simulation/datasets/sql_client_data.py``). Nothing is kept but the ids and what is being read.
"""

import collections
import contextlib
import pathlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from fedjax_lab import checks
from fedjax_lab.datasets import sqlite_reading, tf_example
from fedjax_lab.datasets.tf_example import Field

TABLES = {
    "client_metadata": ("client_id", "split_name", "num_examples"),
    "examples": ("client_id", "split_name", "serialized_example_proto"),
}
_DTYPES = {"float": np.float32, "int": np.int64}
_OF_CLIENT = """SELECT serialized_example_proto FROM examples
    WHERE split_name = ? AND client_id = ? ORDER BY rowid LIMIT ?"""


@contextlib.contextmanager
def open_split(path: str | pathlib.Path, split: str, fields: Mapping[str, Field]) -> Iterator[sqlite_reading.Reader]:
    """Open one split of a file.

    Args:
      path: the decompressed SQLite file.
      split: the split's name in the file, for instance ``"train"`` or ``"digits_only_test"``.
      fields: the features to decode.

    Yields:
      A :class:`~fedjax_lab.datasets.sqlite_reading.Reader`; memory is that of the ids and of the
      one client being read. Where the file has an index on the clients, as the published ones do,
      reading a client costs a look-up. Otherwise the first read scans the table once and remembers
      which rows are whose.

    Raises:
      ValueError: the file is damaged or of another kind, or has no such split. Reading a client
        checks that the number of its examples is the one in ``client_metadata``.
    """
    path = pathlib.Path(path)
    with sqlite_reading.connect(path) as connection:
        with sqlite_reading.naming(path):
            sqlite_reading.require(connection, TABLES)
            sizes = _sizes(connection, path, split)
            find = _finder(connection, path, split)

        def read(client_id: str, limit: int | None = None) -> dict[str, Any]:
            size = sizes[client_id]
            with sqlite_reading.naming(f"{path}, split {split!r}, client {client_id!r}"):
                wanted = size if limit is None else min(size, limit)
                messages = find(client_id, wanted + (wanted == size))  # one more shows a surplus
                if len(messages) != wanted:
                    raise ValueError(
                        f"table examples has {'more' if len(messages) > size else len(messages)} "
                        f"rows; client_metadata says num_examples = {size}"
                    )
                return _stack(messages, fields)

        yield sqlite_reading.Reader(path, split, tuple(sizes), read)


def client_ids(path: str | pathlib.Path, split: str) -> tuple[str, ...]:
    """The ids of all clients of a split, ascending."""
    with open_split(path, split, {}) as reader:
        return reader.ids


def read_client(path: str | pathlib.Path, split: str, client_id: str, fields: Mapping[str, Field]) -> dict[str, Any]:
    """One client's examples; to read many, :func:`open_split` once. Raises as that does."""
    with open_split(path, split, fields) as reader:
        if client_id not in reader.ids:
            near = checks.nearest(client_id, reader.ids)
            raise KeyError(f"no client {client_id!r} in split {split!r} of {path}{near}")
        return reader.read(client_id)


def check(path: str | pathlib.Path) -> None:
    """Compare the two tables in full: every client's number of examples, of every split.

    Reading one client checks that client; this finds clients whom ``client_metadata`` has lost, too.
    Raises ValueError naming the file, the split and the client.
    """
    path = pathlib.Path(path)
    with sqlite_reading.connect(path) as connection, sqlite_reading.naming(path):
        sqlite_reading.require(connection, TABLES)
        size = path.stat().st_size
        query = "SELECT split_name, client_id FROM examples"
        counted = collections.Counter(sqlite_reading.rows(connection, size, query))
        query = "SELECT split_name, client_id, num_examples FROM client_metadata"
        told = {row[:2]: row[2] for row in sqlite_reading.rows(connection, size, query)}
        for key in [*told, *counted]:
            if told.get(key, 0) != counted[key]:
                split, client = (sqlite_reading.text(value, "of a key") for value in key)
                raise ValueError(
                    f"split {split!r}, client {client!r}: table examples has {counted[key]} rows; "
                    f"client_metadata says num_examples = {told.get(key, 0)}"
                )


def _sizes(connection: sqlite3.Connection, path: pathlib.Path, split: str) -> dict[str, int]:
    """Client id -> number of examples, by ascending id."""
    query = "SELECT client_id, num_examples FROM client_metadata WHERE split_name = ?"
    sizes: dict[str, int] = {}
    for raw, size in sqlite_reading.rows(connection, path.stat().st_size, query, [split]):
        client = sqlite_reading.text(raw, "client_id of client_metadata")
        if client in sizes:
            raise ValueError(f"client_metadata lists client {client!r} of split {split!r} twice")
        with sqlite_reading.naming(f"client {client!r}"):
            sizes[client] = sqlite_reading.count(size, "num_examples of client_metadata")
    if not sizes:
        query = "SELECT DISTINCT split_name FROM client_metadata"
        rows = sqlite_reading.rows(connection, path.stat().st_size, query)
        found = sorted(sqlite_reading.text(row[0], "split_name") for row in rows)
        near = checks.nearest(split, found)
        raise ValueError(f"no client of a split {split!r}; the file has the splits {found}{near}")
    return dict(sorted(sizes.items()))


def _finder(connection: sqlite3.Connection, path: pathlib.Path, split: str) -> Callable[[str, int], list[bytes]]:
    """``(client id, at most) -> its serialized examples in the file's order``."""
    plan = connection.execute(f"EXPLAIN QUERY PLAN {_OF_CLIENT}", [split, "", 1]).fetchall()
    file_bytes = path.stat().st_size

    def values(query, *arguments):
        found = sqlite_reading.rows(connection, file_bytes, query, arguments)
        return [sqlite_reading.blob(row[0], "serialized_example_proto") for row in found]

    if any(b"client_id=?" in row[3] for row in plan):
        return lambda client, most: values(_OF_CLIENT, split, client, most)

    runs: dict[str, list[list[int]]] = {}

    def find(client: str, most: int) -> list[bytes]:
        if not runs:
            runs.update(_row_runs(connection, file_bytes, split))
        query = "SELECT serialized_example_proto FROM examples WHERE rowid BETWEEN ? AND ? LIMIT ?"
        out: list[bytes] = []
        for first, last in runs.get(client, []):
            out += values(query, first, last, most - len(out))
        return out

    return find


def _row_runs(connection: sqlite3.Connection, file_bytes: int, split: str) -> dict[str, list[list[int]]]:
    """Client id -> runs of consecutive row numbers: little memory where a client's rows adjoin."""
    query = "SELECT rowid, client_id FROM examples WHERE split_name = ? ORDER BY rowid"
    runs: dict[str, list[list[int]]] = collections.defaultdict(list)
    for row, raw in sqlite_reading.rows(connection, file_bytes, query, [split]):
        mine = runs[sqlite_reading.text(raw, "client_id of examples")]
        if mine and mine[-1][1] == row - 1:
            mine[-1][1] = row
        else:
            mine.append([row, row])
    return runs


def _stack(messages: list[bytes], fields: Mapping[str, Field]) -> dict[str, Any]:
    """Examples to ``{field: values [rows, ...]}``; numbers go straight into one array."""
    out: dict[str, Any] = {
        name: [] if f.kind == "bytes" else np.empty((len(messages), *f.shape), _DTYPES[f.kind])
        for name, f in fields.items()
    }
    for row, message in enumerate(messages):
        with sqlite_reading.naming(f"example {row}"):
            for name, value in tf_example.parse(message, fields).items():
                if fields[name].kind == "bytes":
                    out[name].append(value)
                else:
                    out[name][row] = value
    return out
