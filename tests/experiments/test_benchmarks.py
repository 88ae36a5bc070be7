"""The benchmarks time what they say, and the figures they write hold together."""

import json

import numpy as np
import pytest

from experiments.benchmarks import limit, pairs, workloads
from experiments.benchmarks.__main__ import main

TINY = workloads.W1._replace(name="tiny", data=lambda: workloads.synthetic(clients=5), cohorts=(2,))


@pytest.fixture(scope="module")
def data():
    return TINY.data()


def test_steps_by_hand():
    # 5 epochs of batches of 10: 101 examples make 11 batches, 50 make 5, one makes 1.
    assert TINY.steps(np.array([101, 50, 1])) == 5 * (11 + 5 + 1)


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


def test_sizes_follow_the_power_law():
    # Density ~ 1/s^2 on [50, 1001): half of it lies below 2 / (1/50 + 1/1001) = 95.2.
    sizes = workloads.power_law_sizes(100_000, 50, 1000, np.random.default_rng(0))
    assert sizes.min() == 50
    assert 990 < sizes.max() <= 1000
    assert np.mean(sizes < 95.2) == pytest.approx(0.5, abs=0.01)


def test_both_sides_make_the_same_steps(data):
    limit.check_same_steps(TINY, data)


def test_sides_that_differ_are_not_timed(data):
    other = TINY._replace(params=lambda: {k: v + 0.01 for k, v in TINY.params().items()})
    with pytest.raises(RuntimeError, match="different models"):
        limit.check_same_steps(other, data)


def test_summary_by_hand():
    row = pairs.summary("w", 2, "loop", [(1.0, 2.0), (9.0, 3.0), (2.0, 4.0)], "us")
    assert row == pairs.Row("w", 2, "loop", 2 / 3, 2.0, 3.0, "us", 3)


def test_limit_writes_its_figures(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", TINY)
    file = tmp_path / "out" / "limit.json"
    assert main(["limit", "--workloads", "tiny", "--quick", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())
    assert set(row) == set(pairs.Row._fields)
    assert (row["workload"], row["cohort"], row["runs"]) == ("tiny", 2, 3)
    assert row["ratio"] == row["ours"] / row["theirs"] > 0
    assert "tiny" in capsys.readouterr().out


def test_unknown_workload_is_named_with_the_nearest(capsys):
    assert main(["limit", "--workloads", "w11"]) == 2
    assert "did you mean 'w1'" in capsys.readouterr().err
