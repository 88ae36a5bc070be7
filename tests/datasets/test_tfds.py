"""tensorflow-datasets without TensorFlow: real ArrayRecord files, prepared here in its own format."""

import importlib.util
import io
import json
import socket

import numpy as np
import pytest

import fedjax_lab as fl
from fedjax_lab import checks
from fedjax_lab.datasets import tfds_reader
from tests.damage import flips, outcomes, truncations

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")
NO_TENSORFLOW = importlib.util.find_spec("tensorflow") is None


def _prepare(folder, name, features, splits, supervised=("image", "label"), version="1.0.0", config=None):
    """Write a data set as tensorflow-datasets does; ``splits`` maps names to lists of examples."""

    def generate(examples):
        yield from enumerate(examples)

    with tfds.core.registered.skip_registration():

        class Prepared(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version(version)
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=supervised
                )

            def _split_generators(self, manager):
                return {split: generate(examples) for split, examples in splits.items()}

            def _generate_examples(self):
                raise NotImplementedError

        Prepared.name = name
        Prepared(data_dir=str(folder), file_format="array_record").download_and_prepare()


IMAGES = {
    "image": tfds.features.Tensor(shape=(4, 4, 1), dtype=np.uint8),
    "label": tfds.features.ClassLabel(num_classes=4),
    "coarse_label": tfds.features.ClassLabel(num_classes=2),
    "id": tfds.features.Text(),
}


