"""Digits and MNIST: contents, the idx format byte by byte, and what a user without data is told."""

import gzip
import struct

import numpy as np
import pytest

import fedjax_lab as fl
from fedjax_lab.datasets import download, idx, images, tfds_reader
from tests.damage import flips, outcomes, truncations

NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def _bytes(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def _write(folder, name, array, packed=True):
    content = _bytes(array)
    path = folder / (name + (".gz" if packed else ""))
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return path


@pytest.fixture
def small_mnist(tmp_path):
    """40 train and 20 test images; image i is filled with the byte i."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for split, count in (("train", 40), ("test", 20)):
        x = np.broadcast_to(np.arange(count)[:, None, None], (count, 28, 28))
        _write(folder, NAMES[split][0], x)
        _write(folder, NAMES[split][1], np.arange(count) % 10)
    return tmp_path


# ---- digits ----


def test_digits_are_scikit_learns():
    sklearn = pytest.importorskip("sklearn.datasets").load_digits()
    split = fl.datasets.digits()
    assert split.train.num_clients == 100 and split.train.sizes.min() >= 1 and split.test.sizes.min() >= 1
    x = np.concatenate([part.arrays["x"] for part in split])
    y = np.concatenate([part.arrays["y"] for part in split])
    assert x.dtype == np.float32 and x.min() == 0 and x.max() == 1 and y.dtype == np.int32
    ours = sorted(map(tuple, np.column_stack([x * 16, y]).astype(int).tolist()))
    theirs = sorted(map(tuple, np.column_stack([sklearn.data, sklearn.target]).astype(int).tolist()))
    assert ours == theirs  # every digit once, none twice


def test_digits_take_any_partition():
    split = fl.datasets.digits(fl.datasets.iid(10), seed=1, test_fraction=0.5)
    sizes = np.asarray(split.train.sizes) + np.asarray(split.test.sizes)
    assert set(sizes) == {179, 180} and abs(split.train.num_examples - 898) < 10
    by_hand = fl.datasets.digits(lambda columns, seed: np.arange(1797) % 3)
    assert by_hand.train.num_clients == 3


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        (lambda columns, seed: np.zeros(3, int), r"integers of shape \(1797,\)"),
        (lambda columns, seed: np.zeros(1797), "got float64"),
        (lambda columns, seed: np.full(1797, -1), "not every row"),
        (lambda columns, seed: np.full(1797, -2), "-1 leaves a row out"),
    ],
)
def test_a_users_own_partition_is_checked(partition, message):
    with pytest.raises(ValueError, match=message):
        fl.datasets.digits(partition)


# ---- MNIST from idx files ----


def test_mnist_from_idx_files(small_mnist):
    for data_dir in (small_mnist, small_mnist / "mnist", str(small_mnist)):
        split = fl.datasets.mnist(fl.datasets.iid(4), data_dir=data_dir)
        assert split.train.num_examples == 40 and split.test.num_examples == 20
        x, y = split.train.arrays["x"], split.train.arrays["y"]
        assert x.shape == (40, 28, 28, 1) and x.dtype == np.float32 and y.dtype == np.int32
        pixels = np.round(x * 255).astype(int)
        np.testing.assert_array_equal(pixels.reshape(40, -1).max(1) % 10, y)
        np.testing.assert_array_equal(pixels.reshape(40, -1).min(1), pixels.reshape(40, -1).max(1))


def test_mnist_from_the_environments_folder(small_mnist, monkeypatch):
    monkeypatch.setenv("FEDJAX_LAB_DATA", str(small_mnist))
    assert fl.datasets.mnist(fl.datasets.iid(4)).train.num_examples == 40


def test_mnist_unpacked_and_in_the_other_spelling(tmp_path):
    for split, count in (("train", 30), ("test", 10)):
        image, label = (name.replace("-idx", ".idx") for name in NAMES[split])
        _write(tmp_path, image, np.zeros((count, 28, 28)), packed=False)
        _write(tmp_path, label, np.arange(count) % 10, packed=False)
    assert fl.datasets.mnist(fl.datasets.iid(3), data_dir=tmp_path).test.num_examples == 10


def test_test_rows_go_where_their_labels_are(small_mnist):
    split = fl.datasets.mnist(fl.datasets.by_attribute("y"), data_dir=small_mnist)
    for client in range(10):
        for part in split:
            data, mask = part.client(client).full()
            assert set(np.asarray(data["y"])[np.asarray(mask)]) == {client}


def test_pooled_mnist_splits_inside_each_client(small_mnist):
    split = fl.datasets.mnist(fl.datasets.iid(6), data_dir=small_mnist, test_fraction=0.1)
    assert (np.asarray(split.train.sizes) == 9).all() and (np.asarray(split.test.sizes) == 1).all()


@pytest.mark.parametrize(("which", "field"), [(0, "images"), (1, "labels")])
def test_50_truncations_of_each_gzipped_file_are_named(small_mnist, which, field):
    path = small_mnist / "mnist" / (NAMES["train"][which] + ".gz")
    copies = truncations(path.read_bytes())
    seen = set()
    for what, error in outcomes(path, copies, lambda: fl.datasets.mnist(data_dir=small_mnist)):
        assert isinstance(error, ValueError), what
        assert str(path) in str(error), what
        seen |= {word for word in ("header", field) if f"the {word}" in str(error)}
        assert f"the {field}" in str(error) or "the header" in str(error), what
    assert seen == {"header", field}


@pytest.mark.parametrize(("which", "field"), [(0, "images"), (1, "labels")])
def test_every_flip_of_a_gzipped_file_is_named_or_harmless(small_mnist, which, field):
    # Gzip's checksum covers the content. A flip leaves the same data in the header's time stamp, text
    # flag and operating system, and in the few unused bits that fill up the last byte of the stream.
    path = small_mnist / "mnist" / (NAMES["train"][which] + ".gz")
    content = path.read_bytes()
    read = lambda: fl.datasets.mnist(fl.datasets.iid(4), data_dir=small_mnist).train.arrays["x"].tobytes()
    intact = read()
    named = 0
    for what, result in outcomes(path, flips(content, 150), read):
        if isinstance(result, ValueError):
            named += 1
            assert str(path) in str(result), what
            assert f"the {field}" in str(result) or "the header" in str(result), what
        else:
            assert result == intact, what
    assert named > 100


def test_50_truncations_of_an_unpacked_file_are_named(tmp_path):
    path = _write(tmp_path, "images", np.ones((5, 4, 3)), packed=False)
    for what, error in outcomes(path, truncations(path.read_bytes()), lambda: idx.read_idx(path, "images", 3)):
        assert isinstance(error, ValueError) and str(path) in str(error), what
        assert "header" in str(error) or "the images are cut off" in str(error), what


def test_a_flip_in_the_header_of_an_unpacked_file_is_named(tmp_path):
    # A flip behind the header is another image, and nothing in the format tells: see idx.py.
    path = _write(tmp_path, "images", np.ones((5, 4, 3)), packed=False)
    content = path.read_bytes()
    copies = [
        (f"bit {bit} of {i}", content[:i] + bytes([content[i] ^ 1 << bit]) + content[i + 1 :])
        for i in range(16)
        for bit in range(8)
    ]
    for what, error in outcomes(path, copies, lambda: idx.read_idx(path, "images", 3)):
        assert isinstance(error, ValueError) and f"{path}: the" in str(error) and "header" in str(error), what


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: _write(f, NAMES["train"][1], np.full(40, 57)), "labels are damaged: row 0 is 57"),
        (lambda f: _write(f, NAMES["train"][1], np.zeros(39)), "counts 39 labels, but .* 40 images"),
        (lambda f: _write(f, NAMES["train"][0], np.zeros((40, 27, 28))), r"images of \(27, 28\)"),
        (lambda f: _write(f, NAMES["train"][0], np.zeros((40, 784))), "header begins with 00000802"),
        (lambda f: _write(f, NAMES["test"][0], np.zeros((0, 28, 28))), "there are no images"),
        (lambda f: (f / (NAMES["train"][0] + ".gz")).write_bytes(b"<html>no</html>"), "this is no gzip file"),
        (
            lambda f: (f / (NAMES["train"][0] + ".gz")).write_bytes(
                gzip.compress(_bytes(np.zeros((40, 28, 28))) + b"x")
            ),
            "too long",
        ),
    ],
)
def test_inconsistent_files_are_named(small_mnist, damage, message):
    damage(small_mnist / "mnist")
    with pytest.raises(ValueError, match=message):
        fl.datasets.mnist(data_dir=small_mnist)


def test_without_files_or_network_the_ways_are_listed(tmp_path, monkeypatch):
    def refuse(url, target, **options):
        raise ConnectionError(f"{url}: no network")

    monkeypatch.setattr(download, "fetch", refuse)
    monkeypatch.setattr(tfds_reader, "available", lambda name, data_dir: False)
    with pytest.raises(FileNotFoundError) as error:
        fl.datasets.mnist(data_dir=tmp_path)
    for part in (
        str(tmp_path),
        "train-images-idx3-ubyte.gz",
        "data_dir=",
        "FEDJAX_LAB_DATA",
        "tfds build",
        "no network",
    ):
        assert part in str(error.value)
    assert not list(tmp_path.rglob("*.gz"))


def test_missing_files_are_downloaded_with_their_digests(small_mnist, tmp_path, monkeypatch):
    target, fetched = tmp_path / "empty", {}
    target.mkdir()

    def fetch(url, path, *, sha256):
        fetched[url] = sha256
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((small_mnist / "mnist" / path.name).read_bytes())

    monkeypatch.setattr(download, "fetch", fetch)
    monkeypatch.setattr(tfds_reader, "available", lambda name, data_dir: False)
    assert fl.datasets.mnist(fl.datasets.iid(4), data_dir=target).train.num_examples == 40
    assert len(fetched) == 4 and all(len(digest) == 64 for digest in fetched.values())
    assert all(url.startswith(images._MNIST) for url in fetched)


def test_the_real_mnist(data_dir):
    split = fl.datasets.mnist(fl.datasets.shards(100), data_dir=data_dir)
    assert (np.asarray(split.train.sizes) == 600).all() and split.test.num_examples == 10_000
    # The published counts of each digit in the training set.
    np.testing.assert_array_equal(
        np.bincount(split.train.arrays["y"]), [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    )
    assert abs(split.train.arrays["x"].mean(dtype=np.float64) - 0.1307) < 1e-4  # and its mean
    assert split.train.describe()["labels_per_client"] < 2.3
