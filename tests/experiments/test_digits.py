"""The digits experiment, end to end with tiny settings, and the words in its report."""

import json

import numpy as np
import pytest

import fedjax_lab as fl
from experiments import cli, digits, digits_report
from experiments.common import percent
from tests.experiments.checking import read_folder, without_times

PARAMETERS = 64 * 64 + 64 + 64 * 10 + 10


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "run"
    assert cli.main(["run", "digits", "--quick", "--no-cache", "--out", str(folder)]) == 0
    return folder


def test_what_it_writes_holds_together(out):
    summary, runs = read_folder(out)
    fedavg, fedprox, local = summary["results"]
    quick = digits.QUICK
    once = quick.cohort_size * PARAMETERS * 4
    assert fedavg["uplink_bytes"] == fedavg["downlink_bytes"] == fedprox["uplink_bytes"] == quick.num_rounds * once
    assert local["uplink_bytes"] == local["downlink_bytes"] == 0
    # As many passes as a client makes on average in FedAvg: 6 rounds x 4 of 10 clients.
    assert local["rounds"] == 2
    for row, prefix in ((fedavg, ""), (fedprox, ""), (local, "personal_")):
        last = runs[row["run"]][-1]
        assert row["accuracy_mean"] == pytest.approx(last[f"{prefix}accuracy_mean"], abs=1e-6)
        assert row["accuracy_worst10"] == pytest.approx(last[f"{prefix}accuracy_worst10"], abs=1e-6)
    assert fedavg["accuracy_everybody"] == runs["FedAvg"][-1]["accuracy"]
    assert summary["checks"] == summary["skipped"] == []
    report = (out / "report.md").read_text()
    for row in summary["results"]:
        assert percent(row["accuracy_mean"]) in report and percent(row["accuracy_everybody"]) in report


def test_the_same_call_goes_on_and_another_is_refused(out, capsys):
    summary, _ = read_folder(out)
    metrics = (out / "metrics.jsonl").read_bytes()
    assert cli.main(["run", "digits", "--quick", "--no-cache", "--out", str(out)]) == 0
    assert (out / "metrics.jsonl").read_bytes() == metrics
    assert without_times(json.loads((out / "summary.json").read_text())) == without_times(summary)
    assert cli.main(["run", "digits", "--quick", "--no-cache", "--out", str(out), "--alpha", "2"]) == 2
    assert "alpha was 0.3 there, is 2.0 here" in capsys.readouterr().err


def test_models_trained_alone_on_everybodys_digits():
    # Two clients with one kind of digit each: alone, each reads the other's all wrong.
    x = np.eye(2, 64, dtype=np.float32).repeat(6, 0)
    y = np.repeat([3, 5], 6).astype(np.int32)
    data = fl.FederatedData.from_arrays({"x": x, "y": y}, y)
    config = digits.Config(num_clients=2, cohort_size=1, num_rounds=40)
    process = digits.build(config, fl.Split(data, data))[digits.LOCAL]
    result = fl.run(process, 20)
    outcome = digits.outcome(process, result, data)
    np.testing.assert_array_equal(outcome.own, [1, 1])
    assert outcome.everybody == 0.5


ROW = {
    "accuracy_mean": 0.9,
    "accuracy_everybody": 0.9,
    "accuracy_worst10": 0.5,
    "uplink_bytes": 10,
    "downlink_bytes": 10,
}


def test_the_report_says_what_the_figures_say():
    better, worse = ROW, ROW | {"accuracy_mean": 0.7, "accuracy_everybody": 0.4, "accuracy_worst10": 0.2}
    own, everybody, worst = digits_report._own_digits, digits_report._everybody, digits_report._worst
    assert "training together gained 20.0 points" in own(better, worse, 0.05)
    assert "alone it did better, by 20.0 points" in own(worse, better, 0.05)
    assert "chance alone" in own(better, worse, 0.25)
    assert "the others had it" in everybody(better, worse, 100)
    assert "taught little" in everybody(better, better, 100)
    assert "FedAvg serves" in worst(better, worse)
    assert "local training serves" in worst(worse, better)
    assert "neither serves" in worst(better, better)
    assert "the pull held it back by 50.0 points" in digits_report._prox(better, worse, 100)
    assert "the pull helped by 50.0 points" in digits_report._prox(worse, better, 100)
    assert "no difference that 100 test digits" in digits_report._prox(better, better, 100)


def test_chance_by_hand():
    # Standard deviation of (0, 0.2) is sqrt(0.02); over sqrt(2) it is 0.1; two of them.
    assert digits_report.chance_of_mean(np.array([0.0, np.nan, 0.2])) == pytest.approx(0.2)
    # Two binomials of 100 at 1/2: variance 2 x 0.25 / 100.
    assert digits_report.noise(0.5, 0.5, 100) == pytest.approx(2 * 0.005**0.5)


def test_bad_settings_are_named(capsys):
    for flag, value, told in (("--learning-rate", "0", "learning_rate"), ("--num-rounds", "0", "num_rounds")):
        assert cli.main(["run", "digits", flag, value]) == 2
        assert told in capsys.readouterr().err