def _example(i):
    return {"image": np.full((4, 4, 1), i, np.uint8), "label": i % 4, "coarse_label": i % 4 // 2, "id": f"n{i}"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    splits = {"train": [_example(i) for i in range(40)], "test": [_example(i) for i in range(40, 60)]}
    _prepare(folder, "tiny", IMAGES, splits)
    return folder


def test_a_prepared_set_becomes_a_split(prepared):
    split = fl.datasets.from_tfds("tiny", fl.datasets.iid(5), data_dir=prepared)
    assert (np.asarray(split.train.sizes) == 8).all() and split.test.num_examples == 20
    for part, numbers in ((split.train, range(40)), (split.test, range(40, 60))):
        x, y = part.arrays["x"], part.arrays["y"]
        assert x.shape[1:] == (4, 4, 1) and x.dtype == np.float32 and y.dtype == np.int32
        shown = np.round(x[:, 0, 0, 0] * 255).astype(int)
        assert sorted(shown) == list(numbers)
        np.testing.assert_array_equal(shown % 4, y)
        np.testing.assert_array_equal(part.arrays["coarse_label"], y // 2)
        assert set(part.arrays) == {"x", "y", "coarse_label"}


@pytest.mark.skipif(not NO_TENSORFLOW, reason="TensorFlow is installed here")
def test_nothing_here_needs_tensorflow(prepared):
    import sys

    fl.datasets.from_tfds("tiny", fl.datasets.iid(5), data_dir=prepared)
    assert "tensorflow" not in sys.modules


def test_pachinko_follows_the_coarse_labels_that_are_kept(prepared):
    split = fl.datasets.from_tfds("tiny", fl.datasets.pachinko(4, 1e-6, size=5), data_dir=prepared)
    data, mask = split.train.client(0).full()
    assert len(set(np.asarray(data["coarse_label"])[np.asarray(mask)])) == 1


def test_pooled_and_without_a_test_split(prepared, tmp_path):
    split = fl.datasets.from_tfds("tiny", fl.datasets.iid(6), data_dir=prepared, test_fraction=0.5)
    assert (np.asarray(split.train.sizes) == 5).all() and (np.asarray(split.test.sizes) == 5).all()
    _prepare(tmp_path, "tiny_train", IMAGES, {"train": [_example(i) for i in range(40)]})
    split = fl.datasets.from_tfds("tiny_train", fl.datasets.iid(4), data_dir=tmp_path)
    assert split.train.num_examples == 32 and split.test.num_examples == 8


def test_numeric_features_are_joined_by_name(tmp_path):
    features = {
        "features": {"width": np.float32, "age": np.int64},
        "price": np.float32,
        "score": np.int64,
    }
    rows = [{"features": {"width": i / 2, "age": i}, "price": i / 4, "score": i} for i in range(10)]
    _prepare(tmp_path, "tabular", features, {"train": rows}, supervised=None)
    with pytest.raises(ValueError, match="does not say which feature is x; give x="):
        fl.datasets.from_tfds("tabular", data_dir=tmp_path)
    options = {"x": "features", "y": "price", "data_dir": tmp_path}
    split = fl.datasets.from_tfds("tabular", fl.datasets.iid(2), **options)
    assert split.train.arrays["y"].dtype == np.float32
    x = np.concatenate([part.arrays["x"] for part in split])
    np.testing.assert_allclose(x[:, 1], x[:, 0] / 2)  # age, width
    with pytest.raises(ValueError, match=r"no feature 'prize' among .*did you mean 'price'"):
        fl.datasets.from_tfds("tabular", **(options | {"y": "prize"}))


def test_features_that_do_not_fit_are_named(tmp_path):
    text = {"image": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=2)}
    _prepare(tmp_path, "words", text, {"train": [{"image": "a", "label": 0}]})
    with pytest.raises(ValueError, match="words, split 'train', feature 'image' holds text"):
        fl.datasets.from_tfds("words", data_dir=tmp_path)
    ragged = {**text, "image": tfds.features.Tensor(shape=(None, 2, 1), dtype=np.uint8)}
    rows = [{"image": np.zeros((n, 2, 1), np.uint8), "label": 0} for n in (2, 3)]
    _prepare(tmp_path, "ragged", ragged, {"train": rows})
    with pytest.raises(ValueError, match="feature 'image' has examples of different shapes"):
        fl.datasets.from_tfds("ragged", data_dir=tmp_path)
    unlabelled = [{"image": np.zeros((2, 2, 1), np.uint8), "label": -1}]
    _prepare(tmp_path, "unlabelled", ragged, {"train": unlabelled})
    with pytest.raises(ValueError, match="label 'label' of example 0 is -1: unlabelled"):
        fl.datasets.from_tfds("unlabelled", data_dir=tmp_path)


def _png(pixels):
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _prepare_images(folder, name, shape, count=24, config=None, coarse=False):
    """A stand-in for a known image set: the same name, version and features, few examples."""
    version = str(tfds.builder(f"{name}/{config}" if config else name, data_dir=str(folder)).version)
    features = {
        "image": tfds.features.Image(shape=shape),
        "label": tfds.features.ClassLabel(num_classes=10),
    } | ({"coarse_label": tfds.features.ClassLabel(num_classes=5)} if coarse else {})
    pixels = np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)
    extra = lambda i: {"coarse_label": i % 10 // 2} if coarse else {}
    rows = [{"image": _png(pixels.squeeze()), "label": i % 10} | extra(i) for i in range(count)]
    _prepare(folder, name, features, {"train": rows, "test": rows[:8]}, version=version, config=config)
    return pixels.astype(np.float32) / 255


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("fashion_mnist", (28, 28, 1), {}),
        ("cifar10", (32, 32, 3), {}),
        ("cifar100", (32, 32, 3), {"coarse": True}),
        ("emnist", (28, 28, 1), {"config": "balanced"}),
        ("mnist", (28, 28, 1), {}),
    ],
)
def test_the_named_image_sets_decode_their_images(tmp_path, name, shape, options):
    pixels = _prepare_images(tmp_path, name, shape, **options)
    split = getattr(fl.datasets, name)(fl.datasets.iid(4), data_dir=tmp_path)
    expected = pixels.swapaxes(0, 1) if name == "emnist" else pixels  # stored column by column
    np.testing.assert_allclose(split.train.arrays["x"][0], expected, atol=1e-7)
    assert split.train.num_examples == 24 and split.test.num_examples == 8
    if "coarse" in options:
        np.testing.assert_array_equal(split.train.arrays["coarse_label"], split.train.arrays["y"] // 2)


def test_a_set_in_the_environments_folder_is_found(prepared, monkeypatch):
    monkeypatch.setenv("FEDJAX_LAB_DATA", str(prepared))
    assert fl.datasets.from_tfds("tiny", fl.datasets.iid(5)).train.num_examples == 40


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"no data set 'fashion_mnst'.*did you mean 'fashion_mnist'"):
        fl.datasets.from_tfds("fashion_mnst", data_dir=tmp_path)
    with pytest.raises(ValueError, match="tensorflow-datasets refuses 'emnist/ballanced'"):
        fl.datasets.emnist(config="ballanced", data_dir=tmp_path)


