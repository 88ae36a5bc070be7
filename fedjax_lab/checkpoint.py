"""Checkpoints: whole states on disk, through Orbax, that are either intact or recognised as damaged.

A checkpoint is a folder ``00000040`` (rounds done) with Orbax's ``state/`` and ``record.json``, which
holds the round, the name, shape and type of every leaf, a SHA-256 of their bits, one of every file,
and one of itself. The folder is written beside its place and renamed into it, so that a process killed
at any moment leaves the checkpoint before it. Files are compared with their digests before Orbax reads
them, and the bits after; nothing in a checkpoint is ever executed.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab.state_leaves import Leaf, described, digest, first_difference, host_leaves, place

PyTree = Any
FORMAT = 1


class Restored(NamedTuple):
    """A state read back, the ``round`` it belongs to, and what was saved beside it."""

    state: PyTree
    round: int
    extra: dict[str, Any]


class Damaged(Exception):
    """A checkpoint that is not what was written; the message says how."""


def save(folder: Path, round: int, state: PyTree, extra: dict[str, Any], keep: int = 3) -> Path:
    """Write a checkpoint atomically and remove the oldest.

    Args:
      folder: where the checkpoints lie, made if need be.
      round: rounds done.
      state: any pytree of arrays.
      extra: what JSON can hold, returned by :func:`restore`.
      keep: how many of the newest checkpoints stay.

    Returns:
      The checkpoint's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    leaves = host_leaves(state)
    draft, final = folder / f".draft-{round:08d}", folder / f"{round:08d}"
    draft.mkdir()
    # Orbax refuses arrays of no elements: their record says all there is to know.
    arrays = {_file_name(i, leaf): leaf.value for i, leaf in enumerate(leaves) if leaf.value.size}
    if arrays:
        with _orbax() as orbax:
            orbax.save((draft / "state").absolute(), arrays)
    record = {
        "format": FORMAT,
        "round": round,
        "leaves": [leaf.describe() for leaf in leaves],
        "digest": digest(leaves),
        "files": {p.relative_to(draft).as_posix(): _file_digest(p) for p in _files(draft)},
        "extra": extra,
    }
    write_json(draft / "record.json", {"sha256": _sha256(record), "record": record})
    if final.exists():
        _remove(final)
    os.replace(draft, final)
    _sync(folder)
    for old in newest_first(folder)[keep:]:
        _remove(old)
    return final


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder by falling round; none if there is no folder."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if re.fullmatch(r"\d{8,}", p.name)]
    return sorted(found, key=lambda p: -int(p.name))


def clean(folder: Path) -> None:
    """Remove what a killed process left half written or half removed."""
    for name in (".draft-*", ".old-*"):
        for path in folder.glob(name):
            shutil.rmtree(path)


def restore_newest(
    folder: Path, template: PyTree, check: Callable[[dict], None] = lambda extra: None
) -> Restored | None:
    """The newest intact checkpoint, or ``None`` where there isn't any checkpoint at all.

    Damaged ones that are newer than it are renamed to ``....damaged`` with a warning.

    Args:
      folder: where the checkpoints lie.
      template: a state of the expected structure, shapes, types and device placement.
      check: see :func:`restore`.

    Raises:
      ValueError: a checkpoint from other code, which names the first leaf that differs; or checkpoints
        that are all damaged, which says what to do. Nothing has been changed then.
    """
    bad: list[tuple[Path, str]] = []
    for path in newest_first(folder):
        try:
            restored = restore(path, template, check)
        except Damaged as error:
            bad.append((path, str(error)))
            continue
        for damaged, reason in bad:
            aside = _set_aside(damaged)
            warnings.warn(
                f"checkpoint {damaged} is damaged ({reason}); going on from round "
                f"{restored.round}. It was renamed to {aside.name}",
                stacklevel=4,
            )
        return restored
    if bad:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in bad)
        raise ValueError(
            f"no checkpoint in {folder} is intact ({reasons}). Nothing was changed. Put back a copy "
            "of one, or begin again in another folder (out=...)"
        )
    return None


