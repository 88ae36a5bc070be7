"""Files read whole, gzipped or not; damage is reported with the file's name and what was lost."""

import os
import pathlib
import zlib
from collections.abc import Callable

from fedjax_lab import checks

_CHUNK = 1 << 26  # the rest of the file is copied once for each


def read_bytes(path: str | os.PathLike, part: Callable[[int], str] = lambda done: "the content") -> bytes:
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
        raise ValueError(f"{path}, line {line}: byte {raw[error.start]:#04x} is not UTF-8 text") from None


def _gunzip(path: pathlib.Path, part: Callable[[int], str]) -> bytes:
    packed = path.read_bytes()
    pieces, done = [], 0
    while packed.strip(b"\0"):  # one stream after the other; zeros may pad the end
        stream = zlib.decompressobj(wbits=31)  # gzip alone, its checksum verified
        most = 64  # then a header that comes through is counted before what follows fails
        while not stream.eof:
            try:
                piece = stream.decompress(packed, most)
            except zlib.error as error:
                raise ValueError(f"{path}: {part(done)} is damaged: {_reason(error)}") from None
            pieces.append(piece)
            done += len(piece)
            packed, most = stream.unconsumed_tail, _CHUNK
            if not stream.eof and not packed and not piece:
                raise ValueError(f"{path}: {part(done)} is cut off: the gzip file is truncated")
        packed = stream.unused_data
    return b"".join(pieces)


def _reason(error: zlib.error) -> str:
    text = str(error)
    return "this is no gzip file" if "header check" in text else text.partition(": ")[2] or text


def _near(path: pathlib.Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    return checks.nearest(path.name, (p.name for p in path.parent.iterdir()))
