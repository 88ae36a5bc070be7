"""The MNIST experiment: counting rounds, judging the table, and all of it with tiny settings."""

import math

import jax
import numpy as np
import pytest

import fedjax_lab as fl
from experiments import cli, fedavg_mnist, fedavg_mnist_report
from tests.experiments.checking import read_folder


def records(*accuracies):
    return [{"round": r, "accuracy": a} for r, a in accuracies]


def test_rounds_are_counted_as_in_the_paper():
    count = fedavg_mnist.rounds_to
    # Best so far 0.90 after round 3, 0.98 after 4: 3 + 0.07 / 0.08.
    assert count(records((0, 0.1), (1, 0.5), (2, 0.4), (3, 0.9), (4, 0.98)), 0.97) == pytest.approx(3.875)
    # The monotone curve goes from (2, 0.95) to (3, 0.99): the dip after round 2 doesn't count.
    assert count(records((0, 0.1), (1, 0.95), (2, 0.90), (3, 0.99)), 0.97) == pytest.approx(2.5)
    # Not every round is evaluated: from (10, 0.96) to (20, 0.98).
    assert count([{"round": 5}, *records((10, 0.96), (20, 0.98))], 0.97) == pytest.approx(15)
    assert count(records((0, 0.1), (1, 0.969)), 0.97) is None
    assert count(records((0, 0.98)), 0.97) == 0


def test_a_cell_is_given_up_in_time():
    config, cell = fedavg_mnist.Config(), fedavg_mnist.CELLS
    allowed = {name: fedavg_mnist.rounds_allowed(config, cell[name]) for name in cell}
    assert allowed["iid/0.1/10"] == math.ceil(1.2 * 87)
    assert allowed["shards/0.1/10"] == math.ceil(1.2 * 664) == 797
    assert allowed["iid/0.1/inf"] == 300
    assert allowed["shards/0/10"] == 800


def test_a_learning_rate_that_is_slower_than_the_best_is_given_up(monkeypatch, tmp_path):
    asked = []

    def run(process, num_rounds, seed, **options):
        asked.append(num_rounds)
        return fl.Result(None, None, records((0, 0.1), (6, 0.9), (7, 0.97)), 0, 0, 7, "", 0.0, 0.0)

    monkeypatch.setattr(fl, "run", run)
    monkeypatch.setattr(fl, "synchronous", lambda *args, **options: None)
    monkeypatch.setattr(fl, "global_metrics", lambda test: None)
    config, cell, best = fedavg_mnist.Config(), fedavg_mnist.CELLS["iid/0.1/10"], {}
    for seed, rate in ((0, 0.2), (0, 0.1), (1, 0.2)):
        attempt = fedavg_mnist.Attempt(cell, seed, rate)
        fedavg_mnist.training(config, attempt, lambda *key: fl.Split(None, None), best)(tmp_path, None)
    assert asked == [105, 7, 105]
    assert best == {(cell, 0): 7, (cell, 1): 7}


def test_the_network_begins_as_asked():
    starts = {
        name: fedavg_mnist.network(fedavg_mnist.Config(initialization=name)).init(jax.random.key(0))[0]
        for name in ("pytorch", "flax")
    }
    for layer, inputs in (("hidden_0", 784), ("hidden_1", 200), ("output", 200)):
        for w in starts["pytorch"][layer].values():  # uniform within one over the root of the inputs
            assert 0.5 * inputs**-0.5 < np.abs(w).max() <= inputs**-0.5 + 1e-7
        kernels = [start[layer]["kernel"] for start in starts.values()]
        assert np.std(kernels[0]) == pytest.approx((3 * inputs) ** -0.5, rel=0.1)
        assert np.std(kernels[1]) == pytest.approx(inputs**-0.5, rel=0.1)
        assert not starts["flax"][layer]["bias"].any()


def test_short_cells_are_run_with_every_seed_and_data_are_loaded_once():
    config = fedavg_mnist.Config(cells=("iid/0.1/inf", "shards/0.1/10", "iid/0/10"), seeds=(5, 3))
    attempts = fedavg_mnist.all_attempts(config, [fedavg_mnist.CELLS[name] for name in config.cells])
    assert [(a.cell.name, a.seed, a.learning_rate) for a in attempts] == [
        ("iid/0.1/inf", 5, 0.5), ("iid/0/10", 5, 0.2), ("iid/0/10", 5, 0.1), ("iid/0/10", 3, 0.2), ("iid/0/10", 3, 0.1),
        ("shards/0.1/10", 5, 0.05),
    ]  # fmt: skip


def row(cell, rate, reached, rounds=800, seed=0):
    key = fedavg_mnist.CELLS[cell]
    return {
        "run": f"{cell} lr={rate} seed={seed}", "cell": cell, "seed": seed, "learning_rate": rate,
        "published": key.published, "rounds_to_target": reached, "rounds": rounds, "seconds": 1.0,
    }  # fmt: skip


