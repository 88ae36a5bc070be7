"""The rotated MNIST experiment: how digits are turned and dealt, the start, the checks, and all of it tiny."""

import jax
import numpy as np
import pytest

from experiments import cli, ifca_rotated_mnist, ifca_rotated_mnist_report
from tests.experiments.checking import read_folder


def raw(train=24, test=8):
    """Digits whose pixels say which they are, and whose corner says how they are turned."""
    rng, found = np.random.default_rng(0), {}
    for name, count in (("train", train), ("test", test)):
        x = np.zeros((count, 28, 28), np.uint8)
        x[:, 14, 14], x[:, 0, 0] = np.arange(count), 255
        found[name] = {"x": x, "y": rng.integers(0, 10, count).astype(np.int32)}
    return found


def test_every_rotation_holds_every_digit_once_and_a_clients_are_all_turned_alike():
    data = ifca_rotated_mnist.deal(raw(), n=4, seed=0)
    assert data.train.num_clients == 4 * 24 // 4 and data.test.num_clients == 4 * 8 // 4
    corners = [(0, 0), (27, 0), (27, 27), (0, 27)]  # counter-clockwise, as torch.rot90 turns
    orders = []
    for k in range(4):
        mine = np.flatnonzero(data.train.attrs["rotation"] == k)
        x = np.concatenate([data.train.client(data.train.ids[i]).arrays["x"] for i in mine])
        assert (x[:, *corners[k]] == 255).all()
        number = x[:, 13:15, 13:15].max((1, 2))  # the middle turns, too
        assert sorted(number) == list(range(24))
        orders.append(number.tolist())
        whole = data.turned["x"][k]
        assert (whole[:, *corners[k]] == 255).all() and whole[:, 13:15, 13:15].max((1, 2)).tolist() == list(range(8))
    assert len({tuple(o) for o in orders}) == 4
    again = ifca_rotated_mnist.deal(raw(), n=4, seed=0)
    np.testing.assert_array_equal(again.train.arrays["x"], data.train.arrays["x"])


def test_the_start_is_uniform_within_one_over_the_root_of_the_inputs():
    params, _ = ifca_rotated_mnist.network(200).init_from(jax.random.key(0), {"x": np.zeros((1, 28, 28), np.uint8)})
    assert sum(w.size for w in jax.tree.leaves(params)) == 784 * 200 + 200 + 200 * 10 + 10
    for name, inputs in (("hidden_0", 784), ("output", 200)):
        for w in params[name].values():
            assert 0.5 * inputs**-0.5 < np.abs(w).max() <= inputs**-0.5 + 1e-7
        assert np.std(params[name]["kernel"]) == pytest.approx((3 * inputs) ** -0.5, rel=0.05)


def row(method, accuracy, setting="1200/200", seed=0):
    return {
        "run": f"{setting} {method} seed={seed}", "setting": setting, "method": method, "seed": seed, "clients": 1200,
        "clients_a_round": 12, "accuracy": accuracy, "choices": None,
    }  # fmt: skip


def verdicts(*rows, config=ifca_rotated_mnist.PAPER):
    checks = ifca_rotated_mnist_report.all_checks(config, ifca_rotated_mnist.PAPER, rows, ifca_rotated_mnist.PUBLISHED)
    return {c.name: c for c in checks}


def test_figures_are_judged_by_their_means_within_a_point():
    rows = (row("IFCA", 94.0), row("IFCA", 95.0, seed=1), row("global", 88.0), row("local", 80.9))
    found = verdicts(*rows)
    ours = found["1200/200: test accuracy of IFCA, percent"]
    assert ours.ok and ours.ours == {"mean": 94.5, "seeds": [94.0, 95.0]} and ours.paper == 95.25
    assert ours.tolerance == "1 point, with 12 of 1200 clients a round"
    assert not found["1200/200: test accuracy of global, percent"].ok
    assert found["1200/200: test accuracy of local, percent"].ok
    assert found["1200/200: IFCA before one model for all, before local models"].ok
    assert found["4800/50: test accuracy of IFCA, percent"].reason == "IFCA was not run at 4800/50"
    shorter = verdicts(*rows, config=ifca_rotated_mnist.Config(num_rounds=20))
    assert {c.reason for c in shorter.values()} == {"num_rounds is 20 instead of 300"}
    swapped = verdicts(row("IFCA", 88.0), row("global", 89.0), row("local", 80.0))
    assert not swapped["1200/200: IFCA before one model for all, before local models"].ok


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"settings": ("1200/20",)}, "did you mean '1200/200'"),
        ({"participation": 1.5}, "participation"),
        ({"methods": ("FedAvg",)}, "there are IFCA, global, local"),
        ({"early_participation": 0.001}, "at least participation"),
        ({"train_digits": 500}, "multiple of a client's 200"),
        ({"local_clients": 0}, "local_clients"),
    ],
)
def test_refusals(settings, word):
    with pytest.raises(ValueError, match=word):
        ifca_rotated_mnist.Config(**settings)


@pytest.mark.slow
def test_end_to_end(data_dir, tmp_path):
    argv = ["reproduce", "ifca_rotated_mnist", "--quick", "--no-cache", "--data-dir", data_dir, "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    summary, _ = read_folder(tmp_path / "ifca_rotated_mnist")
    assert summary["checks"] == [] and len(summary["skipped"]) == 12
    rows = {r["method"]: r for r in summary["results"]}
    assert list(rows) == ["IFCA", "global", "local"]
    model = 4 * (784 * 200 + 200 + 200 * 10 + 10)
    assert rows["global"]["uplink_bytes"] == rows["global"]["downlink_bytes"] == 3 * 2 * model
    assert rows["IFCA"]["downlink_bytes"] == (4 + 2 + 2) * 4 * model  # 4 clients in the first round, then 2
    assert rows["IFCA"]["uplink_bytes"] == (4 + 2 + 2) * (model + 1)
    assert rows["local"]["uplink_bytes"] == 0
    assert [sum(counts) for counts in rows["IFCA"]["choices"]] == [1] * 4
