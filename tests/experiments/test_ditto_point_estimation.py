"""Ditto on point estimation: the closed forms, training against them, and what is judged."""

import numpy as np
import pytest

import fedjax_lab as fl
from experiments import cli
from experiments import ditto_point_estimation as experiment
from tests.experiments.checking import read_folder


@pytest.mark.parametrize("name", ["benign", "attacked"])
def test_the_closed_forms_are_those_published(name):
    setting, (lam, ditto, local, shared) = experiment.SETTINGS[name], experiment.PUBLISHED[name]
    assert setting.best_lambda == pytest.approx(lam, abs=5e-5)
    assert setting.error(setting.best_lambda) == pytest.approx(ditto, abs=5e-7)
    around = [setting.error(setting.best_lambda * f) for f in (0.9, 1.0, 1.1)]
    assert around[1] == min(around)
    assert setting.error(0.0) == pytest.approx(0.8**2 / 30)
    if local is not None:
        assert (setting.error(0.0), setting.error(np.inf)) == pytest.approx((local, shared), abs=5e-5)


@pytest.mark.slow
def test_training_ends_at_the_estimates_in_closed_form(tmp_path):
    """The means' weighted mean, on the very points that were drawn; attacked clients' errors don't count."""
    config = experiment.Config(trials=30, num_rounds=12)
    cell = experiment.Cell("attacked", 1.0, 5)
    load = lambda setting, seed: experiment.load(config, setting, seed)
    result = experiment.training(config, cell, load, {})(tmp_path / "run", lambda info: None)
    points = fl.datasets.point_estimation(16, 30, sigma=0.8, tau=0.1, num_attacked=8, tau_attacked=0.5, dim=30, seed=5)
    own = np.stack([points.client(k).arrays["x"].astype(np.float64).mean(0) for k in points.ids])
    mixed = (own + cell.lam * own.mean(0)) / (1 + cell.lam)
    benign = ~np.asarray(points.attrs["attacked"])
    error = lambda w: np.mean((w - points.attrs["w"])[benign] ** 2)
    found = experiment.row(cell, result)
    assert found["personal_error"] == pytest.approx(error(mixed), rel=1e-4)
    assert found["global_error"] == pytest.approx(error(np.broadcast_to(own.mean(0), own.shape)), rel=1e-4)


def rows(setting="benign", **errors):
    factors = {"half": 0.5, "best": 1.0, "double": 2.0}
    return [
        {"setting": setting, "factor": factors[name], "personal_error": e, "global_error": 0.0114}
        for name, e in errors.items()
    ]


def verdicts(rows, config=experiment.PAPER):
    return {c.name: c for c in experiment.all_checks(config, rows)}


def test_figures_are_held_to_one_percent():
    name = "benign: mean squared error, Ditto with lambda*"
    assert verdicts(rows(best=0.008624 * 1.009))[name].ok
    assert verdicts(rows(best=0.008624 * 1.011))[name].ok is False
    both = rows(best=0.0086) + rows(best=0.0088)  # two seeds: their mean counts
    assert verdicts(both)[name].ours == pytest.approx(0.0087)
    assert verdicts(rows(best=0.0086), experiment.QUICK)[name].ok is None
    assert verdicts([])["benign: mean squared error, local"].reason == "benign was not run with 0 lambda*"


def test_no_other_lambda_may_do_better():
    name = "benign: the lambda of the smallest error"
    assert verdicts(rows(half=0.0094, best=0.0086, double=0.0091))[name].ok
    assert verdicts(rows(half=0.0085, best=0.0086, double=0.0091))[name].ok is False
    assert verdicts(rows(best=0.0086, double=0.0091))[name].ok is None


def test_bad_settings_are_named(capsys):
    for argv, told in ((["--settings", "atacked"], "did you mean 'attacked'"), (["--trials", "0"], "trials must be")):
        assert cli.main(["run", "ditto_point_estimation", "--no-cache", *argv]) == 2
        told_us = capsys.readouterr()
        assert told in " ".join((told_us.err + told_us.out).split())


@pytest.mark.slow
def test_end_to_end(tmp_path):
    argv = ["reproduce", "ditto_point_estimation", "--quick", "--no-cache", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    summary, runs = read_folder(tmp_path / "ditto_point_estimation")
    assert [c["ok"] for c in summary["checks"]] == [True, True]
    for found in summary["results"]:
        assert runs[found["run"]][-1]["personal_error"] == found["personal_error"]
        assert found["personal_error"] == pytest.approx(found["closed_form"], rel=0.2)
