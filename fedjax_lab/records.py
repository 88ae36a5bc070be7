"""What a run writes down: one plain dict a round, as strict JSON, one line each."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_lab import checks
from fedjax_lab.cohort import total_bytes

Record = dict[str, Any]


def plain(name: str, value: Any) -> Any:
    """A metric as Python numbers; ``None`` for one that is not finite.

    Byte counters (``uint32[2]``, named ``..._bytes``) become integers; other arrays nested lists, in
    which entries that aren't finite are ``None``.
    """
    value = np.asarray(value)
    if name.endswith("_bytes"):
        return total_bytes(value) if value.shape == (2,) else int(value)
    if value.ndim:
        return [plain("", entry) for entry in value]
    number = value.item()
    return None if isinstance(number, float) and not math.isfinite(number) else number


def round_records(first: int, count: int, metrics: Mapping[str, np.ndarray]) -> list[Record]:
    """The records of ``count`` rounds after ``first`` were done, from metrics with a leading axis.

    A metric that is NaN or infinite in some round (nobody survived it) is left out of its record.
    """
    records = []
    for i in range(count):
        record: Record = {"round": first + i + 1}
        for name, values in metrics.items():
            if (value := plain(name, values[i])) is not None:
                record[name] = value
        records.append(record)
    return records


def byte_totals(records: Sequence[Record]) -> dict[str, int]:
    """Exact sums over records of everything whose name ends in ``_bytes``."""
    totals: dict[str, int] = {}
    for record in records:
        for name, value in record.items():
            if name.endswith("_bytes"):
                totals[name] = totals.get(name, 0) + value
    return totals


def evaluation_record(values: Any) -> Record:
    """What an evaluation returned, as Python numbers, without those that aren't finite.

    Raises:
      ValueError: it isn't a dict of numbers, or a name is one that records use themselves.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"evaluate must return a dict of numbers; it returned {type(values).__name__}")
    out: Record = {}
    for name, value in values.items():
        number = np.asarray(value)
        if number.ndim or number.dtype.kind not in "biuf":
            raise ValueError(
                f"evaluate returned {str(value)[:60]!r} ({type(value).__name__}) for {name!r}; every "
                "entry must be one number"
            )
        if not isinstance(name, str) or name == "round" or name.endswith("_bytes"):
            raise ValueError(
                f"evaluate returned an entry named {name!r}; a run keeps its own number or bytes of "
                "rounds under such names: choose another"
            )
        if (plain_value := plain(name, number)) is not None:
            out[name] = plain_value
    return out


def merge(record: Record, evaluation: Record, taken: set[str]) -> Record:
    """A round's record with an evaluation in it.

    An evaluation's names are its own in every record: the rounds' metrics of the same name, in
    ``taken``, are recorded as ``train_...`` (a training loss beside a test loss).
    """
    clash = [name for name in evaluation if name in record and name not in taken]
    if clash:
        raise ValueError(
            f"evaluate returned {clash[0]!r} for the first time after {record['round']} rounds, whose "
            "records use that name for the rounds' own; return the same names each time"
        )
    return record | evaluation


def renamed(metrics: Mapping[str, Any], taken: set[str]) -> dict[str, Any]:
    """A round's metrics, those with names in ``taken`` as ``train_...``."""
    return {f"train_{n}" if n in taken else n: value for n, value in metrics.items()}


class Journal:
    """``metrics.jsonl``: records appended a line each, cut back to a round on resuming."""

    def __init__(self, path: Path):
        self.path = path
        self._hash = hashlib.sha256()

    def digest(self) -> str:
        """SHA-256 of the file's content."""
        return self._hash.hexdigest()

    def append(self, records: Sequence[Record]) -> None:
        lines = "".join(json.dumps(r, allow_nan=False) + "\n" for r in records).encode()
        with self.path.open("ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        self._hash.update(lines)

    def begin(self, every: int) -> None:
        """Empty the file of what a session killed before its first checkpoint left in it.

        Raises:
          ValueError: it holds more than that, or is no run's; nothing has been changed then.
        """
        if not self.path.is_file():
            return
        records, lines = self.read()
        whole = self.path.read_bytes().count(b"\n")
        if whole > len(lines) or sum(r["round"] > 0 for r in records) > every:
            raise ValueError(
                f"{self.path} holds metrics, but there is no checkpoint to go on from. Put the "
                "checkpoints back, use another folder (out=...), or remove that file to begin again"
            )
        os.truncate(self.path, 0)

    def read(self) -> tuple[list[Record], list[bytes]]:
        """The records up to the first line that is torn or out of order, and their lines."""
        records: list[Record] = []
        lines: list[bytes] = []
        content = self.path.read_bytes() if self.path.is_file() else b""
        for line in content.splitlines(keepends=True):
            record = _parse(line)
            expected = (0, 1) if not records else (records[-1]["round"] + 1,)
            if record is None or record["round"] not in expected:
                break
            records.append(record)
            lines.append(line)
        return records, lines

    def rewind(self, round: int) -> list[Record]:
        """Keep the records up to a round, cut off the rest, and return them.

        Raises:
          ValueError: not all of those rounds are there; nothing has been changed then.
        """
        records, lines = self.read()
        kept = sum(record["round"] <= round for record in records)
        if round and (not kept or records[kept - 1]["round"] < round):
            last = records[-1]["round"] if records else 0
            raise ValueError(
                f"{self.path} must hold the rounds 1 to {round} of the checkpoint, but is missing or "
                f"damaged behind round {last}. Put back a copy of it, or begin again in another "
                "folder (out=...)"
            )
        content = b"".join(lines[:kept])
        if self.path.is_file():
            os.truncate(self.path, len(content))
        self._hash = hashlib.sha256(content)
        return records[:kept]


def _parse(line: bytes) -> Record | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    good = isinstance(record, dict) and type(record.get("round")) is int
    return record if good else None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def known_names(records: Sequence[Record]) -> list[str]:
    """Every name in the records but ``round``, in order of appearance."""
    return list(dict.fromkeys(name for record in records for name in record if name != "round"))


def check_name(name: str, records: Sequence[Record]) -> None:
    """Raise ValueError for a metric that no record has, with the nearest name."""
    known = known_names(records)
    if name not in known:
        near = checks.nearest(name, known)
        raise ValueError(f"no record has the metric {name!r}{near or f'; there are {known}'}")
