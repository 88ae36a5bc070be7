"""The federated sets by name, from tiny files in both published formats."""

import json
import tarfile

import numpy as np
import pytest

from fedjax_lab.data import Split
from fedjax_lab.datasets import collecting, federated, stackoverflow, stored_files, text
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


def emnist_folder(folder, source):
    """``(folder, train, test)``: one writer has no test examples, one has only test examples."""
    train, test = files.emnist(1), files.emnist(2, sizes=(2, 1, 3, 2))
    del test["f0001_01"]
    if source == "tff":
        digits = {f"digits_only_{s}": files.emnist(3, digits=True) for s in ("train", "test")}
        files.write_tff(folder / "emnist_all.sqlite", {"all_train": train, "all_test": test} | digits)
    else:
        files.write_fedjax(folder / "federated_emnist_train.sqlite", train)
        files.write_fedjax(folder / "federated_emnist_test.sqlite", test)
        for split in ("train", "test"):
            path = folder / f"federated_emnist_digitsonly_{split}.sqlite"
            files.write_fedjax(path, files.emnist(3, digits=True))
    return folder, train, test


# ---- EMNIST ----


@pytest.mark.parametrize("source", ["tff", "fedjax"])
def test_emnist_train_and_test_have_the_same_clients_in_the_same_order(tmp_path, source):
    folder, train, test = emnist_folder(tmp_path, source)
    data = emnist_federated(data_dir=folder)
    assert isinstance(data, Split)
    assert list(data.train.ids) == list(data.test.ids) == sorted({*train, *test})
    assert data.train.sizes.tolist() == [2, 1, 3, 0] and data.test.sizes.tolist() == [2, 0, 3, 2]
    for part, written in ((data.train, train), (data.test, test)):
        x, y = part.arrays["x"], part.arrays["y"]
        assert x.shape[1:] == (28, 28, 1) and (x.dtype, y.dtype) == (np.float32, np.int32)
        for client, fields in written.items():
            got = part.client(client).full()[0]
            np.testing.assert_array_equal(got["x"][..., 0], 1 - fields["pixels"])
            np.testing.assert_array_equal(got["y"], fields["label"])


@pytest.mark.parametrize("source", ["tff", "fedjax"])
def test_emnist_digits_have_ten_classes(tmp_path, source):
    folder, *_ = emnist_folder(tmp_path, source)
    data = emnist_federated(only_digits=True, data_dir=folder)
    assert data.train.arrays["y"].max() == 9 and data.train.num_clients == 3


def test_both_sources_give_the_same_arrays(tmp_path):
    splits = []
    for source in ("tff", "fedjax"):
        (tmp_path / source).mkdir()
        folder, *_ = emnist_folder(tmp_path / source, source)
        splits.append(emnist_federated(data_dir=folder))
    for a, b in zip(*splits, strict=True):
        np.testing.assert_array_equal(a.arrays["x"], b.arrays["x"])
        np.testing.assert_array_equal(a.arrays["y"], b.arrays["y"])


