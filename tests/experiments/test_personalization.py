"""The personalisation study: its partitions, its checks, and all of it with tiny settings."""

import dataclasses

import numpy as np
import pytest

from experiments import cli, personalization, personalization_checks, personalization_report
from experiments.personalization_data import load, signed
from experiments.personalization_methods import methods
from tests.experiments.checking import read_folder

SMALL = dataclasses.replace(personalization.QUICK, num_clients=12)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("personalization") / "run"
    assert cli.main(["run", "personalization", "--quick", "--no-cache", "--out", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_what_it_writes_holds_together(out):
    summary, runs = read_folder(out)
    fedavg, fedrecon, knn = summary["results"]
    assert [r["method"] for r in summary["results"]] == ["FedAvg", "FedRecon", "kNN-Per"]
    assert fedavg["accuracy_mean"] == pytest.approx(runs[fedavg["run"]][-1]["accuracy_mean"])
    assert fedavg["newcomers_personal"] is None and fedavg["newcomers_received"] is not None
    assert fedrecon["newcomers_received"] is None and fedrecon["shared_model_mean"] is None
    assert fedrecon["newcomers_joined"] == fedrecon["newcomers_personal"]  # it keeps nothing for anybody
    # kNN-Per trains FedAvg's model, and adds nothing to what travels.
    assert knn["shared_model_mean"] == fedavg["accuracy_mean"]
    assert knn["uplink_bytes"] == fedavg["uplink_bytes"] == 2 * 3 * 4 * (64 * 8 + 8 + 8 * 10 + 10)
    assert fedrecon["uplink_bytes"] == 2 * 3 * 4 * (64 * 8 + 8)
    assert summary["checks"] == [] and summary["skipped"]
    report = (out / "report.md").read_text()
    assert "Best for the mean newcomer" in report and "FedRecon" in report


@pytest.mark.slow
@pytest.mark.parametrize("data", ["clusters", "digits"])
def test_every_method_runs(data, tmp_path):
    argv = ["--quick", "--no-cache", "--out", str(tmp_path), "--data-sets", data, "--methods"]
    names = list(methods(SMALL, 2 if data == "clusters" else 10))
    assert cli.main(["run", "personalization", *argv, *names]) == 0
    summary, _ = read_folder(tmp_path)
    assert [r["method"] for r in summary["results"]] == names
    assert all(0 <= r["accuracy_mean"] <= 1 for r in summary["results"])


@pytest.mark.parametrize("name", ["digits", "rotated", "clusters", "synthetic"])
def test_newcomers_take_no_part_and_everybody_has_examples(name):
    study = load(name, SMALL)
    assert list(study.train.ids) == list(study.test.ids) and list(study.support.ids) == list(study.newcomers.ids)
    assert not set(study.train.ids) & set(study.support.ids)
    for part in study[:4]:
        assert np.asarray(part.sizes).min() >= 1
        assert set(np.unique(part.arrays["y"])) <= set(range(study.classes))


def test_a_quarter_of_the_clients_sees_digits_upright():
    turned = load("rotated", SMALL)
    upright = next(i for i in turned.train.ids if i % 4 == 0)
    aside = next(i for i in turned.train.ids if i % 4 == 1)
    rows, columns = (turned.train.client(i).arrays["x"].reshape(-1, 8, 8) for i in (upright, aside))
    # The first and last columns of the pictures are almost empty: lying, it is the rows.
    assert rows[:, :, 0].mean() < 0.02 < rows[:, 0, :].mean()
    assert columns[:, 0, :].mean() < 0.02 < columns[:, :, 0].mean()


def test_of_several_data_sets_those_that_are_missing_are_left_out(tmp_path, capsys):
    config = dataclasses.replace(SMALL, data_sets=("digits", "ratings"), data_dir=str(tmp_path))
    studies, missing = personalization.available(config)
    assert (list(studies), list(missing)) == (["digits"], ["ratings"])
    assert "insteval.csv.gz" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="insteval"):
        personalization.available(dataclasses.replace(config, data_sets=("ratings",)))


def test_lecture_ratings_by_student(data_dir):
    study = load("ratings", dataclasses.replace(SMALL, data_dir=data_dir))
    x, y = study.train.arrays["x"], study.train.arrays["y"]
    assert x.shape[1] == study.newcomers.arrays["x"].shape[1] and set(np.unique(y)) == {0, 1}
    # One of the lecturers at most, and one value of each of four other columns.
    assert set(np.unique(x.sum(1))) == {4.0, 5.0}


def test_mocha_gets_signs():
    study = load("clusters", SMALL)
    both = signed(study.train)
    np.testing.assert_array_equal(both.arrays["y"], np.where(study.train.arrays["y"] == 1, 1.0, -1.0))


def rows(method, accuracy, **more):
    none = {"newcomers_received": None, "newcomers_personal": None, "newcomers_joined": None}
    return [
        {"data": "digits", "method": method, "seed": s, "accuracy_mean": accuracy, "accuracy_worst10": 0.1,
         "shared_model_mean": None, "uplink_bytes": 1000, **none, **more}
        for s in range(5)
    ]  # fmt: skip


def test_claims_are_judged_by_means_over_five_seeds():
    checks = lambda rows, config=personalization.PAPER: {
        c.name: c for c in personalization_checks.all_checks(config, personalization.PAPER, rows, {"mnist": "gone"})
    }
    both = rows("FedAvg", 0.6, newcomers_received=0.5) + rows("kNN-Per", 0.7, newcomers_personal=0.4)
    found = checks(both)
    assert found["digits, participants: kNN-Per above FedAvg"].ok
    late = found["digits, newcomers: kNN-Per above FedAvg"]
    assert late.ok is False and late.ours == {"kNN-Per": 0.4, "FedAvg": 0.5}
    assert found["digits, participants: Ditto above FedAvg"].reason == "it needs Ditto and FedAvg with 5 seeds"
    assert found["mnist, participants: Ditto above FedAvg"].reason == "gone"
    other = dataclasses.replace(personalization.PAPER, epochs=7)
    assert checks(both, other)["digits, participants: kNN-Per above FedAvg"].reason == "epochs is 7 instead of 3"


def test_the_report_says_what_the_figures_say():
    both = rows("FedAvg", 0.6, newcomers_received=0.5) + rows("kNN-Per", 0.7, newcomers_personal=0.4)
    words = personalization_report.findings(both, "digits")
    assert "mean participant: kNN-Per with 70.0%, FedAvg's one model 60.0%" in words
    assert "mean newcomer: FedAvg, as received, with 50.0%" in words
    line = personalization_report.table(both, "digits").rows[1]
    assert line[:3] == ("kNN-Per", "70.0% ± 0.0", "10.0%") and line[4] == "-"


def test_bad_settings_are_named(capsys):
    for argv, told in (
        (["--newcomers", "1"], "newcomers must be a share"),
        (["--cohort-size", "0"], "cohort_size must"),
        (["--seeds", "1", "1"], "seeds must name each once"),
        (["--quick", "--cohort-size", "9"], "would take part"),
    ):
        assert cli.main(["run", "personalization", "--no-cache", *argv]) == 2
        assert told in capsys.readouterr().err
