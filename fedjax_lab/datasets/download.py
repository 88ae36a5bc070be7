"""Downloading and decompressing files, whole or not at all, with a progress bar and a checksum.

Everything is written under a temporary name in the target folder and renamed once it is complete
and its checksum holds, so an error or Ctrl-C leaves nothing behind that could be taken for the
file. A connection that breaks is resumed where it stopped.
"""

import contextlib
import hashlib
import http.client
import lzma
import os
import pathlib
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from fedjax_lab.datasets import stored_files

Progress = Callable[[int, int | None], None]  # (bytes done, bytes in all if known)
CHUNK = 2**20
PAUSE = 1.0  # seconds before a broken connection is opened again
_ATTEMPTS = 4
_TIMEOUT = 30.0
_MOST_GROWTH = 500  # LZMA: EMNIST's file grows 28-fold; what grows more than this is refused


def fetch(
    url: str,
    target: str | os.PathLike,
    *,
    sha256: str | None = None,
    progress: Progress | None = None,
) -> pathlib.Path:
    """Download ``url`` to ``target``, in one piece, and record its digest beside it.

    Args:
      url: an http or https address.
      target: the file to write; its folder is created.
      sha256: the digest published for the file. Without one the download can't be checked against
        anything; its own digest is recorded, so that later changes are found
        (:func:`fedjax_lab.datasets.stored_files.verify`).
      progress: called with ``(bytes done, bytes in all or None)``; by default a bar is drawn.

    Returns:
      ``target``, beside which ``target.sha256`` lies now.

    Raises:
      ConnectionError: the address can't be reached, refuses, or broke off again and again.
      ValueError: what came has another digest. Nothing is kept in either case.
    """
    target = pathlib.Path(target)
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"only http and https addresses are downloaded; got {url!r}")
    replacing = stored_files.replacing(target)
    with bar(f"Downloading {target.name}", progress) as advance, replacing as file:
        digest = _stream(url, file, advance)
        if sha256 and digest != sha256:
            raise ValueError(
                f"{url}: what came has the SHA-256 {digest}, but {sha256} is published for "
                f"{target.name}; nothing was kept. Try again; should it stay so, the file was "
                "changed at its source"
            )
    stored_files.record(target, digest)
    return target


def _stream(url: str, file: Any, advance: Progress) -> str:
    """Write what ``url`` holds to ``file``; returns the digest."""
    digest, done, total = hashlib.sha256(), 0, None
    problem: Any = "the connection was closed"
    for attempt in range(_ATTEMPTS):
        time.sleep(PAUSE * attempt)
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                if done and not _resumes(response, done):
                    file.seek(0)
                    file.truncate()
                    digest, done = hashlib.sha256(), 0
                length = response.headers.get("Content-Length")
                total = done + int(length) if length else None
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    advance(done, total)
            if total is None or done == total:
                return digest.hexdigest()
        except urllib.error.HTTPError as error:
            with error:
                raise ConnectionError(f"{url}: {error.code} {error.reason}") from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            problem = getattr(error, "reason", error)
            if not done:  # no network, or no such host: trying again helps no one
                raise ConnectionError(f"{url}: {problem}") from None
    raise ConnectionError(f"{url}: stopped after {done} of {total or '?'} bytes ({problem})")


def _resumes(response: Any, done: int) -> bool:
    """Whether the server goes on at byte ``done``; some send the whole file again."""
    part = response.headers.get("Content-Range", "")
    return response.status == 206 and part.startswith(f"bytes {done}-")


def decompress(
    source: pathlib.Path,
    target: pathlib.Path,
    *,
    sha256: str | None = None,
    check: Callable[[pathlib.Path], None] = lambda path: None,
    progress: Progress | None = None,
) -> pathlib.Path:
    """Decompress an LZMA file (``.lzma`` or ``.xz``) in one piece, and record the result's digest.

    Args:
      source: the compressed file.
      target: the file to write.
      sha256: the digest of ``source``, if that is known; ``.lzma`` files carry no checksum.
      check: is called with the decompressed file, still under its temporary name, unless ``source``
        has the known digest. What it raises is passed on, and nothing is kept.
      progress: as in :func:`fetch`, in bytes of ``source``.

    Raises:
      ValueError: naming ``source``: truncated, damaged, or growing beyond reason.
    """
    read, written = hashlib.sha256(), hashlib.sha256()
    size = source.stat().st_size
    most = max(2**26, _MOST_GROWTH * size)
    replacing = stored_files.replacing(target)
    with bar(f"Decompressing {source.name}", progress) as advance, replacing as file:
        for done, packed, unpacked in _unpacked(source, most):
            read.update(packed)
            written.update(unpacked)
            file.write(unpacked)
            advance(done, size)
        file.flush()
        if read.hexdigest() != sha256:
            check(pathlib.Path(file.name))
    stored_files.record(target, written.hexdigest())
    return target


def _unpacked(source: pathlib.Path, most: int) -> Iterator[tuple[int, bytes, bytes]]:
    """``(bytes read so far, a piece of the file, what it decompresses to)``."""
    machine = lzma.LZMADecompressor(memlimit=2**30)
    done = grown = 0
    with source.open("rb") as file:
        while not machine.eof:
            packed = file.read(CHUNK) if machine.needs_input else b""
            if machine.needs_input and not packed:
                raise ValueError(f"{source}: truncated; its LZMA stream has no end")
            try:
                unpacked = machine.decompress(packed, 2**24)
            except lzma.LZMAError as error:
                raise ValueError(f"{source}: no LZMA stream, or damaged: {error}") from None
            done, grown = done + len(packed), grown + len(unpacked)
            if grown > most:
                raise ValueError(f"{source}: decompresses to more than {most} bytes; refused")
            yield done, packed, unpacked
        if machine.unused_data or file.read(1):
            raise ValueError(f"{source}: damaged: data behind the end of its LZMA stream")


@contextlib.contextmanager
def bar(label: str, progress: Progress | None = None, unit: str = "bytes") -> Iterator[Progress]:
    """A progress bar on standard error, drawn only for eyes; or ``progress`` instead of it."""
    if progress is not None:
        yield progress
        return
    from rich import console as rich_console
    from rich import progress as rich_progress

    console = rich_console.Console(stderr=True)
    done = (rich_progress.DownloadColumn(), rich_progress.TransferSpeedColumn())
    if unit != "bytes":
        done = (rich_progress.MofNCompleteColumn(),)
    text = rich_progress.TextColumn("{task.description}")
    columns = (text, rich_progress.BarColumn(), *done, rich_progress.TimeRemainingColumn())
    hidden = not (console.is_terminal or console.is_jupyter)
    with rich_progress.Progress(*columns, console=console, disable=hidden) as shown:
        task = shown.add_task(label, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
