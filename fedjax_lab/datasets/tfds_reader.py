"""Any classification data set of tensorflow-datasets, read without TensorFlow.

``tfds.data_source`` reads ArrayRecord files with NumPy alone. *Preparing* a data set (download,
encode, write) is another matter: for images it needs TensorFlow, once, here or on another machine.
"""

import importlib.util
import os
import pathlib
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np

from fedjax_lab import checks
from fedjax_lab.data import Split
from fedjax_lab.datasets.assemble import to_split
from fedjax_lab.datasets.partition import Partition, iid

Columns = dict[str, np.ndarray]


def from_tfds(
    name: str,
    partition: Partition | None = None,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
    *,
    test_fraction: float | None = None,
    x: str | None = None,
    y: str | None = None,
    transform: Callable[[Columns], Columns] = lambda columns: columns,
) -> Split:
    """A data set of tensorflow-datasets, divided among clients.

    Args:
      name: as tensorflow-datasets writes it, ``"fashion_mnist"`` or ``"emnist/balanced"``.
      partition: a partitioner; by default ``iid(100)``.
      seed: of the partition.
      data_dir: the folder of prepared data sets; by default FEDJAX_LAB_DATA if the data set lies
        there, else tensorflow-datasets' own (TFDS_DATA_DIR or ``~/tensorflow_datasets``), where
        it is downloaded and prepared if need be.
      test_fraction: pool all rows and keep this share of each client's for testing; by default
        the official test rows are used if there are any (see ``assemble.to_split``), else 0.2.
      x, y: the features that are input and label; by default what the data set declares.
      transform: a change of the columns before they are partitioned.

    Returns:
      ``Split(train, test)``. ``x`` is float32, bytes of images being scaled to [0, 1] and several
      numeric features joined to one vector; ``y`` is int32 (float32 where labels are real numbers).
      Any further class labels are kept under their own names as int32.

    Raises:
      ImportError: tensorflow-datasets isn't installed.
      FileNotFoundError: it can't be prepared; with the ways to supply it.
      ValueError: an unknown data set (with the nearest name) or feature, features that aren't
        numbers or differ in shape, damaged files.
    """
    builder = _prepared(name, data_dir)
    splits = builder.info.splits
    if "train" not in splits:
        raise ValueError(f"{name} has no split 'train', but {sorted(splits)}")
    train = transform(_columns(builder, "train", x, y))
    test = transform(_columns(builder, "test", x, y)) if "test" in splits else None
    if test is None and test_fraction is None:
        test_fraction = 0.2
    return to_split(train, test, partition or iid(100), seed, test_fraction)


def available(name: str, data_dir: str | os.PathLike | None = None) -> bool:
    """Whether :func:`from_tfds` could get a data set without the user's help, network permitting."""
    if importlib.util.find_spec("tensorflow_datasets") is None:
        return False
    return any(_find(name, root).is_prepared() for root in _roots(data_dir)) or _has_tensorflow()


def _has_tensorflow() -> bool:
    return importlib.util.find_spec("tensorflow") is not None


def _roots(data_dir: str | os.PathLike | None) -> list[str | None]:
    if data_dir is not None:
        return [os.path.expanduser(data_dir)]
    shared = os.environ.get("FEDJAX_LAB_DATA")
    return [shared, None] if shared else [None]


def _find(name: str, root: str | None, **options: Any) -> Any:
    """The builder of a data set, prepared or not. ValueError with the nearest name if unknown."""
    tfds = checks.optional("tensorflow_datasets", f"the data set {name!r}")
    try:
        return tfds.builder(name, **({"data_dir": root} if root else {}), **options)
    except tfds.core.registered.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        near = checks.nearest(name.split("/")[0].split(":")[0], known)
        raise ValueError(
            f"tensorflow-datasets knows no data set {name!r}, and none lies in {root or 'its folder'}{near}"
        ) from None
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"tensorflow-datasets refuses {name!r}: {_first_line(error)}") from error


def _prepared(name: str, data_dir: str | os.PathLike | None) -> Any:
    roots = _roots(data_dir)
    for root in roots:
        builder = _find(name, root)
        if builder.is_prepared():
            return _readable(name, builder)
    builder = _find(name, roots[-1], file_format="array_record")
    if not _has_tensorflow():
        raise FileNotFoundError(_ways(name, builder, "TensorFlow is not installed"))
    if _offline(builder):
        raise FileNotFoundError(_ways(name, builder, "there is no network"))
    try:
        builder.download_and_prepare()
    except Exception as error:
        raise FileNotFoundError(_ways(name, builder, _first_line(error))) from error
    return builder


