"""The comparison with other frameworks: the same work on both sides, or no figures. None of them is needed here."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from experiments.benchmarks import pairs, workloads
from experiments.benchmarks.__main__ import main
from experiments.benchmarks.peers import command, environments, exchange, fedjax_runner, ours, torch_models

TINY = workloads.W1._replace(name="tiny", sizes=lambda rng: np.array([57, 31, 80, 44, 10]), cohorts=(2,))
COHORTS = np.array([[3, 1], [1, 4]])


@pytest.fixture
def task(tmp_path):
    file = tmp_path / "task.npz"
    exchange.write_task(file, TINY, TINY.data(whole_batches=True), COHORTS)
    return exchange.read_task(file)


# ---- tasks and outcomes ----


def test_a_task_holds_the_clients_that_take_part(task):
    data = TINY.data(whole_batches=True)
    assert task.sizes.tolist() == [40, 50, 10]  # clients 1, 3 and 4
    assert task.cohorts.tolist() == [[1, 0], [0, 2]]
    for place, k in enumerate((1, 3, 4)):
        rows = slice(task.starts[place], task.starts[place] + task.sizes[place])
        own = slice(data.starts[k], data.starts[k] + data.sizes[k])
        np.testing.assert_array_equal(task.arrays["x"][rows], data.arrays["x"][own])
        np.testing.assert_array_equal(task.arrays["y"][rows], data.arrays["y"][own])


def test_the_runners_read_what_we_write(tmp_path):
    file = tmp_path / "task.npz"
    exchange.write_task(file, TINY, TINY.data(), COHORTS)
    for load in (fedjax_runner.load, torch_models.load):
        arrays, settings, params = load(str(file))
        assert settings == {"model": "linear", "learning_rate": 0.01, "batch_size": 10, "epochs": 5}
        assert set(params) == {"output/bias", "output/kernel"}
        assert set(arrays) == {"x", "y", "starts", "sizes", "cohorts"}


def test_nothing_in_a_task_is_unpickled(tmp_path):
    np.savez(tmp_path / "evil.npz", task=np.array([print], dtype=object))
    for load in (exchange.read_task, fedjax_runner.load, torch_models.load):
        with pytest.raises((ValueError, KeyError)):
            load(tmp_path / "evil.npz")


def test_names_and_nests_are_inverse():
    tree = {"a": {"b": np.ones(2), "c": {"d": np.zeros(1)}}, "e": np.ones(3)}
    assert set(exchange.named(tree)) == {"a/b", "a/c/d", "e"}
    jax.tree.map(np.testing.assert_array_equal, exchange.nested(exchange.named(tree)), tree)


def test_an_outcome_comes_back(tmp_path):
    outcome = exchange.Outcome([1.5, 0.5], {"a/b": np.arange(3.0)}, {"jax": "1"})
    exchange.write_outcome(tmp_path / "one", outcome)
    back = exchange.read_outcome(tmp_path / "one")
    assert (back.seconds, back.versions) == (outcome.seconds, outcome.versions)
    np.testing.assert_array_equal(back.params["a/b"], outcome.params["a/b"])


def test_time_per_step_by_hand(task):
    # Two rounds; the first is left out. The second: 40 and 10 examples, 5 epochs of 5 batches.
    outcome = exchange.Outcome([99.0, 0.05], {}, {})
    assert command.per_step(TINY, task, outcome) == pytest.approx(1e6 * 0.05 / 25)


# ---- the check before any time is believed ----


def test_in_the_check_no_order_matters():
    data = exchange.alike(TINY, 5)
    sizes = np.asarray(data.sizes)
    assert sorted(sizes.tolist()) == [10, 10, 20, 20, 30]
    firsts = []
    for k in range(5):
        rows = np.asarray(data.arrays["x"])[data.starts[k] : data.starts[k] + sizes[k]]
        assert (rows == rows[0]).all()
        firsts.append(rows[0])
    assert len(np.unique(firsts, axis=0)) == 5


def train(work, file):
    return ours.train(work, exchange.read_task(file)).params


def test_our_side_reaches_what_numpy_reaches(tmp_path):
    """FedAvg by hand on the check's data: client after client, batch after batch, weighted by examples."""
    work = TINY._replace(epochs=2)
    file = tmp_path / "check.npz"
    exchange.write_task(file, work, exchange.alike(work, 5), np.array([[0, 1, 2], [4, 3, 1]]))
    task = exchange.read_task(file)
    weights = {name: value.astype(np.float64) for name, value in task.params.items()}
    for cohort in task.cohorts:
        sums = {name: np.zeros_like(value) for name, value in weights.items()}
        for k in cohort:
            w, b = weights["output/kernel"].copy(), weights["output/bias"].copy()
            x, y = task.arrays["x"][task.starts[k]], task.arrays["y"][task.starts[k]]
            for _ in range(work.epochs * task.sizes[k] // work.batch_size):
                scores = x @ w + b
                gap = np.exp(scores - scores.max())
                gap = gap / gap.sum() - np.eye(10)[y]
                w, b = w - work.learning_rate * np.outer(x, gap), b - work.learning_rate * gap
            sums["output/kernel"] += task.sizes[k] * w
            sums["output/bias"] += task.sizes[k] * b
        weights = {name: value / task.sizes[cohort].sum() for name, value in sums.items()}
    assert exchange.check_equal("numpy", task.params, train(work, file), weights) < 1e-5


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.0101},
        {"epochs": 4},
        {"batch_size": 20},
        {"mean_loss": None, "model": lambda: workloads.fl.models.logistic_regression(10, (60,), bias=False)},
    ],
    ids=["learning rate", "epochs", "batch size", "model"],
)
def test_a_planted_mismatch_is_caught(wrong, tmp_path):
    file = tmp_path / "check.npz"
    exchange.write_task(file, TINY, exchange.alike(TINY, 5), np.array([[0, 1, 2], [4, 3, 1]]))
    task = exchange.read_task(file)
    right = train(TINY, file)
    assert exchange.check_equal("same", task.params, right, dict(right)) == 0
    if "model" in wrong:
        other = {name: value for name, value in right.items() if name != "output/bias"}
    else:
        other = train(TINY._replace(**wrong), file)
    with pytest.raises(exchange.Mismatch, match=r"apart|other parameters"):
        exchange.check_equal("planted", task.params, right, other)


