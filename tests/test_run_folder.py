"""A run's folder: what is in it, when it goes on, whom it refuses; and how runs are stopped."""

import errno
import fcntl
import json
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_lab as fl
from tests.problems import assert_same_bits, softmax_data
from tests.promises.resuming import walk

BYTES_A_ROUND = 40_000 * 65536 + 7  # what the walk reports


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_a_folder_holds(tmp_path):
    out = tmp_path / "deep/run"
    result = fl.run(walk(), 5, out=out, every=2, config={"rate": 0.1, "sampler": {"size": 4}})
    assert lines(out) == result.metrics
    assert json.loads((out / "config.json").read_text()) == {"rate": 0.1, "sampler": {"size": 4}}
    # The first logging point and the end; the others come too soon after the first.
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["00000002", "00000005"]


def test_a_finished_run_returns_without_training(tmp_path):
    process = walk()
    first = fl.run(process, 5, out=tmp_path, every=2)

    told = []
    again = fl.run(process, 5, out=tmp_path, every=2, callbacks=lambda info: told.append(info.round))
    assert told == [5]  # asked once, for a target that may be new
    assert_same_bits(again.state, first.state)
    assert again.metrics == first.metrics and again.uplink_bytes == first.uplink_bytes
    assert again.stopped == "all rounds done"
    longer = fl.run(process, 9, out=tmp_path, every=2)
    assert longer.metrics == fl.run(process, 9).metrics == lines(tmp_path)
    assert longer.uplink_bytes == 9 * BYTES_A_ROUND
    with pytest.raises(ValueError, match="holds a run of 9 rounds already, more than num_rounds=8"):
        fl.run(process, 8, out=tmp_path)


def begun(folder, **arguments):
    return fl.run(**({"process": walk(), "num_rounds": 4, "out": folder, "every": 2} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": {"rate": 0.1, "sampler": {"size": 5}}}, "configuration: sampler.size was 4 there, is 5 here"),
        ({"config": {"rate": 0.1}}, "configuration: sampler.size was 4 there, is 'nothing' here"),
        ({"seed": 1}, "configuration: seed was 0 there, is 1 here"),
        ({"params": jnp.zeros(3)}, 'configuration: params was "the model\'s own" there'),
        ({"process": walk(data=softmax_data(seed=1))}, "configuration: data was '.*' there, is '.*' here"),
        ({"process": walk(data=softmax_data(sizes=(3, 4)))}, "configuration: clients was 8 there, is 2 here"),
        ({"process": walk(width=5)}, r"other code: its leaf w is float32\[3\], this process's is float32\[5\]"),
        ({"process": walk(rate=0.2)}, "computes something else: program was"),
        ({"resume": False}, "already holds a run and resume=False"),
    ],
)
def test_a_folder_of_another_run(arguments, message, tmp_path):
    config = {"config": {"rate": 0.1, "sampler": {"size": 4}}}
    begun(tmp_path, **config)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=message):
        begun(tmp_path, **(config | {"num_rounds": 6} | arguments))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_another_program_on_request(tmp_path):
    begun(tmp_path)
    with pytest.warns(UserWarning, match="was begun with program"):
        result = begun(tmp_path, process=walk(rate=0.2), num_rounds=6, resume="anyway")
    assert result.rounds == 6
    assert lines(tmp_path)[:4] == fl.run(walk(), 4).metrics


def test_data_are_told_apart():
    from fedjax_lab.run_folder import data_digest

    data = softmax_data()
    x, y = data.arrays["x"], data.arrays["y"]
    swapped = x.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    nudged = x.copy()
    nudged[3, 2] = np.nextafter(nudged[3, 2], np.float32(9))
    flipped = np.where(x == x[0, 0], -x, x)
    relabelled = np.concatenate([y[1:], y[:1]])
    variants = [(x, y), (swapped, y), (nudged, y), (flipped, y), (x, relabelled), (x[:, ::-1].copy(), y)]
    make = lambda x, y: type(data)({"x": x, "y": y}, data.starts, data.sizes, {}, data.id_table, 30, 8)
    digests = {data_digest(make(*variant)) for variant in variants}
    assert len(digests) == len(variants)
    assert data_digest(make(x.copy(), y.copy())) in digests


