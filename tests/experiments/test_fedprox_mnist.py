"""FedProx's MNIST: standardised digits, who takes part, and what is judged."""

import numpy as np
import pytest

import fedjax_lab as fl
from experiments import cli, fedprox_mnist
from tests.experiments.checking import read_folder


def small(deal, seed, data_dir, *, test_fraction):
    """Ten kinds of 2 x 2 images, divided as asked."""
    rng = np.random.default_rng(7)
    y = np.repeat(np.arange(10), 60)
    x = rng.normal(y[:, None], 3, size=(600, 4)).reshape(600, 2, 2, 1).astype(np.float32) / 255
    return fl.Split(*fl.FederatedData.from_assignment({"x": x, "y": y}, deal({"y": y}, seed)).split(0.9, seed))


def test_pixels_are_standardised_over_all_digits_and_rows_stay_in_place(monkeypatch):
    monkeypatch.setattr(fl.datasets, "mnist", small)
    config = fedprox_mnist.Config(num_clients=20)
    split = fedprox_mnist.load(config, 3)
    raw = small(fl.datasets.power_law(20), 3, None, test_fraction=0.1)
    whole = np.concatenate([np.asarray(part.arrays["x"]).reshape(-1, 4) for part in raw]).astype(np.float64) * 255
    expected = (whole - whole.mean(0)) / (whole.std(0) + 0.001)
    n = raw.train.num_examples
    np.testing.assert_allclose(split.train.arrays["x"], expected[:n], atol=1e-4)
    np.testing.assert_allclose(split.test.client("test").arrays["x"], expected[n:], atol=1e-4)
    np.testing.assert_array_equal(split.test.client("test").arrays["y"], raw.test.arrays["y"])
    assert split.train.num_clients == 20 and split.test.num_examples == raw.test.num_examples
    labels = [set(split.train.client(k).arrays["y"]) for k in split.train.ids]
    assert all(1 <= len(own) <= 2 for own in labels)


def rows(**accuracies):
    """``plain=[...]`` and, for the methods with stragglers, ``avg``, ``zero``, ``one``, by seed."""
    names = {"avg": "FedAvg", "zero": "FedProx mu=0", "one": "FedProx mu=1"}
    return [
        {"part": "plain" if name == "plain" else "stragglers", "method": names.get(name, "FedAvg"),
         "seed": i, "test_accuracy": a}
        for name, values in accuracies.items() for i, a in enumerate(values)
    ]  # fmt: skip


def verdicts(rows, config=fedprox_mnist.PAPER):
    return {c.name: c for c in fedprox_mnist.all_checks(config, rows)}


def test_ranges_hold_for_means_over_enough_seeds():
    name = "FedAvg, one epoch: test accuracy after 200 rounds"
    assert verdicts(rows(plain=[0.7, 0.9, 0.86]))[name].ok
    assert verdicts(rows(plain=[0.7, 0.8, 0.86]))[name].ok is False
    assert verdicts(rows(plain=[0.85, 0.85]))[name].reason == "it needs 3 seeds"
    assert verdicts([])[name].ok is None
    name = "FedProx mu=1, 90% stragglers: test accuracy after 100 rounds"
    assert verdicts(rows(one=[0.861] * 5))[name].ok
    assert verdicts(rows(one=[0.859] * 5))[name].ok is False
    assert verdicts(rows(one=[0.9] * 4))[name].ok is None
    other = fedprox_mnist.Config(epochs=5)
    assert verdicts(rows(one=[0.88] * 5), other)[name].reason == "epochs is 5 instead of 20"


def test_the_ordering_needs_all_three():
    name = "90% stragglers: what helps"
    assert verdicts(rows(avg=[0.79] * 5, zero=[0.83] * 5, one=[0.88] * 5))[name].ok
    assert verdicts(rows(avg=[0.84] * 5, zero=[0.83] * 5, one=[0.88] * 5))[name].ok is False
    assert verdicts(rows(zero=[0.83] * 5, one=[0.88] * 5))[name].ok is None


@pytest.mark.slow
def test_end_to_end(data_dir, tmp_path):
    argv = ["reproduce", "fedprox_mnist", "--quick", "--no-cache", "--data-dir", data_dir, "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    summary, runs = read_folder(tmp_path / "fedprox_mnist")
    assert {c["reason"] for c in summary["skipped"]} == {"plain_rounds is 4 instead of 200"}
    assert len(summary["skipped"]) == 5
    for found in summary["results"]:
        assert runs[found["run"]][-1]["accuracy"] == found["test_accuracy"]
        dropped = (found["part"], found["method"]) == ("stragglers", "FedAvg")
        assert found["survivors"] < 10 if dropped else found["survivors"] == 10
