"""Stored files: changes are found out. LZMA: unpacked whole or not at all."""

import hashlib
import lzma
import os

import numpy as np
import pytest

from fedjax_lab.datasets import download, stored_files

CONTENT = np.random.default_rng(0).bytes(3_000_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


# ---- stored files ----


def test_a_stored_file_is_checked_by_size_and_time_then_by_digest(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(CONTENT)
    assert stored_files.verify(path) is None  # no record, nothing to compare with
    stored_files.record(path, DIGEST)
    stamp = path.stat().st_mtime_ns
    os.utime(path, ns=(stamp, stamp + 10**9))
    assert stored_files.verify(path) == DIGEST  # touched, but the same
    assert str(stamp + 10**9) in stored_files.record_of(path).read_text()
    changed = bytearray(CONTENT)
    changed[1_000_000] ^= 1
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=r"file.bin: truncated or altered since it was stored"):
        stored_files.verify(path)
    os.utime(path, ns=(stamp, stamp + 10**9))  # with its old time stamp only a full check sees it
    assert stored_files.verify(path) == DIGEST
    with pytest.raises(ValueError, match="truncated or altered"):
        stored_files.verify(path, full=True)


def test_every_truncation_and_a_damaged_record_are_found(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(CONTENT)
    stored_files.record(path, DIGEST)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=r"2999999 bytes; 3000000 bytes"):
        stored_files.verify(path)
    stored_files.record_of(path).write_text("gibberish")
    with pytest.raises(ValueError, match=r"file.bin.sha256: damaged checksum record"):
        stored_files.verify(path)


# ---- LZMA ----


@pytest.mark.parametrize("container", [lzma.FORMAT_ALONE, lzma.FORMAT_XZ])
def test_lzma_is_decompressed_in_one_piece(tmp_path, container):
    content, seen = CONTENT[:1_500_000] + bytes(20_000_000), []
    source, target = tmp_path / "f.lzma", tmp_path / "f"
    source.write_bytes(lzma.compress(content, format=container, preset=0))
    download.decompress(source, target, progress=lambda *at: seen.append(at))
    assert target.read_bytes() == content
    assert seen[-1] == (source.stat().st_size,) * 2
    assert stored_files.verify(target, full=True) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda packed: packed[:-1], "truncated; its LZMA stream has no end"),
        (lambda packed: packed[:5], "truncated"),
        (lambda packed: b"", "truncated"),
        (lambda packed: packed + b"more", "data behind the end"),
        (lambda packed: b"not lzma at all" + packed, "no LZMA stream, or damaged"),
        (lambda packed: b"\xff" + packed[1:], "no LZMA stream, or damaged"),
    ],
)
def test_damaged_lzma_is_named_and_leaves_nothing(tmp_path, change, message):
    source = tmp_path / "f.lzma"
    source.write_bytes(change(lzma.compress(CONTENT[:100_000], format=lzma.FORMAT_ALONE)))
    with pytest.raises(ValueError, match=message) as caught:
        download.decompress(source, tmp_path / "f")
    assert str(source) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["f.lzma"]


def test_lzma_that_grows_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_MOST_GROWTH", 10)
    source = tmp_path / "bomb.lzma"
    source.write_bytes(lzma.compress(bytes(80_000_000), preset=0))
    with pytest.raises(ValueError, match="more than 67108864 bytes; refused"):
        download.decompress(source, tmp_path / "bomb")
    assert [p.name for p in tmp_path.iterdir()] == ["bomb.lzma"]
