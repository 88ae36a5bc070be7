"""The naturally federated image and character sets by name: EMNIST, CIFAR-100, Shakespeare.

Each is read from the SQLite files that TensorFlow Federated or FedJAX publish, found in a folder or
downloaded (:mod:`fedjax_lab.datasets.published`), without TensorFlow, client by client: memory is
that of the clients asked for.
"""

import os
from typing import Any

import numpy as np

from fedjax_lab.data import Split
from fedjax_lab.datasets import collecting, published, text
from fedjax_lab.datasets.collecting import Clients, Task, within
from fedjax_lab.datasets.tf_example import Field

_TRAIN_TEST = {"train": "train", "test": "test"}
_EMNIST = published.Published(
    "emnist",
    "federated EMNIST",
    {
        "tff": dict.fromkeys(_TRAIN_TEST, "emnist_all.sqlite"),
        "fedjax": {s: f"federated_emnist_{s}.sqlite" for s in _TRAIN_TEST},
    },
    {"train": "all_train", "test": "all_test"},
)
_DIGITS = published.Published(
    "emnist",
    "federated EMNIST's digits",
    {
        "tff": dict.fromkeys(_TRAIN_TEST, "emnist_all.sqlite"),
        "fedjax": {s: f"federated_emnist_digitsonly_{s}.sqlite" for s in _TRAIN_TEST},
    },
    {"train": "digits_only_train", "test": "digits_only_test"},
)
_CIFAR100 = published.Published(
    "cifar100",
    "federated CIFAR-100",
    {
        "tff": dict.fromkeys(_TRAIN_TEST, "cifar100.sqlite"),
        "fedjax": {s: f"federated_cifar100_{s}.sqlite" for s in _TRAIN_TEST},
    },
    _TRAIN_TEST,
)
_SHAKESPEARE = published.Published(
    "shakespeare",
    "federated Shakespeare",
    {
        "tff": dict.fromkeys(_TRAIN_TEST, "shakespeare.sqlite"),
        "fedjax": {s: f"shakespeare_{s}.sqlite" for s in _TRAIN_TEST},
    },
    _TRAIN_TEST,
)


def emnist_federated(
    only_digits: bool = False,
    data_dir: str | os.PathLike | None = None,
    clients: Clients = None,
    source: str | None = None,
) -> Split:
    """Handwritten digits and letters, one client a writer (3,400; 3,383 for the digits).

    Args:
      only_digits: 10 classes instead of 62 (digits, capitals, small letters).
      data_dir: a folder that holds the files, or its parent; by default the one that FEDJAX_LAB_DATA
        names. ``~/.cache/fedjax_lab`` comes last. What is missing is downloaded: 170 MB for TFF's file, which takes
        4.7 GB on the disk.
      clients: which clients: a number (the first ones by id), a list of ids, a function of all ids
        (:func:`~fedjax_lab.datasets.collecting.random_clients`), or None for all, which takes 2.4
        GB.
      source: ``"tff"`` or ``"fedjax"``; by default whichever a folder holds, else TFF's. FedJAX
        puts 16 hexadecimal digits before each writer's id.

    Returns:
      ``Split(train, test)`` over the same clients in the same order, of ``x: float32[28, 28, 1]``
      with white paper 0 and ink 1 (``1 - pixels``), and ``y: int32``. One in ten of a writer's
      examples are in test.

    Raises:
      FileNotFoundError: with the ways to supply the files, if they can't be downloaded.
      ValueError: naming the file and, where it can be known, the client, the example and the field:
        a truncated or altered file, a label or pixel out of range, an unknown client. The pixels of
        TFF's format carry no checksum: in a file that was not downloaded by this library, a changed
        pixel that stays in 0..1 can't be noticed.

    Source: Caldas et al. 2018, "LEAF: A Benchmark for Federated Settings"; TFF's and FedJAX's
      files.
    """
    classes = 10 if only_digits else 62

    def decode(raw: dict[str, Any]) -> dict[str, np.ndarray]:
        pixels = within("pixels", raw["pixels"], 0, 1).astype(np.float32)
        labels = within("label", raw["label"], 0, classes - 1).astype(np.int32)
        return {"x": (1 - pixels)[..., None], "y": labels}

    task = Task({"pixels": Field("float", (28, 28)), "label": Field("int")}, decode)
    data = _DIGITS if only_digits else _EMNIST
    return Split(**collecting.same_clients(data, task, data_dir, clients, source))


def cifar100_federated(
    data_dir: str | os.PathLike | None = None,
    clients: Clients = None,
    source: str | None = None,
) -> Split:
    """CIFAR-100, divided by Pachinko allocation over its 20 coarse and 100 fine labels.

    Args:
      data_dir: as for :func:`emnist_federated`; 153 MB are downloaded.
      clients: as there, for train and for test; or ``{"train": ..., "test": ...}``.
      source: as there. FedJAX offers no download; the files its own loader makes are read.

    Returns:
      ``Split(train, test)`` of ``x: float32[32, 32, 3]`` in 0..1, ``y: int32`` (100 classes) and
      ``coarse: int32`` (20). Train has 500 clients, test 100 others, of 100 examples each; the
      same id in both is not the same client.

    Raises:
      As :func:`emnist_federated`.

    Source: Reddi et al. 2021, "Adaptive Federated Optimization", appendix F.
    """

    def decode(raw: dict[str, Any]) -> dict[str, np.ndarray]:
        return {
            "x": within("image", raw["image"], 0, 255).astype(np.float32) / np.float32(255),
            "y": within("label", raw["label"], 0, 99).astype(np.int32),
            "coarse": within("coarse_label", raw["coarse_label"], 0, 19).astype(np.int32),
        }

    fields = {
        "image": Field("int", (32, 32, 3)),
        "label": Field("int"),
        "coarse_label": Field("int"),
    }
    task = Task(fields, decode)
    return Split(**collecting.own_clients(_CIFAR100, task, data_dir, clients, source))


def shakespeare_federated(
    data_dir: str | os.PathLike | None = None,
    clients: Clients = None,
    source: str | None = None,
    length: int = 80,
) -> Split:
    """Next-character prediction on Shakespeare, one client a role of a play (715).

    Args:
      data_dir: as for :func:`emnist_federated`; 1.3 MB are downloaded.
      clients: as there.
      source: as there.
      length: characters in a sequence.

    Returns:
      ``Split(train, test)`` over the same clients in the same order, of ``x`` and ``y``:
      ``int32[length]`` in 0..89, 0 for padding, ``y`` one character ahead
      (:func:`fedjax_lab.datasets.text.encode_characters`, which joins a role's speeches).

    Raises:
      As :func:`emnist_federated`. Neither format can tell that a character was changed, unless the
      file was downloaded by this library.

    Source: McMahan et al. 2017, section 3; sequences as in FedJAX, which loses no character between
    them (TFF's tutorial drops one in 80).
    """

    def decode(raw: dict[str, Any]) -> dict[str, np.ndarray]:
        return text.encode_characters(raw["snippets"], length)

    task = Task({"snippets": Field("bytes")}, decode)
    return Split(**collecting.same_clients(_SHAKESPEARE, task, data_dir, clients, source))
