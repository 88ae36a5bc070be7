"""LEAF's JSON folders: FEMNIST, Sent140, CelebA, Reddit, Synthetic and their like.

A folder has the subfolders ``train`` and ``test`` with files
``{"users": [...], "num_samples": [...], "user_data": {user: {"x": [...], "y": [...]}}}``. JSON has no
checksum: a file with a digit changed is another valid file, which nothing here can tell from the
right one. Everything else is checked against itself.
"""

import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fedjax_lab import checks, data_checks, reading
from fedjax_lab.data import FederatedData, Split

PyTree = Any
Encode = Callable[[list, list], PyTree]
_PARTS = ("train", "test")


def read_leaf(folder: str | os.PathLike, *, encode: Encode | None = None) -> Split:
    """Federated data from a folder that LEAF's scripts made.

    Args:
      folder: has the subfolders ``train`` and ``test`` with ``*.json`` files (gzipped ones are read too).
      encode: ``(x, y) -> arrays`` for one user's lists, for instance of text; the arrays' first axis
        is the user's examples, and an empty user must give arrays of zero rows. By default ``x``
        must be numbers and becomes float32, and ``y`` int32 if all labels are whole numbers, else
        float32.

    Returns:
      ``Split(train, test)`` over the same users, in the order in which they first occur, files sorted
      by name. A user who is in one part only (LEAF's split by user) is empty in the other.

    Raises:
      FileNotFoundError: a folder without ``train`` or ``test``, or without JSON files.
      ValueError: naming the file and the user: not JSON (with the line), missing entries, counts that
        disagree, a user in two files of one part, ragged or non-numeric or non-finite values.
    """
    folder = pathlib.Path(folder)
    parts = {part: _read_part(folder / part, encode or _numeric) for part in _PARTS}
    users = list(dict.fromkeys([*parts["train"], *parts["test"]]))
    if not users:
        raise ValueError(f"{folder}: no file names a user")
    trees = [tree for part in parts.values() for tree in part.values()]
    _same_shapes(folder, parts)
    whole = encode is None and all(_whole(tree["y"]) for tree in trees)
    filled = next((t for t in trees if len(jax.tree.leaves(t)[0])), trees[0])
    empty = jax.tree.map(lambda a: a[:0], filled)
    data = []
    for part in _PARTS:
        clients = [(user, _fitting(parts[part].get(user, empty), empty)) for user in users]
        if encode is None:
            dtype = np.int32 if whole else np.float32
            clients = [(user, tree | {"y": tree["y"].astype(dtype)}) for user, tree in clients]
        data.append(_build(folder / part, clients))
    return Split(*data)


def _build(folder: pathlib.Path, clients: list) -> FederatedData:
    if not any(len(jax.tree.leaves(tree)[0]) for _, tree in clients):
        raise ValueError(f"{folder}: none of the {len(clients)} users has an example")
    try:
        return FederatedData.from_clients(clients)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _read_part(folder: pathlib.Path, encode: Encode) -> dict[str, PyTree]:
    """``{user: arrays}`` of all files of a folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; LEAF's folders have 'train' and 'test' inside")
    files = sorted([*folder.glob("*.json"), *folder.glob("*.json.gz")])
    if not files:
        raise FileNotFoundError(f"{folder} has no .json file")
    users: dict[str, PyTree] = {}
    origin: dict[str, pathlib.Path] = {}
    for file in files:
        for user, examples in _read_file(file).items():
            if user in users:
                raise ValueError(f"{file}: user {user!r} is also in {origin[user]}")
            try:
                users[user], origin[user] = encode(examples["x"], examples["y"]), file
                data_checks.client_rows(user, jax.tree.map(np.asarray, users[user]))
            except (ValueError, TypeError, OverflowError) as error:
                raise ValueError(f"{file}, user {user!r}: {error}") from error
            rows = len(jax.tree.leaves(users[user])[0])
            if rows != len(examples["y"]):
                raise ValueError(f"{file}, user {user!r}: encode gave {rows} rows for {len(examples['y'])} examples")
    return users


def _read_file(file: pathlib.Path) -> dict[str, dict[str, list]]:
    """One file's ``user_data``, in the order of ``users``, after checking it against itself."""
    content = _parse(file)
    for field, kind in (("users", list), ("num_samples", list), ("user_data", dict)):
        if not isinstance(content.get(field), kind):
            raise ValueError(f"{file}: field {field!r} is missing, or no {kind.__name__}")
    users, counts, data = content["users"], content["num_samples"], content["user_data"]
    if not all(isinstance(user, str) for user in users):
        raise ValueError(f"{file}: field 'users' holds something that is not text")
    if len(users) != len(counts):
        raise ValueError(f"{file}: {len(users)} users, but {len(counts)} entries in 'num_samples'")
    try:
        checks.unique_ids(users)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    for user in set(data) - set(users):
        raise ValueError(f"{file}: user {user!r} has data but is not listed in 'users'")
    for user, count in zip(users, counts, strict=True):
        _check_user(file, user, count, data.get(user))
    return {user: data[user] for user in users}


