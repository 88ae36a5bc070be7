"""SQLite files from the network, read as data and nothing else.

A database can carry views, triggers, generated columns and virtual tables: programs in disguise.
Here a file is opened read-only, only ordinary tables are accepted, and an authorizer refuses
everything but reading columns. Damage that SQLite or the header tells is reported with the file's
name.
"""

import contextlib
import pathlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_MAGIC = b"SQLite format 3\0"
_LONGEST_VALUE = 2**28  # bytes of one column: the largest published client has a quarter of that
_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ}


class Reader(NamedTuple):
    """One split of a federated data set in a file, read client by client.

    Attributes:
      path: the file.
      split: the split's name in the file.
      ids: the clients' ids, ascending.
      read: ``(client id, limit=None) -> {field: values [rows, ...]}``; at most the first ``limit``
        rows. Byte strings come as lists, numbers as arrays. Raises KeyError for an unknown id,
        ValueError for damage.
    """

    path: pathlib.Path
    split: str
    ids: tuple[str, ...]
    read: Callable[..., dict[str, Any]]


@contextlib.contextmanager
def naming(where: object) -> Iterator[None]:
    """Put ``where`` before the message of any error about data; SQLite's become ValueErrors."""
    try:
        yield
    except sqlite3.Error as error:
        raise ValueError(f"{where}: SQLite says {error}; the file is damaged") from error
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from error


@contextlib.contextmanager
def connect(path: str | pathlib.Path) -> Iterator[sqlite3.Connection]:
    """A read-only connection. Text comes as bytes, so that decoding it stays with the caller.

    Raises:
      FileNotFoundError: no such file.
      ValueError: naming the file, if it isn't an SQLite database, is truncated, or damaged.
    """
    path = pathlib.Path(path)
    with naming(path):  # the caller names what goes wrong later, with the client if there is one
        _check_header(path)
        uri = path.resolve().as_uri() + "?mode=ro&immutable=1"
        connection = sqlite3.connect(uri, uri=True, isolation_level=None)
    with contextlib.closing(connection):
        with naming(path):
            connection.text_factory = bytes
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_VALUE)
            for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0"):
                connection.execute(f"PRAGMA {pragma}")
        yield connection


def _check_header(path: pathlib.Path) -> None:
    """https://www.sqlite.org/fileformat.html section 1.3: magic, page size and number of pages."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(100)
    if header[:16] != _MAGIC:
        raise ValueError("not an SQLite database (it does not begin with 'SQLite format 3')")
    if len(header) < 100:
        raise ValueError(f"truncated after {size} bytes")
    page = int.from_bytes(header[16:18], "big")
    page = 65536 if page == 1 else page
    if not 512 <= page <= 65536 or page & (page - 1):
        raise ValueError(f"damaged SQLite header: a page of {page} bytes")
    pages = int.from_bytes(header[28:32], "big")
    current = header[24:28] == header[92:96]  # otherwise the number of pages may be out of date
    if size % page or (current and size < page * pages):
        raise ValueError(f"truncated or damaged: {size} bytes, the header says {page * pages}")


def check(path: str | pathlib.Path) -> None:
    """SQLite's own check of the whole file: its structure, and indexes against tables.

    It reads everything; the values themselves carry no checksum. Raises ValueError naming the file.
    """
    path = pathlib.Path(path)
    with connect(path) as connection, naming(path):
        query = "PRAGMA integrity_check(1)"
        found = next(rows(connection, path.stat().st_size, query), (b"no result",))[0]
        if found != b"ok":
            words = text(found, "integrity_check").replace("*** in database main ***", "").split()
            raise ValueError(f"SQLite finds damage: {' '.join(words)}")


def tables(connection: sqlite3.Connection) -> dict[str, str]:
    """The names in the schema, in lower case, and what they are: table, view, virtual table, ..."""
    out = {}
    for kind, name, sql in connection.execute("SELECT type, name, sql FROM sqlite_master"):
        virtual = bytes(sql or b"").upper().startswith(b"CREATE VIRTUAL")
        # A table's name wins over a trigger's or an index's, which live in other namespaces.
        key, what = _word(name).lower(), "virtual table" if virtual else _word(kind)
        if what in ("table", "view", "virtual table") or key not in out:
            out[key] = what
    return out


def require(connection: sqlite3.Connection, wanted: Mapping[str, Sequence[str]]) -> None:
    """Check that these ordinary tables with these stored columns exist; then allow reading only.

    Raises:
      ValueError: naming the missing table or column, or the view or virtual table in its place.
    """
    existing = tables(connection)
    for name, columns in wanted.items():
        kind = existing.get(name)
        if kind is None:
            raise ValueError(f"no table {name!r}; the file has {sorted(existing)}")
        if kind != "table":
            raise ValueError(f"{name!r} is a {kind}, not a plain table; it is not read")
        rows = connection.execute(f'PRAGMA table_xinfo("{name}")').fetchall()
        stored = [_word(row[1]).lower() for row in rows if row[6] == 0]  # 6: hidden or generated
        missing = [c for c in columns if c not in stored]
        if missing:
            raise ValueError(f"table {name!r} has no stored column {missing[0]!r}, only {stored}")
    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY)


def rows(connection: sqlite3.Connection, file_bytes: int, query: str, values: Sequence[Any] = ()) -> Iterator[tuple]:
    """The rows of a query. Should the pages point in circles, it is interrupted after a while."""
    steps = iter(range(10 + file_bytes // 20_000))  # in millions; a scan needs a tenth of that
    connection.set_progress_handler(lambda: next(steps, None) is None, 1_000_000)
    # Not `yield from`: left half-way, that closes the cursor, perhaps after the connection.
    for row in connection.execute(query, values):  # noqa: UP028
        yield row


def _word(value: Any) -> str:
    if not isinstance(value, bytes):
        raise ValueError(f"damaged schema: {value!r} instead of a name")
    return value.decode()


def text(value: Any, column: str) -> str:
    """A column that must hold UTF-8 text, such as a client's id."""
    if not isinstance(value, bytes):
        raise ValueError(f"column {column} holds {value!r}; expected text")
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise ValueError(f"column {column} holds {value!r}, which is not UTF-8 text") from None


def count(value: Any, column: str) -> int:
    """A column that must hold a number of rows."""
    if not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError(f"column {column} holds {value!r}; expected a number of examples")
    return value


def blob(value: Any, column: str) -> bytes:
    """A column that must hold bytes."""
    if not isinstance(value, bytes):
        raise ValueError(f"column {column} holds {value!r}; expected bytes")
    return value