@pytest.mark.skipif(not NO_TENSORFLOW, reason="TensorFlow is installed here")
def test_what_cannot_be_prepared_here_is_answered_with_the_ways(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        fl.datasets.cifar10(data_dir=tmp_path)
    ways = ("cifar10", str(tmp_path), "TensorFlow is not installed", "pip install tensorflow", "data_dir=DIR")
    assert all(way in str(error.value) for way in ways)
    assert "tfds build cifar10 --file_format=array_record --data_dir=DIR" in str(error.value)


def test_without_a_network_nothing_is_tried_for_minutes(tmp_path, monkeypatch):
    def refuse(host, port):
        raise socket.gaierror(f"no {host}")

    monkeypatch.setattr(tfds_reader, "_has_tensorflow", lambda: True)
    monkeypatch.setattr(tfds_reader.socket, "getaddrinfo", refuse)
    monkeypatch.setattr(tfds_reader.urllib.request, "getproxies", dict)
    with pytest.raises(FileNotFoundError, match="there is no network"):
        fl.datasets.cifar100(data_dir=tmp_path)


def test_a_failed_download_is_answered_with_the_ways(tmp_path, monkeypatch):
    def fail(self, **options):
        raise ConnectionError("the host hung up")

    monkeypatch.setattr(tfds_reader, "_has_tensorflow", lambda: True)
    monkeypatch.setattr(tfds_reader, "_offline", lambda builder: False)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(FileNotFoundError, match="ConnectionError: the host hung up") as error:
        fl.datasets.from_tfds("mnist", data_dir=tmp_path)
    assert "idx files" in str(error.value)


def test_files_in_tensorflows_format_are_refused_with_the_command(prepared, tmp_path):
    import shutil

    shutil.copytree(prepared / "tiny", tmp_path / "tiny")
    info = tmp_path / "tiny" / "1.0.0" / "dataset_info.json"
    content = json.loads(info.read_text())
    info.write_text(json.dumps(content | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match=r"as tfrecord, which needs TensorFlow.*--file_format=array_record"):
        fl.datasets.from_tfds("tiny", data_dir=tmp_path)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    def refuse(module, purpose, extra="data"):
        raise ImportError(f"{purpose} needs {module}: pip install 'fedjax-lab[{extra}]'")

    monkeypatch.setattr(checks, "optional", refuse)
    with pytest.raises(ImportError, match=r"'mnist' needs tensorflow_datasets: pip install 'fedjax-lab\[data\]'"):
        fl.datasets.from_tfds("mnist")


def test_50_flips_and_truncations_are_named_or_harmless(prepared, tmp_path):
    # ArrayRecord files are padded to 64 KiB blocks; a flip in the padding changes nothing.
    import shutil

    shutil.copytree(prepared / "tiny", tmp_path / "tiny")
    path = next((tmp_path / "tiny" / "1.0.0").glob("tiny-train*"))
    read = lambda: fl.datasets.from_tfds("tiny", fl.datasets.iid(1), data_dir=tmp_path).train.arrays
    intact, named = read(), 0
    for copies in (truncations(path.read_bytes()), flips(path.read_bytes())):
        for what, result in outcomes(path, copies, read):
            if isinstance(result, ValueError):
                named += 1
                assert str(tmp_path) in str(result) and "tiny" in str(result), what
            else:
                assert all((result[n] == intact[n]).all() for n in intact), what
    assert named > 30
