"""Files of data sets on disk: where they lie, written whole or not at all, changes found out."""

import contextlib
import hashlib
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator
from typing import Any

_FULL_CHECK = 2**30  # bytes up to which a file with a new time stamp is read in full again
_RECORD = re.compile(r"([0-9a-f]{64})  [^\n]*\n# bytes (\d+) time (\d+)\n")


def data_folders(data_dir: str | os.PathLike | None, name: str) -> list[pathlib.Path]:
    """Where a data set's files may lie.

    The roots are ``data_dir`` if given, else the environment's FEDJAX_LAB_DATA, if set, and then
    ``~/.cache/fedjax_lab``. In each, the folder ``name`` is looked at before the root itself.
    """
    chosen = data_dir if data_dir is not None else os.environ.get("FEDJAX_LAB_DATA")
    roots = [pathlib.Path(chosen).expanduser()] if chosen else []
    if roots and roots[0].is_file():
        raise ValueError(f"data_dir and FEDJAX_LAB_DATA name folders; {roots[0]} is a file")
    roots.append(pathlib.Path.home() / ".cache" / "fedjax_lab")
    return [folder for root in roots for folder in (root / name, root)]


def writable(folders: list[pathlib.Path]) -> pathlib.Path:
    """The first of these folders that can be written to or created; the last one otherwise."""
    for folder in folders:
        existing = next(f for f in (folder, *folder.parents) if f.exists())
        if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
            return folder
    return folders[-1]


@contextlib.contextmanager
def replacing(target: pathlib.Path) -> Iterator[Any]:
    """A temporary file that becomes ``target`` if the block succeeds, and disappears otherwise."""
    folder = target.parent
    made = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    with tempfile.NamedTemporaryFile(
        prefix=f".{target.name}.", suffix=".part", dir=target.parent, delete=False
    ) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, target)
        except BaseException:
            pathlib.Path(file.name).unlink(missing_ok=True)
            for empty in made:
                with contextlib.suppress(OSError):  # another process may use it already
                    empty.rmdir()
            raise


def _remove_leftovers(target: pathlib.Path) -> None:
    """What a killed process left a day ago or longer; a younger one may be another's download."""
    for name in os.listdir(target.parent):
        if name.startswith(f".{target.name}.") and name.endswith(".part"):
            with contextlib.suppress(OSError):
                if time.time() - os.path.getmtime(target.parent / name) > 86_400:
                    os.unlink(target.parent / name)


def digest_of(path: pathlib.Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_of(path: pathlib.Path) -> pathlib.Path:
    """Where a file's digest is recorded: ``NAME.sha256``, which ``sha256sum -c`` reads too."""
    return path.with_name(path.name + ".sha256")


def record(path: pathlib.Path, digest: str) -> None:
    """Write down a file's digest, size and time stamp beside it."""
    status = path.stat()
    line = f"{digest}  {path.name}\n# bytes {status.st_size} time {status.st_mtime_ns}\n"
    with replacing(record_of(path)) as file:
        file.write(line.encode())


def verify(path: pathlib.Path, *, full: bool = False) -> str | None:
    """Compare a file with the digest recorded beside it when it was downloaded or decompressed.

    A file whose size and time stamp are the recorded ones passes at once; otherwise one of up to a
    gigabyte is read in full, and of a larger one only the size is compared. So a change that keeps
    the time stamp goes unnoticed unless ``full``, and so does any change to a file without a
    record.

    Returns:
      The recorded digest; None where there is no record.

    Raises:
      ValueError: the file has another size or another digest, or its record is damaged.
    """
    beside = record_of(path)
    if not beside.exists():
        return None
    match = _RECORD.fullmatch(beside.read_text(errors="replace"))
    if match is None:
        raise ValueError(f"{beside}: damaged checksum record; delete it and {path.name}")
    digest, size, stamp = match[1], int(match[2]), int(match[3])
    status = path.stat()
    if status.st_size == size:
        if not full and (status.st_mtime_ns == stamp or size > _FULL_CHECK):
            return digest
        if digest_of(path) == digest:
            with contextlib.suppress(OSError):  # a read-only folder: compared again next time
                record(path, digest)
            return digest
    raise ValueError(
        f"{path}: truncated or altered since it was stored (it has {status.st_size} bytes; "
        f"{size} bytes with another content are recorded); delete it and {beside.name} to get it "
        "again"
    )