def test_tff_comes_first_where_a_folder_holds_both_and_source_decides(tmp_path):
    files.write_tff(tmp_path / "emnist_all.sqlite", dict.fromkeys(("all_train", "all_test"), files.emnist(4)))
    for split in ("train", "test"):
        files.write_fedjax(tmp_path / f"federated_emnist_{split}.sqlite", files.emnist(5, sizes=(9,)))
    assert emnist_federated(data_dir=tmp_path).train.num_examples == 6
    assert emnist_federated(data_dir=tmp_path, source="fedjax").train.num_examples == 9
    with pytest.raises(ValueError, match="source must be 'tff' or 'fedjax'; got 'fedjx'; did you mean"):
        emnist_federated(data_dir=tmp_path, source="fedjx")


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("label", 62, r"client 'f0000_00': example 1, field 'label': 62 is outside 0..61"),
        ("label", -1, r"example 1, field 'label': -1 is outside 0..61"),
        ("pixels", np.nan, r"client 'f0000_00': example 1, field 'pixels': nan is outside 0..1"),
        ("pixels", 1.5, r"example 1, field 'pixels': 1.5 is outside 0..1"),
        ("pixels", -np.inf, r"example 1, field 'pixels': -inf is outside 0..1"),
    ],
)
@pytest.mark.parametrize("source", ["tff", "fedjax"])
def test_values_out_of_range_are_named(tmp_path, source, where, value, message):
    clients = files.emnist()
    clients["f0000_00"][where][1:2] = value
    if source == "tff":
        splits = dict.fromkeys(("all_train", "all_test"), clients)
        path = files.write_tff(tmp_path / "emnist_all.sqlite", splits)
    else:
        for split in ("test", "train"):
            path = files.write_fedjax(tmp_path / f"federated_emnist_{split}.sqlite", clients)
    with pytest.raises(ValueError, match=message) as caught:
        emnist_federated(data_dir=tmp_path)
    assert str(path) in str(caught.value)


# ---- which clients ----


def test_clients_by_number_list_and_function(tmp_path):
    folder, *_ = emnist_folder(tmp_path, "tff")

    def ids(clients):
        return list(emnist_federated(data_dir=folder, clients=clients).train.ids)

    everyone = ids(None)
    assert ids(2) == everyone[:2]
    assert ids(["f0002_02", "f0000_00"]) == ["f0002_02", "f0000_00"]
    assert ids(np.array(everyone)[[0]]) == everyone[:1]
    assert ids(lambda known: known[1:3]) == everyone[1:3]
    drawn = ids(collecting.random_clients(3, seed=1))
    assert drawn == sorted(drawn) and set(drawn) < set(everyone)


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        (5, "clients=5, but there are 4 clients"),
        (0, "clients=0, but there are 4 clients"),
        (["f0000_00", "f000_01"], "federated EMNIST: no client 'f000_01'; did you mean 'f0001_01'"),
        (["f0000_00"] * 2, "'f0000_00' occurs more than once"),
        ([], "clients is empty"),
        ("f0000_00", "clients must be None, a number, a list of ids"),
        (True, "clients must be None, a number"),
        (1.5, "clients must be None, a number"),
        (collecting.random_clients(9), r"random_clients\(9\): there are 4 clients"),
        (["f0003_03"], "split 'all_train': none of the 1 clients has an example"),
    ],
)
def test_clients_that_do_not_exist_are_named(tmp_path, clients, message):
    folder, *_ = emnist_folder(tmp_path, "tff")
    with pytest.raises(ValueError, match=message):
        emnist_federated(data_dir=folder, clients=clients)


def test_random_clients_are_uniform():
    ids = [f"c{k}" for k in range(10)]
    counts = dict.fromkeys(ids, 0)
    for seed in range(2000):
        for client in collecting.random_clients(3, seed)(ids):
            counts[client] += 1
    # Each count is binomial(2000, 0.3): mean 600, standard deviation 20.5.
    assert all(abs(c - 600) < 4.5 * 20.5 for c in counts.values())


def test_more_than_the_memory_is_refused(tmp_path, monkeypatch):
    folder, *_ = emnist_folder(tmp_path, "tff")
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 1}.get(name, 10_000))
    with pytest.raises(ValueError, match=r"1 of 4 clients already take .* Ask for fewer: clients="):
        emnist_federated(data_dir=folder)


# ---- CIFAR-100 ----


def cifar(seed, sizes):
    rng = np.random.default_rng(seed)
    return {
        str(k): {
            "coarse_label": rng.integers(0, 20, n),
            "image": rng.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8),
            "label": rng.integers(0, 100, n),
        }
        for k, n in enumerate(sizes)
    }


