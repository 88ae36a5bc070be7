"""The FedProx experiment: what it measures, how it compares, and all of it with tiny settings."""

import itertools

import jax
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedprox import fedprox
from experiments import cli, fedprox_checks, fedprox_data, fedprox_report, fedprox_synthetic
from tests.experiments.checking import read_folder

MODEL = fl.models.logistic_regression(10)


@pytest.fixture(scope="module")
def data():
    return fedprox_data.load([("0", 10), ("iid", 7)])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fedprox")
    assert cli.main(["reproduce", "fedprox_synthetic", "--quick", "--no-cache", "--out", str(folder)]) == 0
    return folder / "fedprox_synthetic"


def by_hand(kernel, bias, split):
    """Objective, test accuracy and dissimilarity of softmax regression, in float64 and closed form."""
    gradients, losses, sizes = [], [], []
    for k in split.train.ids:
        own = split.train.client(k).arrays
        x, y = own["x"].astype(np.float64), own["y"]
        scores = x @ kernel + bias
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        losses.append(-np.log(p[np.arange(len(y)), y]).mean())
        error = (p - np.eye(10)[y]) / len(y)
        gradients.append(np.concatenate([(x.T @ error).ravel(), error.sum(0)]))
        sizes.append(len(y))
    mean = np.average(gradients, axis=0, weights=sizes)
    apart = np.mean([np.sum((g - mean) ** 2) for g in gradients])
    right = [
        np.argmax(t["x"] @ kernel + bias, 1) == t["y"] for t in (split.test.client(k).arrays for k in split.test.ids)
    ]
    return np.average(losses, weights=sizes), np.concatenate(right).mean(), apart


@pytest.mark.parametrize("key", [("0", 10), ("iid", 7)])
def test_measures_are_those_of_the_closed_form(data, key):
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(60, 10)), rng.normal(size=10)
    params = jax.tree.map(
        lambda like: (kernel if like.ndim == 2 else bias).astype(np.float32),
        fl.initial_variables(MODEL, jax.random.key(0), data[key].train).params,
    )
    split = data[key]
    ours = jax.jit(lambda p, a, b: fedprox_data.measures(MODEL, p, a, b))(params, split.train, split.test)
    expected = by_hand(kernel, bias, split)
    for name, value in zip(("global_loss", "accuracy", "dissimilarity"), expected, strict=True):
        assert float(ours[name]) == pytest.approx(value, rel=1e-4), name


def test_shared_shapes_hold_the_same_clients(data):
    a, b = (data[key].train for key in (("0", 10), ("iid", 7)))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.map(np.shape, a) == jax.tree.map(np.shape, b)
    plain = fl.datasets.synthetic_iid(30, seed=7).train
    assert b.num_examples == plain.num_examples
    for k in (0, 29):
        np.testing.assert_array_equal(b.client(k).arrays["x"], plain.client(k).arrays["x"])


@pytest.mark.slow
def test_a_run_in_shared_shapes_is_that_of_the_data_alone(out):
    config = fedprox_synthetic.QUICK
    split = fl.datasets.synthetic(1.0, 1.0, 30, seed=7)
    epochs = fl.partial_work(config.epochs, 0.5)
    algorithm = fedprox(MODEL, optax.sgd(config.learning_rate), mu=1.0, epochs=epochs, batch_size=10)
    process = fl.synchronous(algorithm, split.train, fl.uniform(10))
    alone = fl.run(process, config.num_rounds, 7)
    _, runs = read_folder(out)
    ours = runs["1 stragglers=0.5 FedProx mu=1 seed=7"]
    np.testing.assert_allclose([r["loss"] for r in ours[1:]], [r["loss"] for r in alone.metrics], rtol=1e-5)


def test_fedavg_drops_whom_fedprox_lets_do_less(out):
    _, runs = read_folder(out)
    for name in ("iid", "1"):
        dropped = runs[f"{name} stragglers=0.5 FedAvg seed=7"][1:]
        partial = runs[f"{name} stragglers=0.5 FedProx mu=0 seed=7"][1:]
        assert [r["survivors"] for r in partial] == [10] * 4
        assert [r["invited"] for r in dropped] == [10] * 4
        assert 0 < sum(r["survivors"] for r in dropped) < 40


def test_what_it_writes_holds_together(out):
    summary, runs = read_folder(out)
    assert [(c["name"], c["ok"]) for c in summary["checks"]] == [("loss of the zero model", True)]
    assert summary["checks"][0]["ours"] == pytest.approx(np.log(10), abs=1e-5)
    assert {c["reason"] for c in summary["skipped"]} == {"num_rounds is 4 instead of 200"}
    assert len(summary["skipped"]) == 16 + 16 + 8 + 3
    for row in summary["results"]:
        last = runs[row["run"]][-1]
        shown = (row["train_loss"], row["test_accuracy"], row["dissimilarity"])
        assert shown == (last["global_loss"], last["accuracy"], last["dissimilarity"])


def rows(data, method, stragglers, losses):
    return [
        {"data": data, "method": method, "stragglers": stragglers, "seed": i,
         "train_loss": x, "test_accuracy": 0.84, "dissimilarity": 10 * x}
        for i, x in enumerate(losses)
    ]  # fmt: skip


