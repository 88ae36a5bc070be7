"""Tables with a column that names each row's client: CSV, Parquet, data frames.

What can't be a number is reported with file, line and column. A CSV file carries no checksum: one
cut off behind a complete cell, or with a digit changed, is a valid table that no reader can tell
from the right one; gzip it (``.csv.gz``) and both are found. Parquet's page checksums are checked
where the writer stored them.
"""

import csv
import io
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_lab import checks, reading
from fedjax_lab.data import FederatedData

_INTEGER = re.compile(r"[+-]?[0-9]+")
_PLAIN_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")  # what no other spelling can mean, int64
_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
_BOOLEANS = {"true": 1.0, "false": 0.0}
_EMPTY = {"", "None", "<NA>", "nan", "NaT"}


class Table(NamedTuple):
    """Columns that remember where they came from.

    Attributes:
      name: the file's, for messages.
      columns: arrays ``[rows]`` of numbers, or of whatever the file holds.
      lines: the line on which each row of a CSV file ends, ``int[rows]``; ``None`` for others.
    """

    name: str
    columns: dict[str, np.ndarray]
    lines: np.ndarray | None = None

    def at(self, row: int, column: str) -> str:
        """``FILE, line 7, column 'age'``; rows of tables without lines are counted from 0."""
        place = f"row {row}" if self.lines is None else f"line {self.lines[row]}"
        return f"{self.name}, {place}, column {column!r}"


def read_table(table: Any, *, client: str, features: str | Sequence[str], label: str) -> FederatedData:
    """Federated data from a table, one client for each value of a column.

    Args:
      table: path of a ``.csv``, ``.csv.gz`` or ``.parquet`` file, or a pandas DataFrame. A CSV file
        is UTF-8 with commas and a header line.
      client: the column that names each row's client. Names that are all plain integers become
        integers, so that ids are ordered as numbers.
      features: the numeric column, or columns, that make up ``x``.
      label: the column that becomes ``y``.

    Returns:
      FederatedData with the clients ordered by id and their rows in the table's order; fields
      ``x: float32[rows, features]`` and ``y``: int32 where the column holds integers or booleans,
      float32 (regression) where it holds real numbers.

    Raises:
      FileNotFoundError: no such file.
      ValueError: naming file, line and column: a file that can't be parsed, no rows, an unknown
        column (with the nearest), empty cells, text, NaN or infinite values.
    """
    source = load(table)
    names = [features] if isinstance(features, str) else list(features)
    if not names:
        raise ValueError("features names no column")
    x = np.stack([numbers(source, name).astype(np.float32) for name in names], axis=1)
    integral = is_integral(column(source, label))
    y = integers(source, label) if integral else numbers(source, label).astype(np.float32)
    return FederatedData.from_arrays({"x": x, "y": y}, identifiers(source, client))


def load(table: Any) -> Table:
    """A table from a path or a data frame. Raises as :func:`read_table` does."""
    if isinstance(table, str | os.PathLike):
        path = pathlib.Path(table)
        if path.name.endswith((".csv", ".csv.gz")):
            source = _from_csv(path)
        elif path.suffix == ".parquet":
            source = _from_parquet(path)
        else:
            raise ValueError(f"{path}: a table must be a .csv, .csv.gz or .parquet file")
    elif hasattr(table, "columns") and hasattr(table, "iloc"):
        twice = table.columns[table.columns.duplicated()]
        if len(twice):
            raise ValueError(f"the data frame has more than one column {twice[0]!r}")
        source = Table("the data frame", {str(n): table[n].to_numpy() for n in table.columns})
    else:
        raise ValueError(f"a table is a path or a pandas DataFrame; got {type(table).__name__}")
    if not source.columns or not len(next(iter(source.columns.values()))):
        raise ValueError(f"{source.name}: the table has no rows")
    return source


def column(table: Table, name: str) -> np.ndarray:
    """A column as it is. ValueError with the columns there are, and the nearest."""
    name = str(name)
    if name not in table.columns:
        near = checks.nearest(name, table.columns)
        raise ValueError(f"{table.name}: there is no column {name!r} among {list(table.columns)}{near}")
    return table.columns[name]


