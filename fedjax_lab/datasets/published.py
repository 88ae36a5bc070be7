"""The federated data sets that TensorFlow Federated and FedJAX publish: files, addresses, digests.

Sources of the SHA-256 digests, none of which could be checked against the files here: FedJAX
(``fedjax/datasets/cifar100.py``, ``downloads_test.py``) for CIFAR-100 and Shakespeare, TFF
(``simulation/datasets/stackoverflow.py``) for word and tag counts; for EMNIST and FedJAX's digits
and Stack Overflow training files, public repositories that document what they downloaded. The other
files have no published digest that we know of: theirs is recorded when they are first downloaded.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fedjax_lab import checks
from fedjax_lab.datasets import download, sqlite_reading, stored_files, tff_sqlite

_TFF = "https://storage.googleapis.com/tff-datasets-public/"
_FEDJAX = "https://storage.googleapis.com/gresearch/fedjax/"

ADDRESSES: dict[str, str] = {
    name: _TFF + name
    for name in (
        "emnist_all.sqlite.lzma", "cifar100.sqlite.lzma", "shakespeare.sqlite.lzma",
        "stackoverflow.sqlite.lzma", "stackoverflow.word_count.tar.bz2",
        "stackoverflow.tag_count.tar.bz2",
    )
} | {
    path.split("/")[1]: f"{_FEDJAX}{path}"
    for path in (
        "emnist/federated_emnist_train.sqlite", "emnist/federated_emnist_test.sqlite",
        "emnist/federated_emnist_digitsonly_train.sqlite",
        "emnist/federated_emnist_digitsonly_test.sqlite",
        "shakespeare/shakespeare_train.sqlite", "shakespeare/shakespeare_test.sqlite",
        "stackoverflow/stackoverflow_train.sqlite", "stackoverflow/stackoverflow_held_out.sqlite",
        "stackoverflow/stackoverflow_test.sqlite",
    )
}  # fmt: skip

DIGESTS = {
    "emnist_all.sqlite.lzma": "c3aaf91b4cf4e69d53d81627ad119eccdc878ff906f68e66063ff10f67faad48",
    "cifar100.sqlite.lzma": "23d3916c9caa33395737ee560cc7cb77bbd05fc7b73647ee7be3a7e764172939",
    "shakespeare.sqlite.lzma": "d3d11fceb9e105439ac6f4d52af6efafed5a2a1e1eb24c5bd2dd54ced242f5c4",
    "stackoverflow.word_count.tar.bz2": ("1dc00256d6e527c54b9756d968118378ae14e6692c0b3b6cad470cdd3f0c519c"),
    "stackoverflow.tag_count.tar.bz2": ("6fe281cec490d9384a290d560072438e7e2b377bbb823876ce7bd6f82696772d"),
    "federated_emnist_digitsonly_train.sqlite": ("0540b878da75b6a9a8c14fadae5c4b0a62cf12f8ff5fcf675b6f6c6c774df323"),
    "stackoverflow_train.sqlite": ("3efde71d939fd7cb58d357dd3c060c3a8c8babec7607df9c9cc549034bafc646"),
}

_CHECKED = 2**30  # bytes up to which a database without a digest is read in full, in seconds


class Published(NamedTuple):
    """One data set.

    Attributes:
      name: of its folder below the data folder.
      title: for messages.
      files: ``{"tff": {split: file}, "fedjax": {split: file}}``, as they are read, decompressed.
      splits: what TFF's file calls each split.
    """

    name: str
    title: str
    files: Mapping[str, Mapping[str, str]]
    splits: Mapping[str, str]


def locate(published: Published, data_dir: str | os.PathLike | None, source: str | None) -> dict[str, pathlib.Path]:
    """The file of every split: from a folder if it is there, else downloaded.

    Args:
      published: the data set.
      data_dir: see :func:`fedjax_lab.datasets.stored_files.data_folders`.
      source: ``"tff"`` or ``"fedjax"``; by default that of which a folder holds a file, else TFF.

    Raises:
      FileNotFoundError: with the ways to supply the data set, where it can't be downloaded.
      ValueError: an unknown source; a stored file was altered; a download has another digest.
    """
    if source is not None and source not in published.files:
        near = checks.nearest(source, published.files)
        raise ValueError(f"source must be 'tff' or 'fedjax'; got {source!r}{near}")
    folders = stored_files.data_folders(data_dir, published.name)
    sources = [source] if source else list(published.files)
    wanted = next(
        (s for s in sources if any(_stored(f, folders) for f in published.files[s].values())),
        sources[0],
    )
    try:
        paths = {f: obtain(f, folders) for f in dict.fromkeys(published.files[wanted].values())}
    except ConnectionError as error:
        raise FileNotFoundError(_ways(published, sources, folders, error)) from error
    return {split: paths[file] for split, file in published.files[wanted].items()}


def obtain(file: str, folders: Sequence[pathlib.Path], packing: str = ".lzma") -> pathlib.Path:
    """One file by its name, or its packed form: found, else downloaded. LZMA is decompressed.

    A file that this library wrote is compared with its record. Databases without one, and those from
    archives of unknown digest, are checked for contradictions if they are not above a gigabyte.

    Raises:
      ConnectionError: it isn't there and can't be downloaded.
    """
    path = _stored(file, folders, packing)
    downloaded = path is None
    if path is None:
        remote = file + packing if file + packing in ADDRESSES else file
        if remote not in ADDRESSES:
            raise ConnectionError(f"{file} is not offered for download")
        target = stored_files.writable(list(folders)) / remote
        path = download.fetch(ADDRESSES[remote], target, sha256=DIGESTS.get(remote))
    digest = stored_files.verify(path)
    if path.suffix != ".lzma":
        if digest is None and path.suffix == ".sqlite":
            _check(path)
        return path
    target = stored_files.writable([path.parent, *folders]) / file
    if target.is_file() and target.stat().st_mtime >= path.stat().st_mtime:
        stored_files.verify(target)  # unpacked elsewhere before, because this folder is read-only
        return target
    known = digest or DIGESTS.get(path.name)
    out = download.decompress(path, target, sha256=known, check=_check)
    if downloaded:  # its content is kept twice otherwise; a user's own file stays
        path.unlink()
        stored_files.record_of(path).unlink(missing_ok=True)
    return out


def _check(path: pathlib.Path) -> None:
    """What can be said for a database that has no digest: it doesn't contradict itself."""
    if path.stat().st_size > _CHECKED:
        return
    sqlite_reading.check(path)
    with sqlite_reading.connect(path) as connection, sqlite_reading.naming(path):
        is_tff = "examples" in sqlite_reading.tables(connection)
    if is_tff:
        tff_sqlite.check(path)


def _stored(file: str, folders: Sequence[pathlib.Path], packing: str = ".lzma") -> pathlib.Path | None:
    candidates = [folder / name for folder in folders for name in (file, file + packing)]
    return next((path for path in candidates if path.is_file()), None)


def _ways(published: Published, sources: Sequence[str], folders: Sequence[pathlib.Path], error: Exception) -> str:
    lines = [
        f"{published.title} is in none of the folders {', '.join(map(str, folders))}, and could "
        f"not be downloaded ({error}). To supply it, on a machine with network access download"
    ]
    for source in sources:
        names = dict.fromkeys(published.files[source].values())
        addresses = [ADDRESSES.get(f"{n}.lzma") or ADDRESSES.get(n) for n in names]
        if all(addresses):
            lines.append(f"  - {' and '.join(map(str, addresses))}")
    lines.append(
        f"put it into {folders[0]}, or into a folder that FEDJAX_LAB_DATA names or that you pass "
        "as data_dir, and call again."
    )
    return "\n".join(lines)