def verdicts(*rows, config=fedavg_mnist.PAPER):
    checks = fedavg_mnist_report.all_checks(config, fedavg_mnist.PAPER, rows, 199210)
    return {c.name: c for c in checks}


def test_the_best_learning_rate_is_judged():
    name = "iid/0.1/10: rounds to 97%"
    best = verdicts(row("iid/0.1/10", 0.2, 120.0), row("iid/0.1/10", 0.1, 60.0))[name]
    assert best.ok and best.ours == {"mean": 60.0, "seeds": [60.0]}
    two = verdicts(row("iid/0.1/10", 0.2, 34.0), row("iid/0.1/10", 0.2, 40.0, seed=1))[name]
    assert two.ok and two.ours == {"mean": 37.0, "seeds": [34.0, 40.0]}
    half = verdicts(row("iid/0.1/10", 0.2, 40.0), row("iid/0.1/10", 0.2, None, 105, seed=1))[name]
    assert not half.ok and half.ours == {"mean": "over 72.5", "seeds": [40.0, 105]}
    assert verdicts(row("iid/0.1/10", 0.2, 100.0))[name].ok
    assert not verdicts(row("iid/0.1/10", 0.2, 34.9))[name].ok
    assert not verdicts(row("iid/0.1/10", 0.2, None, 105))[name].ok  # not reached
    absent = verdicts(row("iid/0.2/10", 0.2, 40.0))[name]
    assert absent.ok is None and "not run" in absent.reason
    other = verdicts(row("iid/0.1/10", 0.2, 60.0), config=fedavg_mnist.Config(target=0.9))
    assert other[name].ok is None
    assert other["parameters of the 2NN"].ok


def test_orderings():
    name = "the full batch needs more rounds than B=10 (B)"
    judge = lambda full, rounds, ten: verdicts(row("iid/0.1/inf", 0.5, full, rounds), row("iid/0.1/10", 0.2, ten))[name]
    assert judge(150.0, 150, 40.0).ok
    assert judge(None, 300, 40.0).ok  # over 300
    assert judge(None, 300, 40.0).ours == {"iid/0.1/inf": "over 300.0", "iid/0.1/10": "40.0"}
    assert not judge(39.0, 39, 40.0).ok
    assert not judge(None, 30, 40.0).ok  # given up too early to tell
    assert not judge(150.0, 150, None).ok


def test_the_table_lists_what_was_not_run():
    tried = [
        row("iid/0.1/10", 0.2, 41.26), row("iid/0.1/10", 0.1, None, 42),
        row("iid/0.1/10", 0.2, 50.0, seed=1), row("iid/0.1/10", 0.1, 45.0, seed=1),
    ]  # fmt: skip
    shown = fedavg_mnist_report.table(tried, list(fedavg_mnist.CELLS.values()))
    assert len(shown.rows) == 20
    assert ("iid", "0.1", "10", "87", "43.1", "41.3 45.0", "0.2: 1, 0.1: 1", "4") in shown.rows
    assert sum(r[4] == "not run" for r in shown.rows) == 19


def test_unknown_cells_are_named_with_the_nearest(capsys):
    assert cli.main(["run", "fedavg_mnist", "--cells", "iid/0.1/100"]) == 2
    assert "did you mean 'iid/0.1/10'" in " ".join(capsys.readouterr().err.split())


def test_without_the_data_it_says_how_to_supply_them(tmp_path, monkeypatch, capsys):
    def nowhere(*args):
        raise FileNotFoundError("MNIST is in none of the folders; pass data_dir=FOLDER")

    monkeypatch.setattr(fl.datasets, "mnist", nowhere)
    assert cli.main(["reproduce", "fedavg_mnist", "--quick", "--no-cache", "--out", str(tmp_path)]) == 2
    assert "data_dir=FOLDER" in capsys.readouterr().err


@pytest.mark.slow
def test_end_to_end(data_dir, tmp_path):
    argv = ["reproduce", "fedavg_mnist", "--quick", "--no-cache", "--data-dir", data_dir, "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    summary, runs = read_folder(tmp_path / "fedavg_mnist")
    assert [(c["name"], c["ok"]) for c in summary["checks"]] == [("parameters of the 2NN", True)]
    assert len(summary["not_run"]) == 19
    for shown in summary["results"]:
        reached = fedavg_mnist.rounds_to(runs[shown["run"]], 0.8)
        assert shown["rounds_to_target"] == reached
        assert shown["best_accuracy"] == max(r["accuracy"] for r in runs[shown["run"]])
        assert shown["uplink_bytes"] == 4 * 199210 * shown["rounds"]  # one client a round
