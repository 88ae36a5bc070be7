"""Federated Stack Overflow by name: sequences, tags, word lists, and some of its clients."""

import json
import tarfile

import numpy as np
import pytest

from fedjax_lab.datasets import collecting, federated, stackoverflow
from tests.datasets import federated_files as files

emnist_federated = federated.emnist_federated
stackoverflow_federated = stackoverflow.stackoverflow_federated


@pytest.fixture(autouse=True)
def _no_other_folders(tmp_path, monkeypatch):
    """Neither the real data nor the cache of whoever runs the tests, and no network."""
    monkeypatch.delenv("FEDJAX_LAB_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def refuse(url, *_, **__):
        raise ConnectionError(f"{url}: no network in this test")

    monkeypatch.setattr("fedjax_lab.datasets.download.fetch", refuse)


# ---- Stack Overflow ----

POSTS = {
    "train": {"7": ["the cat sat", "the the"], "12": ["sat"]},
    "heldout": {"10": ["cat"]},
    "test": {"7": ["dog the"], "99": ["the"]},
}
WORDS = ["the", "cat", "sat"]


def post(sentences, fedjax):
    fields = {
        "creation_date": ["2018-02-28 19:06:18.34 UTC"] * len(sentences),
        "tags": ["java|sql", "c++"][: len(sentences)],
        "title": ["the title"] * len(sentences),
        "tokens": sentences,
        "type": ["question"] * len(sentences),
    }
    if fedjax:
        arrays = {k: files.strings(*v) for k, v in fields.items()}
    else:
        arrays = {k: [s.encode() for s in v] for k, v in fields.items()}
    return arrays | {"score": np.arange(len(sentences))}


@pytest.fixture(params=["tff", "fedjax"])
def posts(request, tmp_path):
    fedjax = request.param == "fedjax"
    splits = {s: {c: post(p, fedjax) for c, p in cs.items()} for s, cs in POSTS.items()}
    if fedjax:
        for split, clients in splits.items():
            name = f"stackoverflow_{split.replace('heldout', 'held_out')}.sqlite"
            files.write_fedjax(tmp_path / name, clients)
    else:
        files.write_tff(tmp_path / "stackoverflow.sqlite", splits)
    (tmp_path / "stackoverflow.word_count").write_text("the 9\ncat 5\nsat 4\nrare 1\n")
    (tmp_path / "stackoverflow.tag_count").write_text(json.dumps({"sql": 3, "java": 9, "r": 1}))
    return tmp_path


def test_stackoverflow_predicts_the_next_word(posts):
    data = stackoverflow_federated(data_dir=posts, words=3, length=4)
    assert data._fields == ("train", "heldout", "test")
    assert [list(part.ids) for part in data] == [["12", "7"], ["10"], ["7", "99"]]
    train = data.train.arrays
    np.testing.assert_array_equal(train["x"], [[1, 5, 0, 0], [1, 3, 4, 5], [1, 3, 3, 0]])
    np.testing.assert_array_equal(train["y"], [[5, 2, 0, 0], [3, 4, 5, 2], [3, 3, 2, 0]])
    np.testing.assert_array_equal(data.test.client("7").full()[0]["y"], [[6, 3, 2, 0]])


def test_stackoverflow_predicts_tags(posts):
    data = stackoverflow_federated("tag", data_dir=posts, words=["the", "cat"], tags=2)
    # The words of the sentence and of "the title"; java (9) comes before sql (3).
    expected = [[1 / 3, 0], [2 / 5, 1 / 5], [3 / 4, 0]]
    np.testing.assert_allclose(data.train.arrays["x"], expected, rtol=1e-6)
    np.testing.assert_array_equal(data.train.arrays["y"], [[1, 1], [1, 1], [0, 0]])
    assert data.train.arrays["y"].dtype == data.train.arrays["x"].dtype == np.float32


def test_stackoverflow_for_some_clients_and_examples(posts):
    data = stackoverflow_federated(data_dir=posts, words=WORDS, max_examples=1, clients=1)
    assert [list(part.ids) for part in data] == [["12"], ["10"], ["7"]]
    wanted = {"train": ["7"], "heldout": None, "test": collecting.random_clients(1)}
    data = stackoverflow_federated(data_dir=posts, words=WORDS, max_examples=1, clients=wanted)
    assert data.train.sizes.tolist() == [1] and data.test.num_clients == 1
    with pytest.raises(ValueError, match="none of these clients is in heldout, test"):
        stackoverflow_federated(data_dir=posts, words=WORDS, clients=["12"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "nextword"}, "task must be one of next_word, tag; got 'nextword'; did you mean"),
        ({"words": 10_000}, "stackoverflow.word_count: has 4 entries, fewer than the 10000"),
        ({"words": 0}, "must be positive"),
        ({"words": []}, "at least one symbol"),
        ({"max_examples": 0}, "max_examples must be positive"),
        ({"task": "tag", "tags": 9, "words": 2}, "tag_count: has 3 entries, fewer than the 9"),
    ],
)
def test_bad_requests_are_named(posts, changes, message):
    with pytest.raises(ValueError, match=message):
        stackoverflow_federated(**{"data_dir": posts, "words": 3, **changes})


def test_word_and_tag_lists_are_read_from_their_archives_too(posts):
    for kind in ("word", "tag"):
        path = posts / f"stackoverflow.{kind}_count"
        with tarfile.open(f"{path}.tar.bz2", "w:bz2") as archive:
            archive.add(path, arcname=f"stackoverflow/{path.name}")
        path.unlink()
    assert stackoverflow.stackoverflow_words(2, posts) == ["the", "cat"]
    assert stackoverflow.stackoverflow_tags(3, posts) == ["java", "sql", "r"]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("word", b"the 9\ncat\n", "line 2: expected a word and its count; got 'cat'"),
        ("word", b"the 9\nthe 8\n", "line 2: the word 'the' occurs a second time"),
        ("word", b"the 9\ncat nine\n", "line 2: expected a word and its count"),
        ("word", b"\xff\xfe 9\n", "can't decode byte 0xff"),
        ("tag", b'{"java": "many"}', "expected a JSON object of tags"),
        ("tag", b"[1]", "expected a JSON object of tags"),
        ("tag", b'{"java": 9', "delimiter"),
        ("tag", b"[" * 100_000, "nested thousands deep"),
    ],
)
def test_damaged_lists_are_named(posts, kind, content, message):
    path = posts / f"stackoverflow.{kind}_count"
    path.write_bytes(content)
    read = {"word": stackoverflow.stackoverflow_words, "tag": stackoverflow.stackoverflow_tags}[kind]
    with pytest.raises(ValueError, match=message) as caught:
        read(1, posts)
    assert str(path) in str(caught.value)
