"""The federated sets by name, from tiny files in both published formats."""

import numpy as np
import pytest

from fedjax_lab.data import Split
from fedjax_lab.datasets import collecting, federated, stackoverflow, text
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


# ---- EMNIST ----


@pytest.mark.parametrize("source", ["tff", "fedjax"])
def test_emnist_train_and_test_have_the_same_clients_in_the_same_order(tmp_path, source):
    folder, train, test = files.emnist_folder(tmp_path, source)
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
    folder, *_ = files.emnist_folder(tmp_path, source)
    data = emnist_federated(only_digits=True, data_dir=folder)
    assert data.train.arrays["y"].max() == 9 and data.train.num_clients == 3


def test_both_sources_give_the_same_arrays(tmp_path):
    splits = []
    for source in ("tff", "fedjax"):
        (tmp_path / source).mkdir()
        folder, *_ = files.emnist_folder(tmp_path / source, source)
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
    folder, *_ = files.emnist_folder(tmp_path, "tff")

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
    folder, *_ = files.emnist_folder(tmp_path, "tff")
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
    folder, *_ = files.emnist_folder(tmp_path, "tff")
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 1}.get(name, 10_000))
    with pytest.raises(ValueError, match=r"1 of 4 clients already take .* Ask for fewer: clients="):
        emnist_federated(data_dir=folder)


# ---- CIFAR-100 ----


@pytest.mark.parametrize("source", ["tff", "fedjax"])
def test_cifar100_has_its_own_clients_in_train_and_test(tmp_path, source):
    train, test = files.cifar(0, (2, 1, 2)), files.cifar(1, (1, 2))
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
    splits = {"train": files.cifar(0, (1, 1, 1)), "test": files.cifar(1, (1, 1))}
    files.write_tff(tmp_path / "cifar100.sqlite", splits)
    with pytest.raises(ValueError, match=message):
        federated.cifar100_federated(data_dir=tmp_path, clients=clients)


@pytest.mark.parametrize(("field", "bad"), [("label", 100), ("coarse_label", 20), ("image", 256)])
def test_cifar100_values_out_of_range_are_named(tmp_path, field, bad):
    train = files.cifar(0, (2,))
    train["0"][field] = train["0"][field].astype(np.int64)
    train["0"][field][1] = bad
    files.write_tff(tmp_path / "cifar100.sqlite", {"train": train, "test": files.cifar(1, (1,))})
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
