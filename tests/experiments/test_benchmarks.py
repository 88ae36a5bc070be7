"""The benchmarks time what they say, and the figures they write hold together."""

import json

import jax
import numpy as np
import pytest

import fedjax_lab as fl
from experiments.benchmarks import devices, engine, fresh, growth, limit, memory, pairs, populations, startup, workloads
from experiments.benchmarks.__main__ import main
from experiments.benchmarks.peers import links_runner

TINY = workloads.W1._replace(
    name="tiny",
    sizes=lambda rng: np.array([57, 31, 80, 44, 10]),
    cohorts=(2,),
    made=("tests.experiments.test_benchmarks", "TINY"),
)


@pytest.fixture(scope="module")
def data():
    return TINY.data()


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", TINY)


# ---- workloads ----


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("w1", 60 * 10 + 10),
        ("w2", (9 + 1) * 32 + (9 * 32 + 1) * 64 + (12 * 12 * 64 + 1) * 128 + (128 + 1) * 62),
        ("w3", (27 + 1) * 32 + (9 * 32 + 1) * 64 + (14 * 14 * 64 + 1) * 128 + (128 + 1) * 10),
        ("w4", 90 * 8 + (8 + 256 + 1) * 1024 + (256 + 256 + 1) * 1024 + (256 + 1) * 90),
    ],
)
def test_the_models_have_the_sizes_of_their_layers(name, count):
    work = workloads.WORKLOADS[name]
    shapes = jax.eval_shape(work.model().init, jax.random.key(0))[0]
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("name", ["w1", "w2", "w3", "w4"])
def test_the_hand_written_models_are_the_same_models(name):
    work = workloads.WORKLOADS[name]
    few = work.make_data(np.array([3])).arrays
    shapes = jax.eval_shape(work.model().init, jax.random.key(0))[0]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: 0.1 * rng.standard_normal(p.shape, np.float32), shapes)
    with jax.disable_jit(name != "w4"):  # its loop over characters would be slow so
        theirs = work.mean_loss(params, few["x"], few["y"])
        ours = work.model().loss(params, (), few, np.ones(3, bool), None, True)[0].mean()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_arithmetic_of_a_step_by_hand():
    # EMNIST CNN, batch 20: 0.195 + 10.617 + 1.180 + 0.008 million multiply-adds forward, 6 flop each in a step.
    forward = 26 * 26 * 9 * 32 + 24 * 24 * 288 * 64 + 9216 * 128 + 128 * 62
    assert workloads.W2.gigaflop == pytest.approx(6 * 20 * forward / 1e9)
    assert workloads.W2.gigaflop == pytest.approx(1.44, abs=0.005)


def test_steps_by_hand():
    # 5 epochs of batches of 10: 101 examples make 11 batches, 50 make 5, one makes 1.
    assert TINY.steps(np.array([101, 50, 1])) == 5 * (11 + 5 + 1)
    assert workloads.W3.steps(workloads.W3.sizes(np.random.default_rng(0))[:50]) == 50 * 5


def test_the_populations_are_as_described():
    rng = np.random.default_rng(1)
    sizes = {name: work.sizes(rng) for name, work in workloads.WORKLOADS.items()}
    assert len(sizes["w1"]) == 1000 and sizes["w1"].min() >= 50 and sizes["w1"].max() <= 1000
    assert sizes["w2"].min() >= 50 and sizes["w2"].max() <= 350
    assert (sizes["w3"] == 50).all()
    assert [max(w.cohorts) <= len(sizes[n]) for n, w in workloads.WORKLOADS.items()] == [True] * 4


def test_whole_batches(data):
    sizes = np.asarray(TINY.data(whole_batches=True).sizes)
    assert sizes.tolist() == [60, 40, 80, 50, 10]
    assert np.asarray(data.sizes).tolist() == [57, 31, 80, 44, 10]