def _readable(name: str, builder: Any) -> Any:
    file_format = getattr(builder.info.file_format, "value", "unknown")
    if file_format != "array_record":
        raise ValueError(
            f"{builder.data_dir} holds {name} as {file_format}, which needs TensorFlow to read. Prepare "
            f"it again in another folder: tfds build {name} --file_format=array_record --data_dir=DIR"
        )
    return builder


def _offline(builder: Any) -> bool:
    """Whether none of the data set's hosts is known; tensorflow-datasets would try for minutes."""
    if urllib.request.getproxies():
        return False
    hosts = {urllib.parse.urlparse(url).hostname for url in getattr(builder, "url_infos", {})}
    hosts = {host for host in hosts if host}
    for host in hosts:
        try:
            socket.getaddrinfo(host, 443)
            return False
        except OSError:
            continue
    return bool(hosts)


def _ways(name: str, builder: Any, why: str) -> str:
    build = f"tfds build {name} --file_format=array_record --data_dir=DIR"
    ways = [
        "with a network and TensorFlow (pip install tensorflow), the same call downloads and prepares it;",
        f"prepare it on another machine ({build}), copy DIR here, and pass data_dir=DIR or set TFDS_DATA_DIR;",
        "read the rows yourself and use fl.FederatedData.from_assignment with a partitioner of fl.datasets.",
    ]
    if name.split("/")[0].split(":")[0] == "mnist":
        ways.insert(0, "put MNIST's four idx files (gzipped or not) in a folder, and pass data_dir=;")
    listed = "\n".join(f"  - {way}" for way in ways)
    return (
        f"the data set {name!r} is not prepared in {pathlib.Path(builder.data_dir)} and could not be "
        f"prepared ({why}). Ways to supply it:\n{listed}"
    )


def _columns(builder: Any, split: str, x: str | None, y: str | None) -> Columns:
    features = builder.info.features
    x, y = _keys(builder, x, y)
    extra = [k for k, f in features.items() if k != y and type(f).__name__ == "ClassLabel"]
    where = f"{builder.name}, split {split!r}"
    source = builder.as_data_source(split=split)
    rows, labels, others = [], [], {key: [] for key in extra}
    try:
        for example in source:
            rows.append(_numbers(example[x], f"{where}, feature {x!r}"))
            labels.append(example[y])
            for key in extra:
                others[key].append(example[key])
    except RuntimeError as error:  # ArrayRecord's checksums
        raise ValueError(
            f"{builder.data_dir}: {where}, example {len(labels)} can't be read: {_first_line(error)}"
        ) from error
    expected = builder.info.splits[split].num_examples
    if len(labels) != expected:
        raise ValueError(f"{builder.data_dir}: {where} holds {len(labels)} examples, not the {expected} recorded")
    shapes = sorted({row.shape for row in rows})
    if len(shapes) > 1:
        raise ValueError(
            f"{where}: feature {x!r} has examples of different shapes ({shapes[0]}, {shapes[1]}): bring "
            "them to one shape and use fl.FederatedData.from_assignment"
        )
    columns = {key: np.asarray(value, np.int32) for key, value in others.items()}
    return {"x": _scaled(np.stack(rows)), "y": _labels(np.asarray(labels), where, y)} | columns


def _keys(builder: Any, x: str | None, y: str | None) -> tuple[str, str]:
    declared = builder.info.supervised_keys
    pair = declared if isinstance(declared, tuple) and len(declared) == 2 else (None, None)
    x, y = x or pair[0], y or pair[1]
    features = builder.info.features
    for role, key in (("x", x), ("y", y)):
        if not isinstance(key, str):
            raise ValueError(
                f"{builder.name} does not say which feature is {role}; give {role}=, one of {sorted(features)}"
            )
        if key not in features:
            near = checks.nearest(key, features)
            raise ValueError(f"{builder.name} has no feature {key!r} among {sorted(features)}{near}")
    return str(x), str(y)


def _numbers(value: Any, where: str) -> np.ndarray:
    """An example's input: an array, or the vector of a dictionary's numbers by sorted name."""
    if isinstance(value, dict):
        parts = [_numbers(value[name], f"{where}/{name}") for name in sorted(value)]
        return np.concatenate([np.ravel(p).astype(np.float32) for p in parts])
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{where} holds text or objects, not numbers; encode it first")
    return array


def _scaled(x: np.ndarray) -> np.ndarray:
    if x.dtype == np.uint8 and x.ndim > 2:
        return np.divide(x, np.float32(255))
    return x.astype(np.float32)


def _labels(y: np.ndarray, where: str, key: str) -> np.ndarray:
    if y.dtype.kind not in "biuf":
        raise ValueError(f"{where}: label {key!r} is not a number")
    if y.dtype.kind == "f":
        return y.astype(np.float32)
    if y.min() < 0:
        raise ValueError(f"{where}: label {key!r} of example {int(y.argmin())} is {y.min()}: unlabelled")
    return y.astype(np.int32)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
