"""The communication frontier: how it is found, and all of it with tiny settings."""

import numpy as np
import pytest

import fedjax_lab as fl
from experiments import cli, communication_frontier
from experiments import communication_frontier_report as report
from experiments.communication_frontier_report import Point
from tests.experiments.checking import read_folder


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier") / "run"
    assert cli.main(["run", "communication_frontier", "--quick", "--no-cache", "--out", str(folder)]) == 0
    return folder


POINTS = [
    Point("none", 1, 1, 100, 0.5),
    Point("none", 1, 2, 200, 0.8),
    Point("top1", 1, 1, 10, 0.4),
    Point("top1", 1, 2, 20, 0.5),
    Point("top1", 1, 3, 30, 0.45),
    Point("top1", 4, 1, 10, 0.3),
]


def test_the_frontier_by_hand():
    assert report.frontier(POINTS, "bytes") == [POINTS[2], POINTS[3], POINTS[1]]
    assert report.frontier(POINTS, "round") == [POINTS[0], POINTS[1]]
    table = report.front_table(report.frontier(POINTS, "bytes"))
    assert table.rows[0] == ("top1 E=1", "10 bytes to 20 bytes", "1 to 2", "40.0% to 50.0%")
    assert table.rows[1] == ("none E=1", "200 bytes", "2", "80.0%")


def test_costs_by_hand():
    assert report.cost(POINTS, "top1", 1, 0.45, "bytes") == 20
    assert report.cost(POINTS, "none", 1, 0.45, "round") == 1
    assert report.cost(POINTS, "top1", 4, 0.45, "bytes") is None


def test_the_words_say_what_the_figures_say():
    config = communication_frontier.Config(links=("none", "top1"), epochs=(1,))
    near = [*POINTS[:5], Point("top1", 1, 4, 40, 0.795)]
    text = report.findings(config, "p", near)
    assert "80.0% at best (E=1)" in text and "top1 with E=1, for 40 bytes (5.0 times fewer" in text
    assert "-0.5 points with E=1" in text and "never" not in text
    assert "1 of 2 combinations never do: top1 E=1" in report.findings(config, "p", POINTS[:5])


@pytest.mark.slow
def test_what_it_writes_holds_together(out):
    summary, runs = read_folder(out)
    quick = communication_frontier.QUICK
    assert len(runs) == len(quick.links) * len(quick.epochs) * len(quick.seeds)
    bytes_ = {(r["link"], r["epochs"]): r["uplink_bytes"] for r in summary["results"]}
    once = quick.num_rounds * quick.cohort_size
    assert bytes_["none", 1] == bytes_["none", 2] == once * 650 * 4
    _, one = fl.wire.round_trip(fl.wire.top_k(0.1), np.linspace(-1, 1, 650, dtype=np.float32))
    assert bytes_["top10", 1] == once * int(one) < once * 650 * 4 * 0.15
    front = summary["frontiers"]["digits_linear"]["bytes"]
    assert [p["accuracy"] for p in front] == sorted(p["accuracy"] for p in front) and front
    text = (out / "report.md").read_text()
    assert "digits_linear (convex)" in text and "Every combination" in text


@pytest.mark.slow
def test_a_cell_of_the_sweep_is_its_own_run(out):
    _, runs = read_folder(out)
    config, problem = communication_frontier.QUICK, communication_frontier.PROBLEMS["digits_linear"]
    data = problem.load()
    import optax

    from algorithms.fedavg import fedavg

    base = fedavg(problem.model(), optax.sgd(problem.learning_rate), epochs=2, batch_size=config.batch_size)
    process = fl.synchronous(base, data.train, fl.uniform(config.cohort_size))
    alone = fl.run(process, config.num_rounds, 1, evaluate=fl.global_metrics(data.test), every=2)
    ours = runs["digits_linear none E=2 seed=1"]
    assert [r["accuracy"] for r in ours if "accuracy" in r] == pytest.approx(
        [r["accuracy"] for r in alone.metrics if "accuracy" in r], abs=1e-6
    )


def test_there_are_one_convex_problem_and_two_that_are_not():
    assert [p.convex for p in communication_frontier.PROBLEMS.values()] == [True, False, False]
    split = communication_frontier.PROBLEMS["synthetic_mlp"].load()
    assert split.train.num_clients == 30 and int(split.train.sizes.max()) <= 60


def test_bad_settings_are_named(capsys):
    for argv, told in (
        (["--links", "qsgd4"], '"none"'),
        (["--links", "none", "qsgd5"], "'qsgd8'"),
        (["--epochs", "0"], "epochs must"),
        (["--seeds", "1", "1"], "seeds must name"),
        (["--problems", "digit_linear"], "'digits_linear'"),
    ):
        assert cli.main(["run", "communication_frontier", "--no-cache", *argv]) == 2
        shown = capsys.readouterr()
        assert told in shown.err + shown.out
