"""Images by name: scikit-learn's digits, MNIST, and four more from tensorflow-datasets."""

import os
import pathlib

import numpy as np

from fedjax_lab import checks
from fedjax_lab.data import Split
from fedjax_lab.datasets import download, idx, stored_files, tfds_reader
from fedjax_lab.datasets.assemble import to_split
from fedjax_lab.datasets.partition import Partition, dirichlet, iid

_MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_MNIST_FILES = {  # SHA-256 as tensorflow-datasets publishes them
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}


def digits(partition: Partition | None = None, seed: int = 0, *, test_fraction: float = 0.2) -> Split:
    """1,797 handwritten digits of 8 x 8 pixels, which come with scikit-learn: nothing is downloaded.

    All rows are partitioned, and then each client's own are split.

    Args:
      partition: a partitioner; by default ``dirichlet(num_clients=100, alpha=0.3)``, some 18
        digits a client, of 4 kinds on average.
      seed: of the partition and of the split.
      test_fraction: the share of each client's rows that is kept for testing.

    Returns:
      ``Split(train, test)``: ``x: float32[64]`` in [0, 1], ``y: int32``, the digit.
    """
    checks.shares(test_fraction)
    bunch = checks.optional("sklearn.datasets", "the digits data set").load_digits()
    columns = {
        "x": np.divide(bunch.data, 16.0, dtype=np.float64).astype(np.float32),
        "y": bunch.target.astype(np.int32),
    }
    partition = partition or dirichlet(num_clients=100, alpha=0.3)
    return to_split(columns, None, partition, seed, test_fraction)


def mnist(
    partition: Partition | None = None,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
    *,
    test_fraction: float | None = None,
) -> Split:
    """MNIST: 60,000 handwritten digits to train and 10,000 to test.

    The four idx files are taken from ``data_dir``, or from FEDJAX_LAB_DATA or
    ``~/.cache/fedjax_lab`` (or a folder ``mnist`` in them). Where they aren't, MNIST comes from
    tensorflow-datasets if that has it prepared or can prepare it (which needs TensorFlow), and else
    the idx files are downloaded.

    Args:
      partition: a partitioner; by default ``iid(100)``, 600 digits a client.
      seed: of the partition.
      data_dir: a folder with the idx files, gzipped or not, or with ``mnist`` as
        tensorflow-datasets prepared it.
      test_fraction: by default the official test rows are divided so that each client's test labels
        are distributed as its training labels. A number pools the 70,000 rows instead, and
        keeps this share of each client's for testing (as FedProx and pFedMe do).

    Returns:
      ``Split(train, test)``: ``x: float32[28, 28, 1]`` in [0, 1], ``y: int32``, the digit.

    Raises:
      FileNotFoundError: it is nowhere and can't be downloaded; with the ways to supply it.
      ValueError: a damaged file, with its name and what is damaged: header, images or labels.
    """
    partition = partition or iid(100)
    folders = stored_files.data_folders(data_dir, "mnist")
    files = idx.find(folders)
    if files is None:
        if tfds_reader.available("mnist", data_dir):
            return tfds_reader.from_tfds("mnist", partition, seed, data_dir, test_fraction=test_fraction)
        files = _download_mnist(folders)
    train, test = (_digits_of(*files[split]) for split in ("train", "test"))
    return to_split(train, test, partition, seed, test_fraction)


def _digits_of(images: pathlib.Path, labels: pathlib.Path) -> dict[str, np.ndarray]:
    raw = idx.read_images(images, labels)
    if raw["x"].shape[1:] != (28, 28):
        raise ValueError(f"{images}: the header gives images of {raw['x'].shape[1:]}, not (28, 28)")
    wrong = np.flatnonzero(raw["y"] > 9)
    if len(wrong):
        raise ValueError(f"{labels}: the labels are damaged: row {wrong[0]} is {raw['y'][wrong[0]]}, not a digit")
    x = np.divide(raw["x"], np.float32(255))[..., None]
    return {"x": x, "y": raw["y"].astype(np.int32)}


def _download_mnist(folders: list[pathlib.Path]) -> dict:
    folder = stored_files.writable(folders)
    try:
        for name, digest in _MNIST_FILES.items():
            if not (folder / name).is_file():
                download.fetch(_MNIST + name, folder / name, sha256=digest)
    except (ConnectionError, OSError) as error:
        raise FileNotFoundError(
            f"MNIST is in none of the folders {', '.join(map(str, folders))}, and could not be "
            f"downloaded ({error}). Ways to supply it:\n"
            f"  - put the idx files {', '.join(_MNIST_FILES)} (gzipped or not) in a folder and pass "
            "data_dir=FOLDER, or set FEDJAX_LAB_DATA to it;\n"
            "  - pass data_dir=DIR with MNIST as tensorflow-datasets prepares it: tfds build mnist "
            "--file_format=array_record --data_dir=DIR;\n"
            f"  - get online: they are fetched from {_MNIST}."
        ) from error
    files = idx.find([folder])
    assert files is not None
    return files


def fashion_mnist(
    partition: Partition | None = None,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
    **options,
) -> Split:
    """Fashion-MNIST, 70,000 photographs of clothes, ``x: float32[28, 28, 1]``, 10 classes.

    Arguments, result and errors as of :func:`from_tfds`.
    """
    return tfds_reader.from_tfds("fashion_mnist", partition, seed, data_dir, **options)


def emnist(
    partition: Partition | None = None,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
    *,
    config: str = "balanced",
    **options,
) -> Split:
    """EMNIST, handwritten digits and letters, ``x: float32[28, 28, 1]``, upright.

    Centrally stored; the writers are known in ``fl.datasets.emnist_federated``.

    Args:
      config: ``"balanced"`` (131,600 images, 47 classes), ``"byclass"``, ``"bymerge"``,
        ``"letters"``, ``"digits"`` or ``"mnist"``.
      partition, seed, data_dir, options: as of :func:`from_tfds`.
    """
    return tfds_reader.from_tfds(f"emnist/{config}", partition, seed, data_dir, transform=_upright, **options)


def _upright(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    # EMNIST's files hold images column after column.
    return columns | {"x": columns["x"].swapaxes(1, 2)}


def cifar10(
    partition: Partition | None = None,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
    **options,
) -> Split:
    """CIFAR-10, 60,000 photographs, ``x: float32[32, 32, 3]``, 10 classes; see :func:`from_tfds`."""
    return tfds_reader.from_tfds("cifar10", partition, seed, data_dir, **options)


def cifar100(
    partition: Partition | None = None,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
    **options,
) -> Split:
    """CIFAR-100, 60,000 photographs, ``x: float32[32, 32, 3]``, 100 classes in 20 coarse ones.

    Keeps ``coarse_label: int32`` beside ``y``: ``partition=pachinko(500)`` divides along it. Other
    arguments, result and errors as of :func:`from_tfds`.
    """
    return tfds_reader.from_tfds("cifar100", partition, seed, data_dir, **options)
