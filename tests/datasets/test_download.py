"""Downloads from a server on this machine: progress, checksums, and nothing left by what fails."""

import hashlib
import http.server
import os
import shutil
import socket
import subprocess
import threading
import time

import numpy as np
import pytest

from fedjax_lab.datasets import download, federated, published, stored_files
from tests.datasets import federated_files as files

CONTENT = np.random.default_rng(0).bytes(3_000_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server():
    """A server whose ``answer(handler)`` a test can replace; ``.requests`` has the Range headers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.requests.append(self.headers.get("Range"))
            state.answer(self)

        def log_message(self, *_):
            pass

    state = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.daemon_threads = True
    state.requests = []
    state.answer = whole
    state.url = f"http://127.0.0.1:{state.server_port}/file.bin"
    thread = threading.Thread(target=state.serve_forever, args=(0.01,))
    thread.start()
    yield state
    state.shutdown()
    thread.join()
    state.server_close()


def whole(handler, content=CONTENT):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def breaking(after, resume=True):
    """Sends ``after`` bytes of what is asked for and closes the connection."""

    def answer(handler):
        start = int((handler.headers.get("Range") or "bytes=0-")[6:-1]) if resume else 0
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(CONTENT) - start))
        handler.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        handler.end_headers()
        handler.wfile.write(CONTENT[start : start + after])

    return answer


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0)


def test_a_download_reports_progress_and_records_its_digest(server, tmp_path):
    target, seen = tmp_path / "new" / "file.bin", []
    out = download.fetch(server.url, target, sha256=DIGEST, progress=lambda *at: seen.append(at))
    assert out == target and target.read_bytes() == CONTENT
    done = [at for at, _ in seen]
    assert done == sorted(done) and len(done) >= 3
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert sorted(p.name for p in target.parent.iterdir()) == ["file.bin", "file.bin.sha256"]
    assert stored_files.verify(target, full=True) == DIGEST
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "file.bin.sha256"], cwd=target.parent, check=True)


def test_the_bar_is_drawn_for_eyes_only(server, tmp_path, capsys, monkeypatch):
    download.fetch(server.url, tmp_path / "a")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    download.fetch(server.url, tmp_path / "file.bin")
    shown = capsys.readouterr()
    assert "Downloading file.bin" in shown.err and "3.0/3.0 MB" in shown.err and shown.out == ""


@pytest.mark.parametrize(
    ("address", "answer", "message"),
    [
        ("{url}", lambda h: h.send_error(404), "404 Not Found"),
        ("{url}", lambda h: whole(h, CONTENT[:-1]), "what came has the SHA-256"),
        ("{url}", lambda h: whole(h, b""), "what came has the SHA-256"),
        ("{url}", lambda h: h.connection.close(), "closed|reset|[Bb]roken"),
        ("http://127.0.0.1:{closed}/x", whole, "refused"),
        ("http://no-such-host.invalid/x", whole, "no-such-host|resolution|not known|No address"),
        ("file:///etc/hostname", whole, "only http and https"),
        ("ftp://127.0.0.1/x", whole, "only http and https"),
    ],
)
def test_what_fails_is_named_and_leaves_nothing(server, tmp_path, address, answer, message):
    server.answer = answer
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = address.format(url=server.url, closed=unused.getsockname()[1])
        with pytest.raises((ConnectionError, ValueError), match=message) as caught:
            download.fetch(url, tmp_path / "new" / "file.bin", sha256=DIGEST)
    assert url in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_leaves_the_older_file_alone(server, tmp_path):
    target = tmp_path / "file.bin"
    target.write_bytes(b"older")
    server.answer = lambda h: whole(h, b"wrong")
    with pytest.raises(ValueError, match="what came has"):
        download.fetch(server.url, target, sha256=DIGEST)
    assert target.read_bytes() == b"older" and len(list(tmp_path.iterdir())) == 1


def test_a_broken_connection_is_resumed(server, tmp_path):
    server.answer = breaking(after=1_200_000)
    out = download.fetch(server.url, tmp_path / "file.bin", sha256=DIGEST)
    assert out.read_bytes() == CONTENT
    assert server.requests == [None, "bytes=1200000-", "bytes=2400000-"]


def test_a_server_that_can_not_resume_sends_it_again(server, tmp_path):
    server.answer = lambda h: breaking(1_000_000, False)(h) if len(server.requests) < 3 else whole(h)
    out = download.fetch(server.url, tmp_path / "file.bin", sha256=DIGEST)
    assert out.read_bytes() == CONTENT and len(server.requests) == 3


def test_a_connection_that_breaks_again_and_again_is_given_up(server, tmp_path):
    server.answer = breaking(after=100_000)
    with pytest.raises(ConnectionError, match="stopped after 400000 of 3000000 bytes"):
        download.fetch(server.url, tmp_path / "file.bin")
    assert list(tmp_path.iterdir()) == [] and len(server.requests) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupt_or_a_full_disk_leaves_nothing(server, tmp_path, error):
    def interrupt(done, _):
        if done > len(CONTENT) // 2:
            raise error

    with pytest.raises((KeyboardInterrupt, OSError)):
        download.fetch(server.url, tmp_path / "file.bin", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path):
    old, young = tmp_path / ".file.bin.aaaa.part", tmp_path / ".file.bin.bbbb.part"
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 90_000,) * 2)
    with stored_files.replacing(tmp_path / "file.bin") as file:
        file.write(b"y")
    assert sorted(p.name for p in tmp_path.iterdir()) == [young.name, "file.bin"]


# ---- a data set, from the server to the arrays ----


@pytest.fixture
def emnist_on_server(server, tmp_path, monkeypatch):
    splits = dict.fromkeys(("all_train", "all_test"), files.emnist())
    made = files.write_tff(tmp_path / "made.sqlite", splits)
    packed = files.write_lzma(tmp_path / "made.lzma", made).read_bytes()
    name = "emnist_all.sqlite.lzma"
    monkeypatch.setitem(published.ADDRESSES, name, server.url.replace("file.bin", name))
    monkeypatch.setitem(published.DIGESTS, name, hashlib.sha256(packed).hexdigest())
    server.answer = lambda handler: whole(handler, packed)
    return server, packed


def test_a_data_set_is_downloaded_unpacked_and_then_read_from_the_folder(emnist_on_server, tmp_path):
    server, _ = emnist_on_server
    for _ in range(2):
        data = federated.emnist_federated(data_dir=tmp_path / "data")
        assert data.train.num_examples == 6
    assert len(server.requests) == 1
    stored = sorted(p.name for p in (tmp_path / "data" / "emnist").iterdir())
    assert stored == ["emnist_all.sqlite", "emnist_all.sqlite.sha256"]


def test_a_download_into_an_unwritable_folder_goes_to_the_cache(emnist_on_server, tmp_path, monkeypatch):
    (tmp_path / "mounted").mkdir()
    monkeypatch.setenv("FEDJAX_LAB_DATA", str(tmp_path / "mounted"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    can_write = os.access
    monkeypatch.setattr("os.access", lambda p, mode: "mounted" not in str(p) and can_write(p, mode))
    assert federated.emnist_federated().train.num_examples == 6
    stored = tmp_path / "home" / ".cache" / "fedjax_lab" / "emnist" / "emnist_all.sqlite"
    assert stored.exists() and not list((tmp_path / "mounted").iterdir())


def test_another_file_than_the_published_one_is_refused(emnist_on_server, tmp_path):
    server, packed = emnist_on_server
    server.answer = lambda handler: whole(handler, packed[:-9] + bytes(9))
    with pytest.raises(ValueError, match=r"published for emnist_all.sqlite.lzma"):
        federated.emnist_federated(data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_packed_file_in_a_folder_that_can_not_be_written_is_unpacked_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "mounted"
    folder.mkdir()
    made = files.write_tff(tmp_path / "made.sqlite", dict.fromkeys(("all_train", "all_test"), files.emnist()))
    files.write_lzma(folder / "emnist_all.sqlite.lzma", made)
    can_write = os.access
    monkeypatch.setattr("os.access", lambda p, mode: "mounted" not in str(p) and can_write(p, mode))
    stored = tmp_path / "home" / ".cache" / "fedjax_lab" / "emnist" / "emnist_all.sqlite"
    stamps = []
    for _ in range(2):
        assert federated.emnist_federated(data_dir=folder).train.num_examples == 6
        stamps.append(stored.stat().st_mtime_ns)
    assert stamps[0] == stamps[1]  # unpacked once
    assert [p.name for p in folder.iterdir()] == ["emnist_all.sqlite.lzma"]
    assert stored_files.verify(stored, full=True)
