"""Callbacks: when they are called, what they are told, and how they end a run."""

import struct

import jax.numpy as jnp
import pytest

import fedjax_lab as fl
from fedjax_lab.callbacks import Info
from tests.promises.resuming import walk


def counting():
    """A process whose loss is 10, 9, 8, ... and whose accuracy is 0.1, 0.2, ..."""

    def step(state, data):
        state = state + 1
        return state, {"loss": 11.0 - state, "accuracy": state / 10}

    return walk()._replace(init=lambda key, params=None: jnp.float32(0), step=step, params=lambda state: state)


def told(name, values):
    """An Info of a run whose metric had these values (None: not recorded) in rounds 1, 2, ..."""
    records = [{"round": i + 1} | ({} if v is None else {name: v}) for i, v in enumerate(values)]
    return Info(len(values), records[-1], records, None, walk(), 0)


@pytest.mark.parametrize(
    ("name", "target", "rounds", "reason"),
    [
        ("accuracy", 0.7, 7, "accuracy reached 0.7 in round 7 (0.7)"),
        ("loss", 5, 6, "loss reached 5 in round 6 (5)"),
        ("accuracy", 2, 10, "all rounds done"),
    ],
)
def test_stop_at(name, target, rounds, reason):
    result = fl.run(counting(), 10, callbacks=[fl.callbacks.stop_at(name, target)])
    assert (result.rounds, result.stopped, len(result.metrics)) == (rounds, reason, rounds)
    assert float(result.params) == rounds


def test_stop_at_looks_at_logging_points_only():
    assert fl.run(counting(), 10, every=4, callbacks=fl.callbacks.stop_at("loss", 5)).rounds == 8


def test_stop_at_the_start():
    stop = fl.callbacks.stop_at("x", 1)
    assert fl.run(counting(), 10, evaluate=lambda p, s: {"x": 1}, callbacks=stop).rounds == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fl.callbacks.stop_at(0.7, "accuracy"), "name of a metric comes first.*got 0.7"),
        (lambda: fl.callbacks.stop_at("accuracy", float("nan")), "target must be a finite number"),
        (lambda: fl.callbacks.stop_at("accuracy", "0.7"), "target must be a finite number"),
        (lambda: fl.callbacks.stop_without_progress(3, "loss"), "name of a metric comes first.*got 3"),
        (lambda: fl.callbacks.stop_without_progress("loss", 3, least=-1), "least must be a number of at least 0"),
    ],
)
def test_settings_that_would_never_stop_a_run(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_stop_at_an_unknown_metric():
    with pytest.raises(ValueError, match="no record has the metric 'acuracy'; did you mean 'accuracy'"):
        fl.run(counting(), 10, callbacks=fl.callbacks.stop_at("acuracy", 0.5))


def test_stop_without_progress():
    stop = fl.callbacks.stop_without_progress("loss", patience=3)
    assert stop(told("loss", [5, 4, 4, 4])) is None
    assert stop(told("loss", [5, 4, 4, None, 4.5])) == "loss has not improved since round 2 (4)"
    assert stop(told("loss", [5, 4, 4, 3.9, 4.5])) is None
    assert fl.callbacks.stop_without_progress("loss", 3, least=0.2)(told("loss", [5, 4, 4, 3.9, 4.5]))
    assert fl.callbacks.stop_without_progress("accuracy", 2)(told("accuracy", [0.5, 0.4, 0.5]))
    assert fl.callbacks.stop_without_progress("gain", 2, below=True)(told("gain", [0.5, 0.4, 0.3])) is None


def test_what_callbacks_are_told(tmp_path):
    seen = []

    def callback(info):
        seen.append((info.round, info.begun, info.metrics["round"], len(info.records), int(info.state.round)))
        return info.round == 6

    result = fl.run(walk(), 9, every=2, out=tmp_path, callbacks=[callback])
    assert seen == [(2, 0, 2, 2, 2), (4, 0, 4, 4, 4), (6, 0, 6, 6, 6)]
    assert (result.stopped, result.rounds) == ("stopped by callback", 6)
    seen.clear()
    assert fl.run(walk(), 9, every=2, out=tmp_path, callbacks=[callback]).rounds == 6  # stops where it stopped
    assert seen == [(6, 6, 6, 6, 6)]
    assert fl.run(walk(), 9, every=2, out=tmp_path).rounds == 9


def test_close_is_called_even_after_an_error():
    closed = []

    def callback(info):
        raise RuntimeError("from the callback")

    callback.close = lambda: closed.append(True)
    with pytest.raises(RuntimeError, match="from the callback"):
        fl.run(walk(), 3, callbacks=callback)
    assert closed == [True]


def scalars(folder):
    """(tag, step, value) in TensorBoard's event files, which are framed as length, crc, data, crc."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            content = content[16 + length :]
    return found


def test_tensorboard_has_every_round_once(tmp_path):
    pytest.importorskip("tensorboardX")
    write = fl.callbacks.tensorboard(tmp_path / "events")
    evaluate = lambda process, state: {"w0": state.w[0]}
    for rounds in (5, 8):
        result = fl.run(walk(), rounds, every=2, out=tmp_path / "run", evaluate=evaluate, callbacks=[write])
    expected = [(n, m["round"], v) for m in result.metrics for n, v in m.items() if n != "round"]
    found = scalars(tmp_path / "events")
    assert sorted((tag, step) for tag, step, _ in found) == sorted((tag, step) for tag, step, _ in expected)
    values = {(tag, step): value for tag, step, value in found}
    assert all(values[tag, step] == pytest.approx(value, rel=1e-6) for tag, step, value in expected)
