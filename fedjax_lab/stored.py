"""Data sets on disk: a folder of plain ``.npy`` files, read through the operating system's memory map.

``data.json`` holds the format's number, the clients' ids, the structure of an example, and of every other file
its shape, type, length and SHA-256. File names follow from their order, so that nothing in the header is ever
a path, and nothing is unpickled. The folder is written beside its place and renamed into it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab import checks
from fedjax_lab.data import FederatedData, Ids
from fedjax_lab.description import best_tile

PyTree = Any
FORMAT = 1
HEADER = "data.json"
SMALL = 16 * 2**20  # bytes up to which a file's content is compared whenever it is opened
PIECE = 8 * 2**20  # bytes copied at once
HINT = "save the data set again, or put back a copy of the folder"


def save(data: FederatedData, folder: str | os.PathLike) -> Path:
    """Write a data set to a folder of its own; see :meth:`FederatedData.save`."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already and nothing is overwritten: give another folder, or remove it")
    ids, structure = _ids(data.ids), _structure(data.arrays, "arrays")
    rows = data.rows_of()
    in_order = len(rows) == 0 or bool((rows == np.arange(rows[0], rows[0] + len(rows))).all())
    draft = folder.with_name(f".draft-{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    pick = slice(int(rows[0]), int(rows[0]) + len(rows)) if in_order and len(rows) else rows
    entries = {}
    for file, (name, leaf) in _files(data.arrays, {"sizes": data.sizes}, data.attrs):
        of_rows = file.startswith("field")
        entries[file] = {"name": name} | _write(draft / file, leaf, pick if of_rows else slice(0, len(leaf)))
    header = {"format": FORMAT, "structure": structure, "attrs": sorted(data.attrs), "files": entries, "ids": ids}
    with (draft / HEADER).open("w", encoding="utf-8") as file:
        json.dump({"sha256": _sha256(header), "header": header}, file, allow_nan=False)
        file.write("\n")
    if folder.exists():
        folder.rmdir()
    os.replace(draft, folder)
    return folder


def open_folder(folder: str | os.PathLike, verify: bool = False) -> FederatedData:
    """Read what :func:`save` wrote; see :meth:`FederatedData.open`."""
    folder = Path(folder)
    header = _header(folder)
    try:
        leaves = iter(range(len(header["files"])))
        arrays = _tree(header["structure"], leaves)
        fields = {"sizes": 0}
        attrs = dict.fromkeys(header["attrs"], 0)
        loaded = {
            file: _read(folder, file, name, header["files"], verify)
            for file, (name, _) in _files(arrays, fields, attrs)
        }
        ids = range(*header["ids"]["range"]) if "range" in header["ids"] else header["ids"]["list"]
    except (KeyError, TypeError, IndexError, StopIteration) as error:
        raise ValueError(f"{folder / HEADER} lacks or garbles an entry ({error!r}): {HINT}") from None
    flat = [array for file, array in loaded.items() if file.startswith("field")]
    sizes = np.array(loaded["sizes.npy"])
    attrs = {name: np.array(loaded[f"attr-{i:05d}.npy"]) for i, name in enumerate(sorted(attrs))}
    arrays = jax.tree.unflatten(jax.tree.structure(arrays), flat)
    _check_lengths(folder, arrays, sizes, attrs, ids)
    starts = np.cumsum(sizes, dtype=np.int64) - sizes
    return FederatedData(
        arrays, starts.astype(np.int32), sizes, attrs, Ids(ids), int(sizes.max(initial=0)), best_tile(sizes)
    )


def mapped(data: Any) -> bool:
    """Whether a data set's rows lie in files."""
    return any(isinstance(leaf, np.memmap) for leaf in jax.tree.leaves(data.arrays))


def fingerprint(data: FederatedData) -> str:
    """Tells data sets on the host apart: by sizes, attributes, types and 4,096 rows spread evenly.

    Reading every row of a population beyond memory would take minutes: a change to some rows may go unnoticed.
    """
    total = hashlib.sha256()
    rows = np.linspace(0, max(data.num_examples - 1, 0), min(data.num_examples, 4096)).astype(np.int64)
    whole = {"sizes": np.asarray(data.sizes), "starts": np.asarray(data.starts), "attrs": data.attrs}
    some = jax.tree.map(lambda a: np.asarray(a[np.minimum(rows, len(a) - 1)]), data.arrays)
    for name, leaf in [*checks.named_leaves(whole), *checks.named_leaves(some)]:
        leaf = np.ascontiguousarray(leaf)
        total.update(f"{name} {leaf.dtype} {leaf.shape} ".encode())
        total.update(leaf.reshape(-1).view(np.uint8).data)
    return total.hexdigest()[:16]


def _files(arrays: PyTree, sizes: dict[str, Any], attrs: dict[str, Any]) -> Iterator[tuple[str, tuple[str, Any]]]:
    """``(file, (name, leaf))`` of all that is stored, in a fixed order."""
    for i, named in enumerate(checks.named_leaves(arrays)):
        yield f"field-{i:05d}.npy", named
    yield "sizes.npy", ("sizes", sizes["sizes"])
    for i, name in enumerate(sorted(attrs)):
        yield f"attr-{i:05d}.npy", (f"attrs/{name}", attrs[name])


def _write(path: Path, leaf: Any, rows: slice | np.ndarray) -> dict[str, Any]:
    """Write some rows of a leaf piece by piece, and describe the file."""
    dtype, count = np.dtype(leaf.dtype), rows.stop - rows.start if isinstance(rows, slice) else len(rows)
    shape = (count, *leaf.shape[1:])
    total = hashlib.sha256()
    each = max(PIECE // max(int(np.prod(shape[1:])) * dtype.itemsize, 1), 1)
    with path.open("wb") as file:
        start = {"descr": np.lib.format.dtype_to_descr(_plain(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(file, start)
        for i in range(0, count, each):
            j = min(i + each, count)
            piece = leaf[rows.start + i : rows.start + j] if isinstance(rows, slice) else leaf[rows[i:j]]
            file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            total.update(piece)
    return {"dtype": dtype.name, "shape": list(shape), "bytes": path.stat().st_size, "sha256": total.hexdigest()}


def _read(folder: Path, file: str, name: str, entries: dict[str, dict], verify: bool) -> np.ndarray:
    """A file as a memory map, after comparing it with the header."""
    path, entry = folder / file, entries[file]
    what = f"{path} (field {name!r})"
    if entry["name"] != name:
        raise ValueError(f"{folder / HEADER} has the field {entry['name']!r} where {name!r} belongs: {HINT}")
    if not path.is_file():
        raise ValueError(f"{what} is missing: {HINT}")
    length = path.stat().st_size
    if length != entry["bytes"]:
        change = "was cut short" if length < entry["bytes"] else "has grown"
        raise ValueError(f"{what} {change}: it has {length} bytes, {entry['bytes']} were written: {HINT}")
    if (verify or length <= SMALL) and _digest(path) != entry["sha256"]:
        raise ValueError(f"{what} was altered since it was written: {HINT}")
    dtype, shape = jnp.dtype(entry["dtype"]), tuple(entry["shape"])
    try:
        array = np.load(path, mmap_mode="r" if np.prod(shape) else None, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{what} can't be read ({error}): {HINT}") from None
    if array.shape != shape or array.dtype != _plain(dtype):
        raise ValueError(f"{what} holds {array.dtype}{list(array.shape)}, the header says {dtype}{list(shape)}: {HINT}")
    return array if array.dtype == dtype else array.view(dtype)


def _header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER
    if not path.is_file():
        missing = "no such folder" if not folder.is_dir() else f"no {HEADER} in it"
        raise ValueError(f"{folder} holds no data set ({missing}): give a folder that data.save(folder) has written")
    try:
        envelope = json.loads(path.read_bytes())
        header = envelope["header"]
        number, intact = header["format"], envelope["sha256"] == _sha256(header)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} can't be read ({error!r}): {HINT}") from None
    if number != FORMAT:
        raise ValueError(f"{path} has format {number}, this version of fedjax_lab reads {FORMAT}: use the one it is of")
    if not intact:
        raise ValueError(f"{path} was altered since it was written: {HINT}")
    return header


def _check_lengths(folder: Path, arrays: PyTree, sizes: np.ndarray, attrs: dict[str, np.ndarray], ids: Any) -> None:
    """Refuse a folder whose parts don't belong together."""
    if sizes.ndim != 1 or sizes.dtype != np.int32 or (sizes < 0).any():
        raise ValueError(f"{folder / 'sizes.npy'} (field 'sizes') must be int32[clients] of at least 0: {HINT}")
    for name, leaf in checks.named_leaves(arrays):
        if leaf.shape[:1] != (int(sizes.sum(dtype=np.int64)),):
            raise ValueError(
                f"field {name!r} in {folder} has shape {leaf.shape}, sizes add up to {sizes.sum()}: {HINT}"
            )
    for name, count in [("ids", len(ids)), *((f"attrs/{n}", len(a)) for n, a in attrs.items())]:
        if count != len(sizes):
            raise ValueError(f"field {name!r} in {folder} has {count} entries for {len(sizes)} clients: {HINT}")


def _ids(ids: Any) -> dict[str, list]:
    """The clients' ids as JSON holds them: integers and strings only."""
    if isinstance(ids, range):
        return {"range": [ids.start, ids.stop, ids.step]}
    plain = [i.item() if isinstance(i, np.generic) else i for i in ids]
    for i in plain:
        if not isinstance(i, int | str) or isinstance(i, bool):
            raise ValueError(f"client id {checks.shown(i)} can't be saved: only integers and strings can")
    return {"list": plain}


def _structure(tree: PyTree, where: str) -> Any:
    """A pytree of dicts, lists and tuples as JSON; leaves are ``null``."""
    if type(tree) is dict:
        if not all(isinstance(k, str) for k in tree):
            raise ValueError(f"{where} has field names that are no strings: {checks.shown(list(tree))}")
        return {"dict": {k: _structure(tree[k], f"{where}/{k}") for k in sorted(tree)}}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [_structure(t, f"{where}/{i}") for i, t in enumerate(tree)]}
    if not jax.tree_util.all_leaves([tree]):
        raise ValueError(f"{where} is a {type(tree).__name__}: only dicts, lists and tuples of arrays can be saved")
    return None


def _tree(structure: Any, leaves: Iterator[int]) -> PyTree:
    if structure is None:
        return next(leaves)
    if "dict" in structure:
        return {k: _tree(s, leaves) for k, s in structure["dict"].items()}
    kind = "list" if "list" in structure else "tuple"
    return {"list": list, "tuple": tuple}[kind](_tree(s, leaves) for s in structure[kind])


def _plain(dtype: np.dtype) -> np.dtype:
    """The type that a file can name: those that NumPy doesn't know, such as bfloat16, are stored by their bits."""
    return np.dtype(f"u{dtype.itemsize}") if dtype.kind == "V" else dtype


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
