"""The NIID-Bench experiment: how digits are dealt, its network, its verdicts, and all of it with tiny settings."""

import jax
import numpy as np
import pytest

import fedjax_lab as fl
from experiments import cli, niid_bench, niid_bench_data, niid_bench_report
from tests.experiments.checking import read_folder

COLUMNS = {"y": np.random.default_rng(0).integers(0, 10, 3000)}


def test_each_client_has_two_labels_and_all_rows_are_dealt():
    owners = niid_bench_data.labels_each(10, 2)(COLUMNS, 4)
    assert owners.min() == 0 and len(np.unique(owners)) == 10
    for k in range(10):
        mine = np.unique(COLUMNS["y"][owners == k])
        assert len(mine) == 2 and k in mine
    for label in range(10):  # shared evenly by those that hold it
        counts = np.unique(owners[COLUMNS["y"] == label], return_counts=True)[1]
        assert counts.max() - counts.min() <= 1
    assert not np.array_equal(owners, niid_bench_data.labels_each(10, 2)(COLUMNS, 5))
    with pytest.raises(ValueError, match="labels=11"):
        niid_bench_data.labels_each(10, 11)(COLUMNS, 0)


def test_fewer_digits_are_a_part_of_the_same_partition():
    whole = niid_bench_data.labels_each(10, 2)(COLUMNS, 4)
    part = niid_bench_data.some(niid_bench_data.labels_each(10, 2), 200)(COLUMNS, 4)
    kept = part >= 0
    assert 190 <= kept.sum() <= 210 and len(np.unique(part[kept])) == 10
    np.testing.assert_array_equal(part[kept], whole[kept])


def test_the_network_is_the_benchmarks():
    params = jax.eval_shape(lambda key: niid_bench_data.network().init(key)[0], jax.random.key(0))
    counted = {name: sum(a.size for a in layer.values()) for name, layer in params.items()}
    assert counted == {"conv_0": 156, "conv_1": 2416, "dense_0": 30840, "dense_1": 10164, "dense_2": 850}
    assert sum(counted.values()) == niid_bench_data.PARAMETERS
    kernel = np.asarray(niid_bench_data.uniform(256)(jax.random.key(0), (256, 120)))
    assert 0.99 / 16 < np.abs(kernel).max() <= 1 / 16
    assert kernel.std() == pytest.approx(1 / 16 / np.sqrt(3), rel=0.02)


def row(cell, accuracy, seed=0, mu=None):
    where = niid_bench.CELLS[cell]
    return {
        "run": f"{cell} {mu} {seed}", "cell": cell, "partition": where.partition, "algorithm": where.algorithm,
        "seed": seed, "mu": mu, "published": where.published, "accuracy": accuracy, "seconds": 1.0,
    }  # fmt: skip


def verdicts(*rows, config=niid_bench.PAPER):
    cells = list(niid_bench.CELLS.values())
    return {c.name: c for c in niid_bench_report.all_checks(config, niid_bench.PAPER, rows, cells, 44_426)}


def test_the_mean_over_seeds_is_judged_with_the_best_mu():
    name = "iid/fedprox: test accuracy, percent"
    rows = [
        row("iid/fedprox", a, s, mu)
        for mu, pair in ((0.01, (99.3, 99.5)), (1.0, (98.0, 98.2)))
        for s, a in enumerate(pair)
    ]
    best = verdicts(*rows)[name]
    assert best.ok and best.ours["seeds"] == [99.3, 99.5] and best.paper == 99.16
    assert not verdicts(row("iid/fedprox", 98.6, mu=1.0))[name].ok
    assert not verdicts(row("iid/fedprox", 99.7, mu=1.0))[name].ok
    assert verdicts()[name].ok is None and "not run" in verdicts()[name].reason
    other = verdicts(*rows, config=niid_bench.QUICK)[name]
    assert other.ok is None and "num_rounds is 2 instead of 50" in other.reason
    assert len(verdicts()) == 1 + 12 + 12 + 4


