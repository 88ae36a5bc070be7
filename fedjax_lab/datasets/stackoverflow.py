"""Federated Stack Overflow by name: next-word prediction and tag prediction."""

import json
import os
import pathlib
import tarfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_lab import checks
from fedjax_lab.data import FederatedData
from fedjax_lab.datasets import collecting, published, sqlite_reading, stored_files, text
from fedjax_lab.datasets.tf_example import Field

_STACKOVERFLOW = published.Published(
    "stackoverflow",
    "federated Stack Overflow",
    {
        "tff": dict.fromkeys(("train", "heldout", "test"), "stackoverflow.sqlite"),
        "fedjax": {
            "train": "stackoverflow_train.sqlite",
            "heldout": "stackoverflow_held_out.sqlite",
            "test": "stackoverflow_test.sqlite",
        },
    },
    {"train": "train", "heldout": "heldout", "test": "test"},
)
_LARGEST_LIST = 2**28  # bytes of a word or tag list


class HeldOutSplit(NamedTuple):
    """Three data sets, each over its own clients."""

    train: FederatedData
    heldout: FederatedData
    test: FederatedData


def stackoverflow_federated(
    task: str = "next_word",
    *,
    clients: collecting.Clients = None,
    data_dir: str | os.PathLike | None = None,
    source: str | None = None,
    words: int | Sequence[str] = 10_000,
    tags: int | Sequence[str] = 500,
    length: int = 20,
    max_examples: int | None = None,
) -> HeldOutSplit:
    """Stack Overflow's posts, one client a user, one example a sentence.

    The whole has 342,477 users in train, 38,758 others in heldout and 204,088 in test (train's
    users and new ones, after 2018-01-01), with 136, 16 and 17 million examples: ask for some.

    Args:
      task: ``"next_word"``, or ``"tag"`` to predict a post's tags from a sentence and the title.
      clients: a number (the first ones by id, of each split), a list of ids, a function of all ids
        (:func:`~fedjax_lab.datasets.collecting.random_clients`), None for all, or a mapping of
        split to one of these: ``{"train": random_clients(1000), "heldout": 100, "test": 100}``.
      data_dir: a folder that holds the files, or its parent; by default the one that FEDJAX_LAB_DATA
        names. ``~/.cache/fedjax_lab`` comes last. What is missing is downloaded: several gigabytes.
      source: ``"tff"`` or ``"fedjax"``; by default whichever a folder holds, else TFF's.
      words: the vocabulary: a number (the most frequent ones of the published list,
        ``stackoverflow.word_count``), or the words themselves.
      tags: the same for the tags (``stackoverflow.tag_count``); only for ``task="tag"``.
      length: words in a sequence, for ``"next_word"``.
      max_examples: at most so many examples of each client, the first ones; 500 is common for tags.

    Returns:
      ``HeldOutSplit(train, heldout, test)``. For ``"next_word"`` ``x`` and ``y``:
      ``int32[length]``, 0 for padding, 1 begin, 2 end, the words from 3, the last number for all
      others, 10,004 in all; ``y`` is one word ahead. For ``"tag"`` ``x: float32[words]``, each
      word's share of the sentence and title, and ``y: float32[tags]``, zeros and ones; at 42 kB an
      example.

    Raises:
      FileNotFoundError: with the ways to supply the files, if they can't be downloaded.
      ValueError: an unknown task, split, client or source; a damaged file or list, named; more data
        than this machine's memory holds. A changed letter can't be noticed in a file that this
        library did not download.

    Source: Reddi et al. 2021, "Adaptive Federated Optimization", appendix C; TFF's baselines.
    """
    tasks = {"next_word": _next_word, "tag": _tag}
    if task not in tasks:
        near = checks.nearest(str(task), tasks)
        raise ValueError(f"task must be one of {', '.join(tasks)}; got {task!r}{near}")
    if max_examples is not None:
        checks.positive(max_examples, "max_examples", integer=True)
    fields, decode = tasks[task](data_dir, words, tags, length)
    reading = collecting.Task(fields, decode, max_examples)
    return HeldOutSplit(**collecting.own_clients(_STACKOVERFLOW, reading, data_dir, clients, source))


def stackoverflow_words(count: int = 10_000, data_dir: str | os.PathLike | None = None) -> list[str]:
    """The most frequent words of the training posts, most frequent first.

    From ``stackoverflow.word_count`` (lines of a word and its count) or the published archive
    ``stackoverflow.word_count.tar.bz2``, in a folder or downloaded. Raises as
    :func:`stackoverflow_federated`, naming file and line.
    """
    return _first(count, "stackoverflow.word_count", data_dir, _parse_words)