def test_text_has_no_padding_and_predicts_the_next_character():
    arrays = populations.text(np.array([4, 2]), length=30, symbols=9).arrays
    assert arrays["x"].shape == (6, 30) and arrays["x"].min() >= 1 and arrays["y"].max() <= 8
    np.testing.assert_array_equal(arrays["x"][:, 1:], arrays["y"][:, :-1])


def test_sizes_follow_the_power_law():
    # Density ~ 1/s^2 on [50, 1001): half of it lies below 2 / (1/50 + 1/1001) = 95.2.
    sizes = populations.power_law_sizes(100_000, 50, 1000, np.random.default_rng(0))
    assert sizes.min() == 50
    assert 990 < sizes.max() <= 1000
    assert np.mean(sizes < 95.2) == pytest.approx(0.5, abs=0.01)


def test_cohorts_in_turn(data):
    sampler = engine.in_turn([[3, 1], [0, 4], [2, 3]])
    state, seen = sampler.init(data), []
    for _ in range(4):
        ids, present, state = sampler.sample(state, jax.random.key(0), data, None)
        assert present.all()
        seen.append(ids.tolist())
    assert seen == [[3, 1], [0, 4], [2, 3], [3, 1]]
    with pytest.raises(ValueError, match="outside the population"):
        engine.in_turn([[9, 1]]).init(data)


# ---- limit ----