def numbers(table: Table, name: str) -> np.ndarray:
    """A column of finite numbers, ``float64[rows]``."""
    cells = column(table, name)
    if cells.dtype.kind in "iufb":
        values = cells.astype(np.float64)
    else:
        values = np.array([_number(table, row, name, cell) for row, cell in enumerate(cells)])
    bad = np.flatnonzero(~(np.abs(values) <= np.finfo(np.float32).max))
    if len(bad):
        raise ValueError(
            f"{table.at(int(bad[0]), name)}: {values[bad[0]]} is not a finite 32-bit number; drop "
            "the row or fill the cell"
        )
    return values


def _number(table: Table, row: int, name: str, cell: Any) -> float:
    text = str(cell)
    if _NUMBER.fullmatch(text):
        return float(text)
    if text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    if text.strip() in _EMPTY:
        raise ValueError(f"{table.at(row, name)}: the cell is empty or NaN; drop the row or fill it")
    raise ValueError(f"{table.at(row, name)}: {text[:40]!r} is not a finite number; encode text as numbers first")


def is_integral(cells: np.ndarray) -> bool:
    """Whether a column holds integers or booleans, by type or, as text, by spelling."""
    if cells.dtype.kind in "iufb":
        return cells.dtype.kind != "f"
    texts = [str(cell) for cell in cells]
    return all(_INTEGER.fullmatch(t) or t.lower() in _BOOLEANS for t in texts)


def integers(table: Table, name: str) -> np.ndarray:
    """A column of whole numbers, ``int32[rows]``."""
    values = numbers(table, name)
    bad = np.flatnonzero((np.abs(values) > 2**31 - 1) | (values != np.round(values)))
    if len(bad):
        raise ValueError(f"{table.at(int(bad[0]), name)}: {values[bad[0]]:g} is no 32-bit integer")
    return values.astype(np.int32)


def identifiers(table: Table, name: str) -> np.ndarray:
    """A column of client ids: int64 if all are plain integers, else text or numbers as they are."""
    cells = column(table, name)
    if cells.dtype.kind in "iub":
        return cells
    texts = [str(cell) for cell in cells]
    for row, text in enumerate(texts):
        if text.strip() in _EMPTY:
            raise ValueError(f"{table.at(row, name)}: no client is named")
    if cells.dtype.kind == "f":
        return cells
    if all(_PLAIN_INTEGER.fullmatch(text) for text in texts):
        return np.array(texts).astype(np.int64)
    return np.array(texts)


def _from_csv(path: pathlib.Path) -> Table:
    text = reading.read_text(path).removeprefix("\ufeff").rstrip("\r\n")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        for row in reader:
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: no CSV table: {error}") from None
    if not rows:
        raise ValueError(f"{path}: the table is empty")
    header = rows.pop(0)
    first_line = lines.pop(0)
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}, line {first_line}: more than one column is called {twice!r}")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            raise ValueError(f"{path}, line {line}: {len(row)} cells, but the header names {len(header)} columns")
    columns = {n: np.array(c) for n, c in zip(header, zip(*rows, strict=True), strict=False)}
    return Table(str(path), columns, np.array(lines))


def _from_parquet(path: pathlib.Path) -> Table:
    arrow = checks.optional("pyarrow", "reading Parquet files")
    parquet = checks.optional("pyarrow.parquet", "reading Parquet files")
    raw = reading.read_bytes(path)
    try:
        file = parquet.ParquetFile(arrow.BufferReader(raw), page_checksum_verification=True)
        table = file.read()
        names = table.column_names
        columns = {n: table[n].to_numpy(zero_copy_only=False) for n in names}
    except (arrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"{path}: no Parquet file, or damaged: {error}") from None
    if len(columns) != len(names):
        raise ValueError(f"{path}: two columns have the same name")
    return Table(str(path), columns)