def stackoverflow_tags(count: int = 500, data_dir: str | os.PathLike | None = None) -> list[str]:
    """The most frequent tags of the training posts, most frequent first.

    From ``stackoverflow.tag_count`` (a JSON object of tag to count) or the published archive
    ``stackoverflow.tag_count.tar.bz2``, in a folder or downloaded.
    """
    return _first(count, "stackoverflow.tag_count", data_dir, _parse_tags)


def _next_word(data_dir: Any, words: int | Sequence[str], _: Any, length: int):
    known = stackoverflow_words(words, data_dir) if isinstance(words, int) else list(words)
    vocabulary = text.vocabulary(known)

    def decode(raw: dict[str, Any]) -> dict[str, np.ndarray]:
        return text.encode_words(raw["tokens"], vocabulary, length)

    return {"tokens": Field("bytes")}, decode


def _tag(data_dir: Any, words: int | Sequence[str], tags: int | Sequence[str], _: Any):
    known = stackoverflow_words(words, data_dir) if isinstance(words, int) else list(words)
    labels = stackoverflow_tags(tags, data_dir) if isinstance(tags, int) else list(tags)

    def decode(raw: dict[str, Any]) -> dict[str, np.ndarray]:
        pairs = zip(raw["tokens"], raw["title"], strict=True)
        sentences = [sentence + b" " + title for sentence, title in pairs]
        return {"x": text.bag_of_words(sentences, known), "y": text.multi_hot(raw["tags"], labels)}

    return {name: Field("bytes") for name in ("tokens", "title", "tags")}, decode


def _first(
    count: int,
    name: str,
    data_dir: str | os.PathLike | None,
    parse: Callable[[bytes], Mapping[str, int]],
) -> list[str]:
    """The ``count`` first entries of a published list, found in a folder or downloaded."""
    checks.positive(count, f"the number of entries of {name}", integer=True)
    folders = stored_files.data_folders(data_dir, _STACKOVERFLOW.name)
    try:
        path = published.obtain(name, folders, ".tar.bz2")
    except ConnectionError as error:
        raise FileNotFoundError(
            f"the list {name} is in none of the folders {', '.join(map(str, folders))}, and could "
            f"not be downloaded ({error}). Put it or {published.ADDRESSES[name + '.tar.bz2']} "
            "there, name its folder by FEDJAX_LAB_DATA or data_dir=, or pass the words and tags "
            "themselves"
        ) from error
    with sqlite_reading.naming(path):
        entries = list(parse(_contents(path, name)))
        if len(entries) < count:
            raise ValueError(f"has {len(entries)} entries, fewer than the {count} asked for")
    return entries[:count]


def _contents(path: pathlib.Path, name: str) -> bytes:
    """A list's bytes, out of the archive if it is one; nothing is extracted to the disk."""
    if path.suffix != ".bz2":
        return path.read_bytes()
    try:
        with tarfile.open(path, "r:bz2") as archive:
            for member in archive:
                if pathlib.PurePosixPath(member.name).name == name and member.isfile():
                    if member.size > _LARGEST_LIST:
                        raise ValueError(f"{member.name} has {member.size} bytes; refused")
                    data = archive.extractfile(member)
                    return data.read() if data else b""
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"truncated or damaged archive: {error}") from error
    raise ValueError(f"the archive holds no file {name}")


def _parse_words(content: bytes) -> dict[str, int]:
    words: dict[str, int] = {}
    for number, line in enumerate(content.decode().splitlines(), 1):
        parts = line.split()
        if len(parts) != 2 or not parts[1].isdecimal():
            raise ValueError(f"line {number}: expected a word and its count; got {line[:60]!r}")
        if parts[0] in words:
            raise ValueError(f"line {number}: the word {parts[0]!r} occurs a second time")
        words[parts[0]] = int(parts[1])
    return words


def _parse_tags(content: bytes) -> dict[str, int]:
    try:
        counts = json.loads(content)
    except RecursionError:
        raise ValueError("not a JSON object of tags: it is nested thousands deep") from None
    if not isinstance(counts, dict) or not all(type(n) is int for n in counts.values()):
        raise ValueError("expected a JSON object of tags and their counts")
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