def test_both_published_tables_are_compared():
    judged = verdicts(row("dirichlet/fednova", 98.93))
    strict, first = (judged[f"dirichlet/fednova: test accuracy, percent{v}"] for v in ("", ", first version"))
    assert (strict.paper, strict.ok) == (98.03, False)
    assert (first.paper, first.ok) == (98.8, True)


def test_the_best_round_counts():
    records = [
        {"round": 1, "accuracy": 0.5},
        {"round": 2, "accuracy": 0.75},
        {"round": 3},
        {"round": 4, "accuracy": 0.25},
    ]
    result = fl.Result(
        params=None, state=None, metrics=records, uplink_bytes=0, downlink_bytes=0, rounds=4, stopped=None, seconds=1.0,
        compile_seconds=0.0,
    )  # fmt: skip
    attempt = niid_bench.Attempt(niid_bench.CELLS["iid/fedavg"], 0, None)
    shown = niid_bench.row(attempt, result)
    assert (shown["accuracy"], shown["last_accuracy"]) == (75.0, 25.0)


def test_unlike_clients_must_do_worse():
    name = "fednova: two labels to a client do worse than alike clients"
    judge = lambda less, more: verdicts(row("labels2/fednova", less), row("iid/fednova", more))[name].ok
    assert judge(96.6, 99.0) and not judge(99.1, 99.0)
    assert verdicts(row("iid/fednova", 99.0))[name].ok is None


def test_runs_with_the_same_data_follow_each_other():
    config = niid_bench.Config(cells=("labels2/fedavg", "iid/fedprox", "iid/fedavg"), seeds=(3, 1), mus=(0.1, 1.0))
    attempts = niid_bench.all_attempts(config, [niid_bench.CELLS[c] for c in config.cells])
    assert [a.name for a in attempts] == [
        "iid/fedprox mu=0.1 seed=3", "iid/fedprox mu=1 seed=3", "iid/fedavg seed=3",
        "iid/fedprox mu=0.1 seed=1", "iid/fedprox mu=1 seed=1", "iid/fedavg seed=1",
        "labels2/fedavg seed=3", "labels2/fedavg seed=1",
    ]  # fmt: skip


def test_wrong_settings_are_refused(capsys):
    assert cli.main(["run", "niid_bench", "--cells", "iid/fedavgs"]) == 2
    assert "did you mean 'iid/fedavg'" in " ".join(capsys.readouterr().err.split())
    for wrong in ({"mus": (-1.0,)}, {"seeds": ()}, {"num_rounds": 0}, {"alpha": 0.0}, {"momentum": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            niid_bench.Config(**wrong)


@pytest.mark.parametrize("name", niid_bench.ALGORITHMS)
def test_each_algorithm_is_built(name):
    assert isinstance(niid_bench.algorithm(niid_bench.PAPER, name, 0.01), fl.Round)


@pytest.mark.slow
def test_end_to_end(data_dir, tmp_path):
    argv = ["reproduce", "niid_bench", "--quick", "--no-cache", "--data-dir", data_dir, "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    summary, runs = read_folder(tmp_path / "niid_bench")
    assert [(c["name"], c["ok"]) for c in summary["checks"]] == [("parameters of the CNN", True)]
    assert len(summary["not_run"]) == 10 and len(summary["skipped"]) == 28
    for shown in summary["results"]:
        assert shown["last_accuracy"] == 100 * runs[shown["run"]][-1]["accuracy"]
        assert shown["accuracy"] == 100 * max(
            record["accuracy"] for record in runs[shown["run"]] if "accuracy" in record
        )
        up = 4 * 44_426 + (4 * 10 if shown["algorithm"] == "fednova" else 0)  # a number for each leaf
        assert shown["uplink_bytes"] == up * 10 * shown["rounds"]
