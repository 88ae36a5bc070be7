"""promises.md, rows 1 to 4 and 6: runs survive being killed, damaged checkpoints harm nothing."""

import json
import multiprocessing
import os
import pathlib
import pickle
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedadam import fedadam
from algorithms.fedavg import fedavg
from algorithms.fedavgm import fedavgm
from algorithms.fedprox import fedprox
from algorithms.fedyogi import fedyogi
from fedjax_lab import checkpoint
from fedjax_lab.state_leaves import own_copy, state_digest
from tests.problems import assert_same_bits, softmax_data, softmax_model
from tests.promises import resuming

pytestmark = pytest.mark.usefixtures("compile_once")
ROOT = pathlib.Path(__file__).parents[2]
ROUNDS_A_KILL = 60  # a checkpoint every second round takes some 10 ms, a session lives up to .4 s beyond its first


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    """Keep compiled programs on disk, for processes that are built again."""
    from jax.experimental.compilation_cache import compilation_cache

    names = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


# ---- row 1: killed at any moment ----


def reference(build, folder, rounds):
    """An uninterrupted run: its result, and the digest of its state after every logging point."""
    digests = {}

    def remember(info):
        digests[info.round] = state_digest(info.state)

    result = fl.run(build(), rounds, out=folder, every=2, callbacks=remember, checkpoint_every=1e9)
    return result, digests


def start_forked(out, rounds, cache):
    """A session of the walk in a process forked from one that has only imported what it needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["orbax.checkpoint", "rich.progress", "tests.promises.resuming"])
    process = context.Process(target=resuming.forked_session, args=(str(out), rounds))
    process.start()
    return process.pid, process.is_alive, process.join


def start_fresh(out, rounds, cache):
    """A session of the federated run in a fresh Python."""
    command = [sys.executable, "-m", "tests.promises.resuming", str(out), str(rounds), "0", str(cache)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    return process.pid, lambda: process.poll() is None, process.wait


def newest(out):
    return next(iter(checkpoint.newest_first(out / "checkpoints")), None)


def kill_once(start, out, rounds, cache, rng):
    """Begin a session and kill it at a random moment after its first checkpoint."""
    before = newest(out)
    pid, alive, join = start(out, rounds, cache)
    deadline = time.monotonic() + 120
    try:
        while newest(out) in (None, before):
            assert alive() and time.monotonic() < deadline, "the session ended or hung before a checkpoint"
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        assert alive(), "the session ended before it was killed: ROUNDS_A_KILL is too small"
    finally:
        if alive():
            os.kill(pid, signal.SIGKILL)
        join()


def survives_kills(build, start, kills, tmp_path, seed):
    rng, rounds = random.Random(seed), ROUNDS_A_KILL * kills
    whole, digests = reference(build, tmp_path / "whole", rounds)
    out = tmp_path / "killed"
    for _ in range(kills):
        kill_once(start, out, rounds, tmp_path / "cache", rng)
        record = checkpoint.read_record(newest(out))
        restored = checkpoint.restore(newest(out), whole.state)
        assert state_digest(restored.state) == digests[record["round"]]
    result = fl.run(build(), rounds, out=out, every=2, checkpoint_every=1e9)
    assert_same_bits(result.state, whole.state)
    assert result.metrics == whole.metrics
    assert (out / "metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert (result.uplink_bytes, result.downlink_bytes) == (whole.uplink_bytes, whole.downlink_bytes)


def test_ten_kills(tmp_path):
    survives_kills(resuming.walk, start_forked, 10, tmp_path, seed=0)


@pytest.mark.slow
def test_fifty_kills_of_fresh_processes(tmp_path):
    survives_kills(resuming.federated, start_fresh, 50, tmp_path, seed=1)


# ---- row 2: torn or edited checkpoints ----


def two_checkpoints(folder):
    """Checkpoints of rounds 4 and 8 of a run, the two states, and the process's initial state."""
    process = resuming.walk()
    states = {}

    def remember(info):
        states[info.round] = own_copy(info.state)

    fl.run(process, 8, out=folder, every=4, callbacks=remember, checkpoint_every=0)
    return states, own_copy(process.init(jax.random.key(0)))