@pytest.mark.parametrize("source", ["tff", "fedjax"])
def test_cifar100_has_its_own_clients_in_train_and_test(tmp_path, source):
    train, test = cifar(0, (2, 1, 2)), cifar(1, (1, 2))
    if source == "tff":
        files.write_tff(tmp_path / "cifar100.sqlite", {"train": train, "test": test})
    else:
        files.write_fedjax(tmp_path / "federated_cifar100_train.sqlite", train)
        files.write_fedjax(tmp_path / "federated_cifar100_test.sqlite", test)
    data = federated.cifar100_federated(data_dir=tmp_path)
    assert list(data.train.ids) == ["0", "1", "2"] and list(data.test.ids) == ["0", "1"]
    got = data.train.client("2").full()[0]
    np.testing.assert_array_equal(got["x"], train["2"]["image"].astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(got["y"], train["2"]["label"])
    np.testing.assert_array_equal(got["coarse"], train["2"]["coarse_label"])
    assert data.train.arrays["x"].dtype == np.float32 and data.train.arrays["y"].dtype == np.int32
    some = federated.cifar100_federated(data_dir=tmp_path, clients={"train": ["2"], "test": 1})
    assert (list(some.train.ids), list(some.test.ids)) == (["2"], ["0"])


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ({"train": 1, "tst": 1}, "no split 'tst'; did you mean 'test'"),
        ({"train": 1}, "split 'test' is missing"),
        (["2"], r"none of these clients is in test, .* clients=\{'train': ..., 'test': ...\}"),
        (["7"], "no client '7'"),
        (3, "federated CIFAR-100, test: clients=3, but there are 2 clients"),
    ],
)
def test_clients_of_splits_are_checked_split_by_split(tmp_path, clients, message):
    splits = {"train": cifar(0, (1, 1, 1)), "test": cifar(1, (1, 1))}
    files.write_tff(tmp_path / "cifar100.sqlite", splits)
    with pytest.raises(ValueError, match=message):
        federated.cifar100_federated(data_dir=tmp_path, clients=clients)


@pytest.mark.parametrize(("field", "bad"), [("label", 100), ("coarse_label", 20), ("image", 256)])
def test_cifar100_values_out_of_range_are_named(tmp_path, field, bad):
    train = cifar(0, (2,))
    train["0"][field] = train["0"][field].astype(np.int64)
    train["0"][field][1] = bad
    files.write_tff(tmp_path / "cifar100.sqlite", {"train": train, "test": cifar(1, (1,))})
    with pytest.raises(ValueError, match=f"'0': example 1, field '{field}': {bad} is outside"):
        federated.cifar100_federated(data_dir=tmp_path)


# ---- Shakespeare ----


@pytest.mark.parametrize("source", ["tff", "fedjax"])
def test_shakespeare_predicts_the_next_character(tmp_path, source):
    speeches = {"HAMLET": ["To be, or not to be" * 9, "Words."], "GHOST": ["Mark me."]}
    clients = {k: {"snippets": files.strings(*v)} for k, v in speeches.items()}
    if source == "tff":
        tff = {k: {"snippets": [s.encode() for s in v]} for k, v in speeches.items()}
        files.write_tff(tmp_path / "shakespeare.sqlite", {"train": tff, "test": {"GHOST": tff["GHOST"]}})
    else:
        files.write_fedjax(tmp_path / "shakespeare_train.sqlite", clients)
        files.write_fedjax(tmp_path / "shakespeare_test.sqlite", {"GHOST": clients["GHOST"]})
    data = federated.shakespeare_federated(data_dir=tmp_path)
    assert list(data.train.ids) == list(data.test.ids) == ["GHOST", "HAMLET"]
    assert data.train.sizes.tolist() == [1, 3] and data.test.sizes.tolist() == [1, 0]
    x, y = data.train.arrays["x"], data.train.arrays["y"]
    assert x.shape == y.shape == (4, 80) and x.dtype == y.dtype == np.int32
    read = text.char_vocabulary().names(y[0][:9])
    assert read == [*"Mark me.", "<eos>"] and (y[0][9:] == 0).all()
    # Hamlet: bos, 171 characters, eos, bos, 6 characters, eos; all but the first are predicted.
    x, y = x[1:].ravel(), y[1:].ravel()
    np.testing.assert_array_equal(x[1:180], y[:179])
    assert (y[:180] > 0).all() and (y[180:] == 0).all() and (x[180:] == 0).all() and y[179] == 2


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


