"""Files read whole, gzipped or not; damage is reported with the file's name and what was lost."""

import gzip
import os
import pathlib
import zlib
from collections.abc import Callable

from fedjax_lab import checks

_CHUNK = 1 << 20


def read_bytes(
    path: str | os.PathLike, part: Callable[[int], str] = lambda done: "the content"
) -> bytes:
    """The content of a file, decompressed if its name ends in ``.gz``.

    Gzip carries a checksum of what it holds, so that a truncated or altered archive never passes
    for whole. (The time stamp and the name in its header are not covered; they don't matter here.)

    Args:
      path: the file.
      part: names, for the error, what lies ``done`` bytes into the decompressed content.

    Raises:
      FileNotFoundError: with the nearest name in the same folder.
      ValueError: naming the file and the part: empty, truncated, altered, or not gzip at all.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}{_near(path)}")
    raw = _gunzip(path, part) if path.suffix == ".gz" else path.read_bytes()
    if not raw:
        raise ValueError(f"{path}: {part(0)} is missing: the file is empty")
    return raw


def read_text(path: str | os.PathLike) -> str:
    """The UTF-8 text of a file, gzipped or not. Raises ValueError naming file and line."""
    raw = read_bytes(path)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte {raw[error.start]:#04x} is not UTF-8 text"
        ) from None


def _gunzip(path: pathlib.Path, part: Callable[[int], str]) -> bytes:
    pieces, done = [], 0
    try:
        with gzip.open(path, "rb") as file:
            while piece := file.read(_CHUNK):
                pieces.append(piece)
                done += len(piece)
    except EOFError:
        raise ValueError(f"{path}: {part(done)} is cut off: the gzip file is truncated") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: {part(done)} is damaged: {error}") from None
    return b"".join(pieces)


def _near(path: pathlib.Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    return checks.nearest(path.name, (p.name for p in path.parent.iterdir()))