def test_a_wrong_weighting_is_caught(tmp_path):
    """A peer that weighs clients alike."""
    file = tmp_path / "check.npz"
    exchange.write_task(file, TINY, exchange.alike(TINY, 5), np.array([[0, 1, 2]]))
    task, alone = exchange.read_task(file), []
    for k in range(3):
        exchange.write_task(file, TINY, exchange.alike(TINY, 5), np.array([[k]]))
        alone.append(train(TINY, file))
    exchange.write_task(file, TINY, exchange.alike(TINY, 5), np.array([[0, 1, 2]]))
    uniform = {name: np.mean([one[name] for one in alone], axis=0) for name in task.params}
    with pytest.raises(exchange.Mismatch, match="apart"):
        exchange.check_equal("uniform", task.params, train(TINY, file), uniform)


def test_sides_that_did_not_move_or_are_not_finite_are_refused():
    start, there = {"a": np.zeros(2)}, {"a": np.ones(2)}
    for one, other in ((start, start), (there, {"a": np.array([1.0, np.nan])}), ({"a": np.full(2, np.nan)}, there)):
        with pytest.raises(exchange.Mismatch):
            exchange.check_equal("side", start, one, other)


def test_losses_that_fell_otherwise_are_refused(task):
    ours_ = ours.train(TINY, task).params
    exchange.check_losses("same", TINY, task, ours_, ours_)
    barely = {name: task.params[name] + 0.1 * (ours_[name] - task.params[name]) for name in ours_}
    for other in (barely, task.params):
        with pytest.raises(exchange.Mismatch, match="loss fell"):
            exchange.check_losses("other", TINY, task, ours_, other)


# ---- layouts ----


def shapes(name):
    tree = jax.eval_shape(workloads.WORKLOADS[name].model().init, jax.random.key(0))[0]
    rng = np.random.default_rng(0)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(k.key for k in path): rng.random(leaf.shape, np.float32) for path, leaf in leaves}


@pytest.mark.parametrize("name", ["w1", "w2", "w3", "w4"])
def test_parameters_survive_the_way_to_haiku_and_back(name):
    params = shapes(name)
    back = fedjax_runner.from_haiku(fedjax_runner.to_haiku(params), params)
    assert set(back) == set(params)
    for key, value in params.items():
        np.testing.assert_allclose(back[key], value, rtol=1e-6)


@pytest.mark.parametrize("name", ["w1", "w2", "w3", "w4"])
def test_parameters_survive_the_way_to_torch_and_back(name):
    params = shapes(name)
    for key, value in params.items():
        _, there, back = torch_models._layout(key, params)
        np.testing.assert_array_equal(back(there(value)), value)


