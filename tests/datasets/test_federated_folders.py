"""Where the federated sets' files are looked for, and what is said when they are missing."""

import pytest

from fedjax_lab.datasets import federated, stackoverflow, stored_files
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


# ---- where files are looked for ----


def test_files_are_found_in_subfolders_in_the_environments_folder_and_in_the_cache(tmp_path, monkeypatch):
    for root in ("given", "set", "home/.cache/fedjax_lab"):
        (tmp_path / root / "emnist").mkdir(parents=True)
    files.emnist_folder(tmp_path / "given" / "emnist", "fedjax")
    assert emnist_federated(data_dir=tmp_path / "given").train.num_clients == 4
    with pytest.raises(FileNotFoundError):
        emnist_federated()
    files.emnist_folder(tmp_path / "home" / ".cache" / "fedjax_lab" / "emnist", "tff")
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
    files.write_fedjax(tmp_path / "federated_cifar100_test.sqlite", files.cifar(0, (1,)))
    with pytest.raises(FileNotFoundError, match=r"cifar100_train.sqlite is not offered for download"):
        federated.cifar100_federated(data_dir=tmp_path)


def test_a_file_as_data_dir_is_refused(tmp_path):
    path = tmp_path / "emnist_all.sqlite"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"emnist_all.sqlite is a file"):
        emnist_federated(data_dir=path)


def test_a_packed_file_is_unpacked_once_and_its_change_is_found(tmp_path):
    folder, *_ = files.emnist_folder(tmp_path, "tff")
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