def test_every_example_is_read_once_an_epoch_and_no_other_clients(data):
    cohort = np.array([3, 1])
    rows = limit.batches(TINY, data, cohort, seed=0)
    sizes = np.asarray(data.sizes)[cohort]
    assert rows.shape == (TINY.steps(sizes), TINY.batch_size)
    for k, first in ((3, 0), (1, TINY.steps(sizes[:1]))):
        epoch = rows[first : first + -(-data.sizes[k] // TINY.batch_size)].ravel()
        own = data.starts[k] + np.arange(data.sizes[k])
        np.testing.assert_array_equal(np.sort(epoch[: data.sizes[k]]), own)
        assert np.isin(epoch, own).all()


def test_both_sides_make_the_same_steps(data):
    limit.check_same_steps(TINY, data)


def test_in_a_loop_or_at_top_level_the_steps_are_the_same(data):
    rows = limit.batches(TINY, data, np.array([0, 2]), seed=0)
    inside, outside = (limit.hand_written(TINY, top)(data.arrays, rows, TINY.params()) for top in (False, True))
    np.testing.assert_allclose(inside["output"]["kernel"], outside["output"]["kernel"], rtol=1e-4, atol=1e-6)


def test_sides_that_differ_are_not_timed(data):
    other = TINY._replace(mean_loss=lambda params, x, y: 1.01 * TINY.mean_loss(params, x, y))
    with pytest.raises(limit.DifferentSteps, match="different models"):
        limit.check_same_steps(other, data)


# ---- figures ----

PAIRS = [pairs.Pair(1.0, 2.0, 0.5), pairs.Pair(9.0, 3.0, 2.5), pairs.Pair(2.0, 4.0, 1.0)]


def test_summary_by_hand():
    measured = pairs.summary("w", 2, "loop", PAIRS, "us")
    assert measured.row == pairs.Row("w", 2, "loop", 2 / 3, 2.0, 3.0, "us", 3)
    assert measured.pairs == tuple(PAIRS)
    assert pairs.spread(PAIRS) == (0.5, 1.75)  # of the ratios 1/2, 3, 1/2


def test_the_line_of_a_table_lies_under_its_header():
    shown = pairs.line(pairs.summary("w", 2, "loop", PAIRS, "us"))
    assert shown.split() == ["w", "2", "loop", "0.667", "0.5-1.75", "2", "3", "us", "3", "0.5-2.5"]
    assert shown.index("loop") == pairs.HEADER.index("against")
    assert shown.index("us") == pairs.HEADER.index("unit")


def test_ours_and_theirs_take_turns_in_going_first():
    order = []
    pair = [pairs.alternating(run, lambda side: order.append(side) or 1.0 + side) for run in range(2)]
    assert order == [0, 1, 1, 0]
    assert [(p.ours, p.theirs) for p in pair] == [(1.0, 2.0)] * 2


def test_what_is_written(tmp_path):
    file = tmp_path / "out" / "a.json"
    measured = pairs.summary("w", 2, "loop", PAIRS, "us")
    pairs.write([measured, measured], file, "title")
    rows = json.loads(file.read_text())
    assert [set(row) for row in rows] == [set(pairs.Row._fields)] * 2
    assert pairs.Row(**rows[0]) == measured.row
    raw = json.loads(file.with_suffix(".runs.json").read_text())
    assert raw["rows"][0]["pairs"][1] == {"ours": 9.0, "theirs": 3.0, "load": 2.5}
    assert raw["machine"].startswith("jax ")
    assert file.with_suffix(".png").stat().st_size > 1000


# ---- commands ----


def test_limit_writes_its_figures(tiny, tmp_path, capsys):
    file = tmp_path / "limit.json"
    assert main(["limit", "--workloads", "tiny", "--quick", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())
    assert (row["workload"], row["cohort"], row["against"], row["runs"]) == ("tiny", 2, "lax.scan", 3)
    assert row["ratio"] == row["ours"] / row["theirs"] > 0
    assert "tiny" in capsys.readouterr().out


def test_unknown_names_are_named_with_the_nearest(capsys):
    for arguments, near in (
        (["limit", "--workloads", "w11"], "did you mean 'w1'"),
        (["growth", "--parts", "widht"], "did you mean 'width'"),
        (["growth", "--workloads", "w11"], "did you mean 'w1'"),
        (["memory", "--workloads", "w11"], "did you mean 'w1'"),
        (["peers", "--peers", "flwer"], "did you mean 'flower'"),
        (["peers", "--peers", ","], "at least one peer"),
    ):
        assert main(arguments) == 2
        assert near in capsys.readouterr().err


def test_a_path_that_takes_no_figures_is_refused_before_they_are_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fresh, "call", lambda *arguments: pytest.fail("measured"))
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "memory.json"):
        assert main(["memory", "--quick", "--json", str(path)]) == 2
        assert "a folder" in capsys.readouterr().err


def test_growth_is_measured_on_any_workload(tiny, monkeypatch):
    asked = []
    monkeypatch.setitem(growth.PARTS, "cohort", lambda quick, work: asked.append(work.name) or [])
    monkeypatch.setitem(growth.PARTS, "width", lambda quick: asked.append("width") or [])
    assert main(["growth", "--parts", "cohort,width", "--workloads", "w1,tiny"]) == 0
    assert asked == ["w1", "tiny", "width"]


def test_devices_that_disagree_are_not_timed(data, monkeypatch):
    real = engine.process
    wrong = TINY._replace(learning_rate=0.0101)
    monkeypatch.setattr(engine, "process", lambda r, d, s, count: real(r if count == 1 else wrong.algorithm(), d, s, 1))
    devices.check_same(TINY, data, np.array([0, 1]), 1)
    with pytest.raises(devices.Disagree, match="2 devices differ from one"):
        devices.check_same(TINY, data, np.array([0, 1]), 2)


def test_a_population_with_states_is_what_it_says():
    process, state, seconds = growth.set_up(50, 5)
    assert process.data.num_clients == 50 and seconds > 0
    state, metrics = process.step(state, process.data)
    assert int(metrics["survivors"]) == 5
    assert int(np.sum(process.clients(state).known)) == 5
    assert {leaf.shape[0] for leaf in jax.tree.leaves(process.clients(state).table)} == {50}


def test_wide_models_are_the_same_by_hand():
    work = growth.wide(8)
    limit.check_same_steps(work, work.data())


def test_startup_by_hand(tiny, monkeypatch, tmp_path, capsys):
    def call(module, name, arguments, environ):
        assert (module, name, arguments) == (startup.HERE, "first_round", {"workload": "w1", "cohort": 10})
        folder = environ["JAX_COMPILATION_CACHE_DIR"]
        calls.append(folder)
        return {"import": 1.0, "first": 6.0 if calls.count(folder) == 1 else 3.0, "next": 2.0}

    calls: list[str] = []
    monkeypatch.setattr(fresh, "call", call)
    file = tmp_path / "startup.json"
    assert main(["startup", "--workloads", "w1", "--json", str(file)]) == 0
    rows = [pairs.Row(**row) for row in json.loads(file.read_text())]
    assert rows[0] == pairs.Row("w1", 10, "target, cold", 6 / 3, 6.0, 3.0, "s", 5)
    assert rows[1] == pairs.Row("w1, warm", 10, "cold", 3 / 6, 3.0, 6.0, "s", 5)
    assert rows[2] == pairs.Row("w1, warm", 10, "cold", 1 / 4, 1.0, 4.0, "s but a round", 5)
    assert len(set(calls)) == 5  # a cache of its own for each pair


def test_memory_by_hand(monkeypatch, tmp_path):
    def call(module, name, arguments):
        large = max(arguments.get("clients", 0) / 100_000, arguments["cohort"] / 1000) >= 1
        return {"before": 100.0, "peak": 400.0 if large else 200.0, "model": 2.0, "needed": 50.0 if large else 5.0}

    monkeypatch.setattr(fresh, "call", call)
    file = tmp_path / "memory.json"
    assert main(["memory", "--workloads", "w2", "--quick", "--json", str(file)]) == 0
    rows = [pairs.Row(**row) for row in json.loads(file.read_text())]
    assert rows.pop(1) == pairs.Row("w2", 100, "cohort 10", 1.0, 200.0, 200.0, "MiB peak", 1)
    assert rows[0] == pairs.Row("mlp 512", 100, "cohort 10", 1.0, 200.0, 200.0, "MiB peak", 1)
    assert rows[1] == pairs.Row("100,000 clients", 100, "10,000 clients", 2.0, 400.0, 200.0, "MiB peak", 1)
    assert rows[2] == pairs.Row("100,000 clients", 100, "data and states", 6.0, 300.0, 50.0, "MiB", 1)


def test_peak_memory_sees_what_was_held():
    before = memory.peak()
    held = np.ones(int(1.1 * before) * 2**20, np.uint8)  # more than ever
    assert 1.05 * before < memory.peak() < before + 2 * held.nbytes / 2**20


def test_a_fresh_process_returns_or_says_why_not():
    assert isinstance(fresh.call("math", "floor", {}), int)
    with pytest.raises(fresh.Failed, match="AttributeError"):
        fresh.call("math", "nothing", {})


def test_the_engine_takes_the_devices_it_is_told(data):
    process = engine.process(TINY.algorithm(), data, fl.fixed([0, 1]), 1)
    call = engine.rounds(process, process.init(jax.random.key(0)))
    assert [int(call()[0].round) for _ in range(3)] == [1, 2, 3]


# ---- links ----


def test_the_other_libraries_links_lose_what_ours_lose():
    """Top-k is the same vector; QSGD's squared errors agree within a tenth (a standard error is .2% of them)."""
    x = np.random.default_rng(1).standard_normal(20_000, np.float32)
    opened = fl.wire.round_trip(fl.wire.top_k(links_runner.SHARE), jax.numpy.asarray(x))[0]
    np.testing.assert_array_equal(links_runner.numpy_top_k(x), opened)
    error = lambda out: np.sum((np.asarray(out) - x) ** 2) / np.sum(x**2)
    ours = error(fl.wire.round_trip(fl.wire.qsgd(8), jax.numpy.asarray(x))[0])
    assert error(links_runner.numpy_qsgd(x)) == pytest.approx(ours, rel=0.1)