# ---- where files are looked for ----


def test_files_are_found_in_subfolders_in_the_environments_folder_and_in_the_cache(tmp_path, monkeypatch):
    for root in ("given", "set", "home/.cache/fedjax_lab"):
        (tmp_path / root / "emnist").mkdir(parents=True)
    emnist_folder(tmp_path / "given" / "emnist", "fedjax")
    assert emnist_federated(data_dir=tmp_path / "given").train.num_clients == 4
    with pytest.raises(FileNotFoundError):
        emnist_federated()
    emnist_folder(tmp_path / "home" / ".cache" / "fedjax_lab" / "emnist", "tff")
    assert emnist_federated(clients=1).train.num_clients == 1
    monkeypatch.setenv("FEDJAX_LAB_DATA", str(tmp_path / "set"))
    assert emnist_federated(clients=1).train.num_clients == 1
    files.write_tff(
        tmp_path / "set" / "emnist" / "emnist_all.sqlite",
        dict.fromkeys(("all_train", "all_test"), files.emnist(sizes=(5,))),
    )
    assert emnist_federated().train.num_examples == 5


@pytest.mark.parametrize(
    ("call", "file", "address"),
    [
        (emnist_federated, "emnist", "tff-datasets-public/emnist_all.sqlite.lzma"),
        (emnist_federated, "emnist", "fedjax/emnist/federated_emnist_train.sqlite"),
        (federated.cifar100_federated, "cifar100", "tff-datasets-public/cifar100.sqlite.lzma"),
        (
            federated.shakespeare_federated,
            "shakespeare",
            "fedjax/shakespeare/shakespeare_test.sqlite",
        ),
        (stackoverflow_federated, "stackoverflow", "stackoverflow.word_count.tar.bz2"),
    ],
)
def test_what_can_not_be_downloaded_says_how_to_supply_it(tmp_path, call, file, address):
    with pytest.raises(FileNotFoundError) as caught:
        call(data_dir=tmp_path)
    message = str(caught.value)
    assert "no network in this test" in message
    for part in (str(tmp_path / file), "FEDJAX_LAB_DATA", "data_dir", address):
        assert part in message
    assert list(tmp_path.iterdir()) == []


def test_a_set_that_is_only_half_there_asks_for_the_other_half(tmp_path):
    files.write_fedjax(tmp_path / "federated_emnist_train.sqlite", files.emnist())
    with pytest.raises(FileNotFoundError, match=r"federated_emnist_test.sqlite: no network"):
        emnist_federated(data_dir=tmp_path)
    files.write_fedjax(tmp_path / "federated_cifar100_test.sqlite", cifar(0, (1,)))
    with pytest.raises(FileNotFoundError, match=r"cifar100_train.sqlite is not offered for download"):
        federated.cifar100_federated(data_dir=tmp_path)


def test_a_file_as_data_dir_is_refused(tmp_path):
    path = tmp_path / "emnist_all.sqlite"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"emnist_all.sqlite is a file"):
        emnist_federated(data_dir=path)


def test_a_packed_file_is_unpacked_once_and_its_change_is_found(tmp_path):
    folder, *_ = emnist_folder(tmp_path, "tff")
    path = folder / "emnist_all.sqlite"
    files.write_lzma(folder / "emnist_all.sqlite.lzma", path)
    assert emnist_federated(data_dir=folder).train.num_clients == 4
    assert (folder / "emnist_all.sqlite.lzma").exists()  # the user's own file stays
    assert stored_files.verify(path) == stored_files.digest_of(path)
    first = path.stat().st_mtime_ns
    emnist_federated(data_dir=folder)
    assert path.stat().st_mtime_ns == first
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"emnist_all.sqlite: truncated or altered since"):
        emnist_federated(data_dir=folder)