def _check_user(file: pathlib.Path, user: str, count: Any, examples: Any) -> None:
    if not isinstance(examples, dict):
        raise ValueError(f"{file}: user {user!r} is listed but has no data")
    for field in ("x", "y"):
        if not isinstance(examples.get(field), list):
            raise ValueError(f"{file}, user {user!r}: field {field!r} is missing, or no list")
        if len(examples[field]) != count or isinstance(count, bool):
            raise ValueError(
                f"{file}, user {user!r}: field {field!r} has {len(examples[field])} entries, but "
                f"'num_samples' says {count!r}"
            )


def _parse(file: pathlib.Path) -> dict:
    text = reading.read_text(file)

    def refuse(constant: str) -> None:
        found = re.search(rf"[\s,:\[]{constant}", text)
        line = text.count("\n", 0, found.start() + 1) + 1 if found else "?"
        raise ValueError(f"{constant} in line {line} is not a number")

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the name {twice!r} occurs twice in one object")
        return dict(pairs)

    try:
        content = json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}, line {error.lineno}, column {error.colno}: not JSON, or cut off: {error.msg}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: LEAF's files hold an object; this one holds a list or a value")
    return content


def _numeric(x: list, y: list) -> dict[str, np.ndarray]:
    # Labels stay in double precision until it is known whether all of them are whole numbers.
    return {"x": _array("x", x).astype(np.float32), "y": _array("y", y)}


def _array(field: str, values: list) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError:
        raise ValueError(f"the entries of field {field!r} differ in length") from None
    if array.size and array.dtype.kind not in "iuf":
        raise ValueError(f"field {field!r} holds text, not numbers: give encode=, a function of a user's x and y")
    array = array.astype(np.float64)
    wrong = ~(np.abs(array) <= np.finfo(np.float32).max)
    bad = np.flatnonzero(wrong.any(tuple(range(1, array.ndim))))
    if len(bad):
        raise ValueError(f"field {field!r}, entry {bad[0]}, is not a finite 32-bit number")
    return array


def _whole(labels: np.ndarray) -> bool:
    return bool(((labels == np.round(labels)) & (np.abs(labels) < 2**31)).all())


def _same_shapes(folder: pathlib.Path, parts: dict[str, dict[str, PyTree]]) -> None:
    """Users without an example have no shape; all others agree."""
    first = None
    for part, users in parts.items():
        for user, tree in users.items():
            leaves = checks.named_leaves(tree)
            if not len(leaves[0][1]):
                continue
            shapes = {name: leaf.shape[1:] for name, leaf in leaves}
            if first is None:
                first = (user, part, shapes)
            elif shapes != first[2]:
                raise ValueError(
                    f"{folder}: an example of user {user!r} ({part}) has the shapes {shapes}, one of user "
                    f"{first[0]!r} ({first[1]}) {first[2]}"
                )


def _fitting(tree: PyTree, empty: PyTree) -> PyTree:
    """``tree``, or the empty arrays of the right shape for a user without an example."""
    return tree if len(jax.tree.leaves(tree)[0]) else empty
