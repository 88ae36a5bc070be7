"""Files read whole: gzip in several streams, padding, damage, and where it is."""

import gzip

import pytest

from fedjax_lab import reading
from tests.damage import flips, outcomes, truncations

TEXT = "".join(f"line {i}: {i * i}\n" for i in range(300)).encode()


def test_gzip_streams_in_a_row_and_zero_padding(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(TEXT) + gzip.compress(b"more") + bytes(20))
    assert reading.read_bytes(path) == TEXT + b"more"


def test_content_of_several_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_CHUNK", 7)
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(TEXT))
    assert reading.read_bytes(path) == TEXT


def test_damage_is_named_with_the_part_it_reached(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(TEXT, mtime=0))
    part = lambda done: "the head" if done < 10 else "the body"
    read = lambda: reading.read_bytes(path, part)
    seen = set()
    for what, error in outcomes(path, truncations(path.read_bytes()), read):
        assert isinstance(error, ValueError) and str(path) in str(error), what
        seen |= {name for name in ("the head", "the body") if name in str(error)}
    assert seen == {"the head", "the body"}
    results = list(outcomes(path, flips(path.read_bytes(), 200), read))
    assert all(r == TEXT or (isinstance(r, ValueError) and str(path) in str(r)) for _, r in results)
    assert sum(isinstance(r, ValueError) for _, r in results) > 190


def test_what_is_not_there_or_not_text(tmp_path):
    (tmp_path / "table.csv").write_bytes(b"a,b\n1,\xff\n")
    with pytest.raises(FileNotFoundError, match=r"no file .*tabel.csv; did you mean 'table.csv'"):
        reading.read_bytes(tmp_path / "tabel.csv")
    with pytest.raises(FileNotFoundError, match="nor a folder"):
        reading.read_bytes(tmp_path / "x" / "y")
    with pytest.raises(ValueError, match=r"table.csv, line 2: byte 0xff is not UTF-8"):
        reading.read_text(tmp_path / "table.csv")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty: the content is missing: the file is empty"):
        reading.read_bytes(tmp_path / "empty")
    (tmp_path / "a.gz").write_bytes(b"plain text")
    with pytest.raises(ValueError, match=r"a.gz: the content is damaged: this is no gzip file"):
        reading.read_bytes(tmp_path / "a.gz")
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"x") + b"rubbish")
    with pytest.raises(ValueError, match="damaged"):
        reading.read_bytes(tmp_path / "a.gz")