def verdicts(rows, config=fedprox_synthetic.PAPER):
    class Zero:
        metrics = ({"global_loss": 2.302585},)

    checks = fedprox_checks.all_checks(config, fedprox_synthetic.PAPER, rows, {"a": Zero()})
    return {c.name: c for c in checks}


def test_every_seed_must_lie_inside_the_range():
    name = "Synthetic(0,0) mu=1: train loss"
    at = lambda *losses: verdicts(rows("0", "FedProx mu=1", 0.0, losses))[name]
    assert at(0.43, 0.46, 0.434).ok
    assert at(0.426, 0.45, 0.464).ok  # 0.43 and 0.46, as the published figures are rounded
    assert at(0.44, 0.45, 0.424).ok is False
    assert at(0.44, 0.45, 0.5).ok is False
    assert at(0.40, 0.41, 0.5).ok is False  # around the published range is not inside it
    few = at(0.44, 0.45)
    assert few.ok is None and "3 seeds" in few.reason
    assert verdicts(rows("0", "FedProx mu=1", 0.0, [0.44] * 3))["Synthetic(0,0) mu=1: test accuracy"].ok


def test_the_chance_of_a_range_is_that_of_all_orders_of_ours_and_theirs():
    chances = []
    for theirs in itertools.combinations(range(15), 3):  # every order of 12 and 3 is equally likely
        ours = [i for i in range(15) if i not in theirs]
        chances.append(fedprox_checks.chance_of_range(ours, min(theirs), max(theirs)))
    chances = np.array(chances)
    lowest = np.array([t[0] for t in itertools.combinations(range(15), 3)])  # as many of ours lie below all of theirs
    for m in range(1, 13):
        beyond = fedprox_checks.chance_of_range(np.arange(12), m - 0.5, m - 0.5)  # theirs lie above m, below 12 - m
        assert beyond == pytest.approx(np.mean(lowest >= max(m, 12 - m)), abs=1e-12)
    for level in np.unique(chances):
        assert np.mean(chances <= level) <= 2 * level + 1e-12
    assert np.mean(chances < 0.01) == pytest.approx(2 * 4 / 455)


def test_ranges_that_draws_like_ours_would_hardly_have_are_told():
    name = "Synthetic(0,0) mu=1: train loss of more seeds"
    at = lambda losses: verdicts(rows("0", "FedProx mu=1", 0.0, losses))[name]
    assert at([0.2, 0.3, 0.4, 0.45, 0.5, 0.6, 0.3, 0.4, 0.5, 0.6]).ok
    assert at([0.40] * 11 + [0.5]).ok is False  # .43 to .46 lies above 11 of 12
    assert at([0.40] * 10 + [0.5] * 2).ok
    assert at([0.47] * 12).ok is False
    assert at([0.464] * 12).ok  # .46, as the published figures are rounded
    assert at([0.47] * 12).ours["chance"] == pytest.approx(1 / 455, abs=1e-4)
    few = at([0.47] * 9)
    assert few.ok is None and "10 seeds" in few.reason


def test_orderings_go_the_other_way_for_iid():
    def at(data, prox, avg, stragglers=0.0):
        both = rows(data, "FedProx mu=1", stragglers, prox) + rows(data, "FedAvg", stragglers, avg)
        return verdicts(both)[f"{fedprox_report.title(data)}, {stragglers:.0%} stragglers: train loss"]

    assert at("1", [1, 1, 1], [2, 2, 0.5]).ok
    assert at("1", [1, 1, 1], [2, 2, 0.5]).ours == {"mu=1": 1.0, "FedAvg": 1.5, "seeds": "2 of 3"}
    assert not at("1", [2, 2, 2], [1, 1, 1]).ok
    assert at("iid", [2, 2, 2], [1, 1, 1]).ok
    assert not at("iid", [1, 1, 1], [2, 2, 2]).ok
    assert at("0", [1] * 5, [2] * 5, 0.9).ok
    assert at("0", [1] * 4, [2] * 4, 0.9).ok is None  # five seeds with 90%


def test_other_settings_are_not_judged():
    checks = verdicts(rows("0", "FedProx mu=1", 0.0, [0.44] * 3), fedprox_synthetic.Config(epochs=5))
    judged = [name for name, c in checks.items() if c.ok is not None]
    assert judged == ["loss of the zero model"]
    assert checks["Synthetic(0,0) mu=1: train loss"].reason == "epochs is 5 instead of 20"


def test_bad_settings_are_named(capsys):
    for argv, told in (
        (["--mu", "-1"], "mu must be"),
        (["--seeds", "1", "1"], "seeds must name"),
        (["--more-seeds", "5", "5"], "more_seeds must name"),
        (["--data-sets", "2,2"], "0.5"),
        (["--stragglers", "1.5"], "fraction"),
    ):
        assert cli.main(["run", "fedprox_synthetic", "--no-cache", *argv]) == 2
        told_us = capsys.readouterr()
        assert told in told_us.err + told_us.out