def damage(path, rng):
    """Cut a file short or flip some bits of it; returns what it was."""
    original = path.read_bytes()
    if rng.random() < 0.5 and original:
        path.write_bytes(original[: rng.randrange(len(original))])
        return original
    content = bytearray(original)
    for _ in range(rng.choice((1, 1, 1, 8))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))
    return original


@pytest.mark.filterwarnings("ignore:checkpoint .* is damaged")
def test_two_hundred_damages(tmp_path):
    states, template = two_checkpoints(tmp_path)
    store = tmp_path / "checkpoints"
    files = sorted(p.relative_to(store) for p in (store / "00000008").rglob("*") if p.is_file())
    rng, outcomes = random.Random(2), {4: 0, 8: 0}
    for _ in range(200):
        file = rng.choice(files)
        original = damage(store / file, rng)
        restored = checkpoint.restore_newest(store, template)
        assert_same_bits(restored.state, states[restored.round])
        outcomes[restored.round] += 1
        aside = store / "00000008.damaged"
        if aside.exists():
            aside.rename(store / "00000008")
        (store / file).write_bytes(original)
    assert outcomes[4] >= 190  # what falls on insignificant white space is harmless


def test_a_run_goes_on_from_the_checkpoint_before(tmp_path):
    whole = fl.run(resuming.walk(), 12)
    process = resuming.walk()
    fl.run(process, 8, out=tmp_path, every=4, checkpoint_every=0)
    (tmp_path / "checkpoints/00000008/record.json").write_text("{")
    with pytest.warns(UserWarning, match=r"00000008 is damaged .* from round 4\. It was renamed"):
        result = fl.run(process, 12, out=tmp_path, every=4)
    assert_same_bits(result.state, whole.state)
    assert result.metrics == whole.metrics
    assert (tmp_path / "checkpoints/00000008.damaged/record.json").read_text() == "{"


def test_no_intact_checkpoint_stops_and_changes_nothing(tmp_path):
    process = resuming.walk()
    fl.run(process, 8, out=tmp_path, every=4, checkpoint_every=0)
    for path in checkpoint.newest_first(tmp_path / "checkpoints"):
        next((path / "state/d").iterdir()).unlink()
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"no checkpoint .* is intact .*00000008: file state/d/.* is missing"):
        fl.run(process, 12, out=tmp_path, every=4)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


# ---- row 3: the state is complete ----


@pytest.fixture(scope="module")
def nine_rounds(compile_once):
    process = resuming.federated()
    return process, fl.run(process, 9, every=4)


@pytest.mark.parametrize("first", [1, 2, 4, 7])
def test_a_run_cut_in_two_anywhere(first, nine_rounds, tmp_path):
    process, whole = nine_rounds
    fl.run(process, first, every=4, out=tmp_path)
    result = fl.run(process, 9, every=4, out=tmp_path)
    assert_same_bits(result.state, whole.state)
    assert result.metrics == whole.metrics


