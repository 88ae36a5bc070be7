"""Promise 26 for the published formats: 50 truncations and 50 flipped bytes of each.

A truncated file always raises. A flipped byte raises, or is one that the format doesn't protect; then
the result must be whole, of the right types and in range, and for the formats with checksums (FedJAX,
bzip2) it must be what it was. The error names the file, and nothing new lies in the folder.
"""

import json
import tarfile

import jax
import numpy as np
import pytest

from fedjax_lab.datasets import federated, stackoverflow, stored_files, text
from tests.datasets import federated_files as files

SPEECHES = {
    "HAMLET": ["To be, or not to be, that is the question: " * 5, "Words, words, words."],
    "GHOST": ["Mark me."],
}


def check_emnist(folder):
    data = federated.emnist_federated(data_dir=folder)
    for part in data:
        x, y = part.arrays["x"], part.arrays["y"]
        assert x.shape == (6, 28, 28, 1) and (x.dtype, y.dtype) == (np.float32, np.int32)
        assert ((x >= 0) & (x <= 1)).all() and ((y >= 0) & (y < 62)).all()
    return data


def check_cifar(folder):
    data = federated.cifar100_federated(data_dir=folder)
    x, y = data.train.arrays["x"], data.train.arrays["y"]
    assert x.shape == (3, 32, 32, 3) and (x.dtype, y.dtype) == (np.float32, np.int32)
    assert ((x >= 0) & (x <= 1)).all() and ((y >= 0) & (y < 100)).all()
    return data


def check_shakespeare(folder):
    data = federated.shakespeare_federated(data_dir=folder)
    for part in data:
        x, y = part.arrays["x"], part.arrays["y"]
        assert x.shape == y.shape and x.shape[1] == 80 and x.dtype == y.dtype == np.int32
        assert ((x >= 0) & (x < text.char_vocabulary().size)).all()
    return data


def tff_emnist(folder, index=True):
    splits = {"all_train": files.emnist(1), "all_test": files.emnist(2)}
    return files.write_tff(folder / "emnist_all.sqlite", splits, index=index, page_size=512)


def fedjax_emnist(folder):
    files.write_fedjax(folder / "federated_emnist_test.sqlite", files.emnist(2))
    path = folder / "federated_emnist_train.sqlite"
    return files.write_fedjax(path, files.emnist(1), page_size=512)


def tff_shakespeare(folder):
    clients = {k: {"snippets": [s.encode() for s in v]} for k, v in SPEECHES.items()}
    splits = {"train": clients, "test": clients}
    return files.write_tff(folder / "shakespeare.sqlite", splits, page_size=512)


def fedjax_shakespeare(folder):
    clients = {k: {"snippets": files.strings(*v)} for k, v in SPEECHES.items()}
    files.write_fedjax(folder / "shakespeare_test.sqlite", clients)
    return files.write_fedjax(folder / "shakespeare_train.sqlite", clients, page_size=512)


def words_file(folder):
    path = folder / "stackoverflow.word_count"
    path.write_text("".join(f"word{k} {1000 - k}\n" for k in range(100)))
    return path


def tags_file(folder):
    path = folder / "stackoverflow.tag_count"
    path.write_text(json.dumps({f"tag{k}": 1000 - k for k in range(100)}))
    return path


def archived(path):
    packed = path.with_name(path.name + ".tar.bz2")
    with tarfile.open(packed, "w:bz2") as archive:
        archive.add(path, arcname=path.name)
    path.unlink()
    return packed


def words(folder):
    return stackoverflow.stackoverflow_words(100, folder)


def tags(folder):
    return stackoverflow.stackoverflow_tags(100, folder)


# format: (write it, read and check it, does its checksum cover the values?)
FORMATS = {
    "tff_emnist": (tff_emnist, check_emnist, False),
    "tff_no_index": (lambda folder: tff_emnist(folder, index=False), check_emnist, False),
    "tff_cifar100": (
        lambda folder: files.write_tff(
            folder / "cifar100.sqlite", {"train": files.cifar(0, (1, 2)), "test": files.cifar(1, (1,))}
        ),
        check_cifar,
        False,
    ),
    "tff_shakespeare": (tff_shakespeare, check_shakespeare, False),
    "tff_lzma": (
        lambda folder: files.write_lzma(folder / "emnist_all.sqlite.lzma", tff_emnist(folder)),
        check_emnist,
        False,
    ),
    "fedjax_emnist": (fedjax_emnist, check_emnist, True),
    "fedjax_shakespeare": (fedjax_shakespeare, check_shakespeare, True),
    "word_list": (words_file, words, False),
    "tag_list": (tags_file, tags, False),
    "word_archive": (lambda folder: archived(words_file(folder)), words, True),
    "tag_archive": (lambda folder: archived(tags_file(folder)), tags, True),
}


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.delenv("FEDJAX_LAB_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def damaged(tmp_path, name, damage):
    """``(result or the error, the intact result)`` of reading the format with one file changed."""
    write, read, _ = FORMATS[name]
    folder = tmp_path / "data"
    folder.mkdir()
    path = write(folder)
    content = path.read_bytes()
    before = sorted(p.name for p in folder.iterdir())
    intact = read(folder)
    outcomes = []
    for seed in range(50):
        for extra in folder.iterdir():
            if extra.name not in before:
                extra.unlink()
        path.write_bytes(damage(bytearray(content), np.random.default_rng(seed)))
        try:
            outcome = read(folder)
        except ValueError as error:
            outcome = error
        if isinstance(outcome, ValueError):
            assert path.name.removesuffix(".lzma") in str(outcome), (seed, outcome)
            assert "\n" not in str(outcome)
            assert sorted(p.name for p in folder.iterdir()) == before, (seed, outcome)
        outcomes.append(outcome)
    return outcomes, intact


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


@pytest.mark.parametrize("name", FORMATS)
def test_truncated_files_raise(tmp_path, name):
    def truncate(content, rng):
        return content[: int(rng.integers(0, len(content)))]

    outcomes, intact = damaged(tmp_path, name, truncate)
    for outcome in outcomes:
        # A list of words may lose the last digits of its last count, which nobody asks for.
        assert isinstance(outcome, ValueError) or (name == "word_list" and outcome == intact)


@pytest.mark.parametrize("name", FORMATS)
def test_flipped_bytes_raise_or_leave_something_whole(tmp_path, name):
    def flip(content, rng):
        content[int(rng.integers(0, len(content)))] ^= int(rng.integers(1, 256))
        return content

    outcomes, intact = damaged(tmp_path, name, flip)
    raised = sum(isinstance(outcome, ValueError) for outcome in outcomes)
    print(
        f"{name}: {raised} of {len(outcomes)} raise, "
        f"{sum(not isinstance(o, ValueError) and same(o, intact) for o in outcomes)} are as before"
    )
    if FORMATS[name][2]:
        assert all(isinstance(o, ValueError) or same(o, intact) for o in outcomes)


def test_every_flipped_byte_of_a_file_that_the_library_stored_raises(tmp_path):
    path = tff_emnist(tmp_path)
    content = path.read_bytes()
    stored_files.record(path, stored_files.digest_of(path))
    for seed in range(50):
        rng, changed = np.random.default_rng(seed), bytearray(content)
        changed[int(rng.integers(0, len(content)))] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"emnist_all.sqlite: truncated or altered"):
            check_emnist(tmp_path)
    path.write_bytes(content)
    check_emnist(tmp_path)