def test_a_dense_layer_sees_the_same_pixels_in_both_layouts():
    params = shapes("w3")
    kernel = params["dense/kernel"]
    images = np.random.default_rng(1).random((2, 14, 14, 64), np.float32)
    there = torch_models._layout("dense/kernel", params)[1](kernel)
    theirs = images.transpose(0, 3, 1, 2).reshape(2, -1) @ there.T
    np.testing.assert_allclose(images.reshape(2, -1) @ kernel, theirs, rtol=1e-3)


def test_haikus_gates_by_hand():
    # One unit: our columns are input, forget, cell, output; Haiku's input, cell, forget (plus one), output.
    params = {
        "lstm_0/input/kernel": np.array([[1.0, 2, 3, 4]]),
        "lstm_0/input/bias": np.array([5.0, 6, 7, 8]),
        "lstm_0/recurrent": np.array([[10.0, 20, 30, 40]]),
    }
    tree = fedjax_runner.to_haiku(params)
    assert tree["lstm_0/linear"]["w"].tolist() == [[1, 3, 2, 4], [10, 30, 20, 40]]
    assert tree["lstm_0/linear"]["b"].tolist() == [5, 7, 5, 8]


# ---- the command ----


def test_a_peer_that_cannot_be_installed_is_named_and_left_out(tmp_path, capsys):
    missing = str(tmp_path / "no_python")
    assert main(["peers", "--workloads", "w1", "--quick", "--cache", str(tmp_path), "--python", missing]) == 0
    out = capsys.readouterr().out
    for name in environments.PEERS:
        assert f"{name} can't be installed: " in out


def test_an_environment_is_made_once_for_its_packages(monkeypatch, tmp_path):
    peer = environments.PEERS["pfl"]
    calls = []
    monkeypatch.setattr(environments, "_quietly", lambda peer, command: calls.append(command) or _folder(command))
    first = environments.environment(peer, tmp_path)
    assert environments.environment(peer, tmp_path) == first
    assert len(calls) == 2  # the environment, and its packages
    assert set(peer.packages) <= set(calls[1])
    other = environments.environment(peer._replace(packages=("pfl==0.5",)), tmp_path)
    assert other != first and len(calls) == 4
    (first.parents[1] / environments.STAMP).unlink()  # an installation that was interrupted
    environments.environment(peer, tmp_path)
    assert len(calls) == 6


def _folder(command):
    if "venv" in command:
        pathlib.Path(command[-1]).mkdir(parents=True)


@pytest.fixture
def in_process(monkeypatch):
    """Both sides in this process; the peer is ours, with what ``spoil`` makes of its outcome."""
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", TINY)
    monkeypatch.setattr(command, "environment", lambda peer, folder, python: pathlib.Path("python"))
    trained = {}

    def mine(work, file):  # once for each task: all of them start at the same place
        content = file.read_bytes()
        if content not in trained:
            trained[content] = ours.train(work, exchange.read_task(file))
        return trained[content]

    monkeypatch.setattr(command, "run_ours", lambda file, outcome, work: mine(work, file))

    def plant(spoil):
        monkeypatch.setattr(command, "run_peer", lambda peer, python, file, outcome, options: spoil(mine(TINY, file)))

    return plant


def test_peers_writes_its_figures(in_process, tmp_path, capsys):
    in_process(lambda outcome: outcome._replace(seconds=[10 * s for s in outcome.seconds]))
    file = tmp_path / "peers.json"
    assert main(["peers", "--workloads", "tiny", "--peers", "pfl,fedjax", "--quick", "--json", str(file)]) == 0
    rows = [pairs.Row(**row) for row in json.loads(file.read_text())]
    assert [row.against.split(" (")[0] for row in rows] == ["pfl", "fedjax"]
    for row in rows:
        assert (row.workload, row.cohort, row.unit, row.runs) == ("tiny", 2, "us per step", 1)
        assert row.ratio == row.ours / row.theirs
    assert "the same parameters within" in capsys.readouterr().out


def test_a_peer_that_computes_something_else_is_an_error_and_has_no_figures(in_process, tmp_path, capsys):
    in_process(lambda outcome: outcome._replace(params={n: 1.01 * v for n, v in outcome.params.items()}))
    file = tmp_path / "peers.json"
    assert main(["peers", "--workloads", "tiny", "--peers", "fedjax", "--quick", "--json", str(file)]) == 1
    assert "nothing was timed" in capsys.readouterr().err
    assert not file.exists()


def test_a_process_that_fails_says_why(tmp_path):
    program = [sys.executable, "-c", "raise ValueError('planted')"]
    with pytest.raises(command.Failed, match=r"status 1(.|\n)*ValueError: planted"):
        command._outcome("peer", program, tmp_path / "out", {}, tmp_path)