ALGORITHMS = {
    "fedavg": lambda model, **kw: fedavg(model, optax.adam(0.05), **kw),
    "fedavg, kept optimizer state": lambda model, **kw: fedavg(
        model, optax.adam(0.05), keep_optimizer_state=True, **kw
    ),
    "fedavgm": lambda model, **kw: fedavgm(model, optax.sgd(0.1), **kw),
    "fedadam": lambda model, **kw: fedadam(model, optax.sgd(0.1), **kw),
    "fedyogi": lambda model, **kw: fedyogi(model, optax.sgd(0.1), **kw),
    "fedprox": lambda model, **kw: fedprox(model, optax.sgd(0.1), mu=0.1, **kw),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_resumes(name, tmp_path):
    build = lambda: fl.synchronous(ALGORITHMS[name](softmax_model(), batch_size=4), softmax_data(), fl.uniform(3))
    process = build()
    whole = fl.run(process, 5, every=2)
    fl.run(process, 3, every=2, out=tmp_path)
    result = fl.run(build(), 5, every=2, out=tmp_path)  # built anew: nothing hides in closures
    assert_same_bits(result.state, whole.state)
    assert result.metrics == whole.metrics


# ---- rows 3 and 6: a fresh Python computes the same bits ----


def fresh(out, rounds, cache):
    command = [sys.executable, "-m", "tests.promises.resuming", str(out), str(rounds), "30", str(cache)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()[-1]


def test_a_fresh_process_goes_on_to_the_same_bits(nine_rounds, tmp_path):
    process, whole = nine_rounds
    fl.run(process, 5, every=4, out=tmp_path / "out")
    assert fresh(tmp_path / "out", 9, tmp_path / "cache") == state_digest(whole.state)
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == whole.metrics


@pytest.mark.slow
def test_ten_fresh_processes_compute_the_same_bits(tmp_path):
    # Each compiles for itself: no cache is shared.
    digests = {fresh(tmp_path / f"out{i}", 7, tmp_path / f"cache{i}") for i in range(10)}
    assert len(digests) == 1


# ---- row 4: loading executes nothing ----


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path(self.path),))


# Orbax leaves tasks behind when it fails on the forged files.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:checkpoint .* is damaged")
def test_a_hostile_checkpoint_executes_nothing(tmp_path):
    states, template = two_checkpoints(tmp_path)
    store, mark = tmp_path / "checkpoints", tmp_path / "executed"
    bomb = pickle.dumps(Bomb(mark))
    pickle.loads(bomb)
    assert mark.exists()  # the bomb works
    mark.unlink()
    hostile = store / "00000008"
    for path in [p for p in hostile.rglob("*") if p.is_file()]:
        original = path.read_bytes()
        path.write_bytes(bomb)
        if path.name != "record.json":  # an attacker who can write files can write digests too
            _forge(hostile)
        restored = checkpoint.restore_newest(store, template)
        assert_same_bits(restored.state, states[restored.round])
        assert not mark.exists()
        if (aside := store / "00000008.damaged").exists():
            aside.rename(hostile)
        path.write_bytes(original)
        if path.name != "record.json":
            _forge(hostile)
    (hostile / "record.json").write_text("[" * 100_000)
    assert checkpoint.restore_newest(store, template).round == 4


def _forge(folder):
    """Make a checkpoint's digests fit the files that lie there."""
    record = json.loads((folder / "record.json").read_text())["record"]
    record["files"] = {name: checkpoint._file_digest(folder / name) for name in record["files"]}
    envelope = {"sha256": checkpoint._sha256(record), "record": record}
    checkpoint.write_json(folder / "record.json", envelope)


def test_forged_arrays_are_recognised(tmp_path):
    template = {"w": jnp.arange(4.0)}
    checkpoint.save(tmp_path, 1, {"w": jnp.ones(4)}, {})
    other = checkpoint.save(tmp_path / "other", 1, {"w": jnp.zeros(4)}, {})
    target = tmp_path / "00000001"
    record = json.loads((target / "record.json").read_text())["record"]
    (other / "state").rename(target / "other")
    for path in sorted((target / "state").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (target / "state").rmdir()
    (target / "other").rename(target / "state")
    record["files"] = {
        p.relative_to(target).as_posix(): checkpoint._file_digest(p) for p in checkpoint._files(target / "state")
    }
    checkpoint.write_json(target / "record.json", {"sha256": checkpoint._sha256(record), "record": record})
    with pytest.raises(checkpoint.Damaged, match="arrays differ"):
        checkpoint.restore(target, template)
    assert np.array_equal(template["w"], np.arange(4.0))