def test_out_is_a_file(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="file' is a file; give a folder"):
        fl.run(walk(), 2, out=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_other_files_in_the_folder_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    fl.run(walk(), 2, out=tmp_path, resume=False)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_torn_last_line_is_repaired(tmp_path):
    begun(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 5, "loss": 1.0}\n{"round": 6, "lo')
    result = begun(tmp_path, num_rounds=7)
    assert lines(tmp_path) == result.metrics == fl.run(walk(), 7).metrics


def test_metrics_that_are_gone_or_altered(tmp_path):
    begun(tmp_path)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for content in (b"", whole.splitlines(keepends=True)[0], whole[10:], b"[" * 50_000 + b"\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="must hold the rounds 1 to 4 of the checkpoint"):
            begun(tmp_path, num_rounds=6)
        assert path.read_bytes() == content
    path.write_bytes(whole.replace(b'"loss": ', b'"loss": 1'))
    with pytest.warns(UserWarning, match=r"metrics\.jsonl was altered since"):
        begun(tmp_path, num_rounds=6)


def test_metrics_without_a_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 1}\n{"round": 2}\n{"rou')  # killed before its first checkpoint
    assert lines_after(tmp_path) == fl.run(walk(), 4).metrics
    for content in ("somebody else's\n", '{"round": 1}\n{"round": 2}\n{"round": 3}\n'):
        other = tmp_path / str(len(content))
        other.mkdir()
        (other / "metrics.jsonl").write_text(content)
        with pytest.raises(ValueError, match="holds metrics, but there is no checkpoint to go on from"):
            begun(other)
        assert (other / "metrics.jsonl").read_text() == content


def lines_after(folder):
    begun(folder)
    return lines(folder)


def test_two_at_once(tmp_path):
    tmp_path.joinpath(".lock").touch()
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is running in"):
            begun(tmp_path)
    assert begun(tmp_path).rounds == 4


def test_a_folder_that_cannot_be_locked(tmp_path, monkeypatch):
    def fails(code):
        def flock(file, how):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", flock)

    fails(errno.ENOLCK)
    with pytest.warns(UserWarning, match="has no locks"):
        assert begun(tmp_path / "networked").rounds == 4
    fails(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        begun(tmp_path / "broken")


# ---- stopping ----


@pytest.fixture
def keyboard():
    """Ctrl-C as a terminal's process knows it: one that a shell put in the background was told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_and_the_run_goes_on(tmp_path, capsys, keyboard):
    def press(info):
        if info.round == 4:
            signal.raise_signal(signal.SIGINT)

    process = walk()
    with pytest.raises(KeyboardInterrupt, match="interrupted after 4 of 9 rounds, saved in") as caught:
        fl.run(process, 9, out=tmp_path, every=2, callbacks=press)
    assert isinstance(caught.value, fl.Interrupted) and caught.value.result.rounds == 4
    assert "press Ctrl-C again to stop at once" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    result = fl.run(process, 9, out=tmp_path, every=2)
    assert_same_bits(result.state, fl.run(process, 9).state)
    assert lines(tmp_path) == result.metrics


def test_ctrl_c_twice_stops_at_once(tmp_path, keyboard):
    def press(info):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        fl.run(walk(), 9, out=tmp_path, callbacks=press)
    assert not isinstance(caught.value, fl.Interrupted)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_progress_lines_are_few(capsys):
    fl.run(walk(), 500, progress=True)
    fl.run(walk(), 500)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split("  ")[0] for line in err.splitlines()] == ["round 500/500"]
    assert "loss " in err and "rounds/s" in err