def restore(path: Path, template: PyTree, check: Callable[[dict], None] = lambda extra: None) -> Restored:
    """Read one checkpoint.

    Args:
      path: its folder.
      template: a state of the expected structure, shapes, types and device placement.
      check: called with what was saved beside the state, before the states are compared; may
        raise ValueError.

    Raises:
      Damaged: it is not what was written.
      ValueError: it belongs to other code, and the message names the first leaf that differs.
    """
    record = read_record(path)
    check(record["extra"])
    difference = first_difference(record["leaves"], described(template))
    if difference is not None:
        raise ValueError(
            f"checkpoint {path} is from other code: {difference}. The algorithm, the model or the "
            "library is another one: go back to it, or use another folder (out=...)"
        )
    leaves = _read_leaves(path, record["leaves"])
    if digest(leaves) != record["digest"]:
        raise Damaged("its arrays differ from those saved")
    like, structure = jax.tree.flatten(template)
    state = [place(leaf, old) for leaf, old in zip(leaves, like, strict=True)]
    return Restored(jax.tree.unflatten(structure, state), record["round"], record["extra"])


def read_record(path: Path) -> dict[str, Any]:
    """A checkpoint's record, after comparing it and every file with their digests.

    Raises:
      Damaged: something is missing or altered.
      ValueError: written in another format.
    """
    try:
        envelope = json.loads((path / "record.json").read_bytes())
        record = envelope["record"]
        intact = envelope["sha256"] == _sha256(record)
        number, files = record["format"], record["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        # Not the repr, which for bytes that aren't UTF-8 holds the whole file.
        raise Damaged(f"record.json can't be read: {type(error).__name__}: {error}") from None
    if not intact:
        raise Damaged("record.json was altered")
    if number != FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {number}, this version of fedjax_lab reads {FORMAT}: "
            "use the version that wrote it"
        )
    for name, expected in files.items():
        if not (path / name).is_file():
            raise Damaged(f"file {name} is missing")
        if _file_digest(path / name) != expected:
            raise Damaged(f"file {name} was altered or cut short")
    return record


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file at once: a reader sees the old content or the new, never a part."""
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def _read_leaves(path: Path, descriptions: list[dict]) -> list[Leaf]:
    empty = [Leaf(e["name"], np.empty(e["shape"], jnp.dtype(e["dtype"])), e["impl"]) for e in descriptions]
    stored: Any = {}
    if any(leaf.value.size for leaf in empty):
        try:
            with _orbax() as orbax:
                stored = orbax.restore((path / "state").absolute())
        except Exception as error:  # whatever Orbax and TensorStore say of files they can't read
            raise Damaged(f"Orbax can't read it: {error}") from None
    leaves = []
    for i, leaf in enumerate(empty):
        if leaf.value.size:
            value = stored.get(_file_name(i, leaf))
            if not isinstance(value, np.ndarray) or value.shape != leaf.value.shape:
                raise Damaged(f"leaf {leaf.name} is missing or has another shape")
            # Types narrower than a byte come back as bytes.
            leaf = leaf._replace(value=value.astype(leaf.value.dtype, copy=False))
        leaves.append(leaf)
    return leaves


def _orbax():
    import orbax.checkpoint as ocp

    # Alone also where there are several processes: it would wait for the others, which write nothing.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone)


def _file_name(index: int, leaf: Leaf) -> str:
    return f"{index:05d}-" + re.sub(r"[^A-Za-z0-9_]+", "-", leaf.name)[:60]


def _sha256(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Make a rename durable, where the file system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a process killed meanwhile leaves nothing that looks like one."""
    doomed = path.with_name(f".old-{path.name}")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def _set_aside(path: Path) -> Path:
    aside, count = path.with_name(f"{path.name}.damaged"), 1
    while aside.exists():
        count += 1
        aside = path.with_name(f"{path.name}.damaged-{count}")
    os.replace(path, aside)
    return aside
