"""FedLab's compression benchmark: its network, what is compressed, the verdicts, and all of it with tiny settings."""

import jax
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from experiments import cli, fedlab_compression
from experiments import fedlab_compression_report as report
from tests.experiments.checking import read_folder
from tests.problems import assert_close, softmax_data, softmax_model, steps

SETTINGS, PAPER = fedlab_compression.SETTINGS, fedlab_compression.PAPER


def test_the_network_is_fedlabs():
    params = fedlab_compression.network().init(jax.random.key(0))[0]
    assert sum(a.size for a in jax.tree.leaves(params)) == report.PARAMETERS
    for layer, inputs in (("fc1", 784), ("fc2", 200), ("fc3", 200)):
        assert 0.95 / inputs**0.5 < np.abs(params[layer]["kernel"]).max() <= 1 / inputs**0.5
        assert 0 < np.abs(params[layer]["bias"]).max() <= 1 / inputs**0.5


@pytest.mark.slow
def test_whole_models_without_compression_are_the_same():
    base, data = fedavg(softmax_model(), optax.sgd(0.1)), softmax_data()
    final = lambda round: (p := fl.synchronous(round, data)).params(steps(p, 3)[0])
    assert_close(final(fl.compose(base, fedlab_compression.whole_models)), final(base), atol=1e-6)


def test_top_k_of_models_keeps_their_largest_weights():
    """One client, no step: what arrives is the model's own largest entry, the others are gone."""
    base, data = fedavg(softmax_model(), optax.sgd(1e-6)), softmax_data((5,))
    round = fl.compose(base, fedlab_compression.whole_models, fl.uplink(fl.wire.top_k(1)))
    process = fl.synchronous(round, data)
    before = process.params(process.init(jax.random.key(0)))["w"]
    after = process.params(steps(process, 1)[0])["w"]
    largest = np.unravel_index(np.abs(before).argmax(), before.shape)
    assert (np.asarray(after) != 0).sum() == 1 and after[largest] == pytest.approx(float(before[largest]), rel=1e-5)


def test_a_setting_of_b_bits_sends_b_and_a_sign():
    for name, bits in (("qsgd4", 5), ("qsgd8", 9)):
        _, size = fl.wire.round_trip(SETTINGS[name].link(), jax.random.normal(jax.random.key(0), (1024,)))
        assert int(size) == 1024 * bits // 8 + 4


def row(setting, accuracy, seed=0, what="models", sent=1000):
    return {
        "run": f"{what} {setting} {seed}", "what": what, "setting": setting, "seed": seed, "accuracy": accuracy,
        "uplink_bytes": sent, "seconds": 1.0,
    }  # fmt: skip


def verdicts(*rows, config=PAPER):
    return {c.name: c for c in report.all_checks(config, PAPER, rows, SETTINGS, report.PARAMETERS)}


def test_dense_settings_must_be_near_and_top_k_in_order():
    near = "none: test accuracy, percent"
    assert verdicts(row("none", 92.0), row("none", 91.5, 1))[near].ok
    assert not verdicts(row("none", 91.6))[near].ok and not verdicts(row("none", 94.7))[near].ok
    assert verdicts()[near].ok is None
    order = "top5 of the models is less accurate than top10"
    assert verdicts(row("top5", 11.35), row("top10", 40.0))[order].ok
    assert not verdicts(row("top5", 50.0), row("top10", 40.0))[order].ok
    # Of the updates it may be as it likes.
    assert verdicts(row("top5", 50.0, what="updates"), row("top10", 40.0))[order].ok is None
    top = "top20 of the models is less accurate than none"
    assert verdicts(row("top20", 90.0), row("none", 93.0))[top].ok
    quick = verdicts(row("none", 92.0), config=fedlab_compression.QUICK)[near]
    assert quick.ok is None and "num_rounds is 2 instead of 200" in quick.reason


def test_shares_of_bytes():
    name = "qsgd8: share of the bytes without compression"
    assert verdicts(row("none", 1, sent=3200), row("qsgd8", 1, sent=900))[name].ok
    assert not verdicts(row("none", 1, sent=3200), row("qsgd8", 1, sent=1000))[name].ok


def test_what_is_run():
    names = [a.name for a in fedlab_compression.all_attempts(PAPER)]
    assert len(names) == len(set(names)) == 6 + 5 + 4 * 4
    assert names[0] == "models/none seed=0" and "updates/top5 seed=0" in names and "models/top5 seed=4" in names
    assert not any(n.startswith("updates/none") or n == "models/qsgd8 seed=1" for n in names)


@pytest.mark.slow
def test_what_it_writes_holds_together(tmp_path, data_dir):
    argv = ["reproduce", "fedlab_compression", "--quick", "--no-cache", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    summary, runs = read_folder(tmp_path / "fedlab_compression")
    assert [c["name"] for c in summary["checks"]] == [
        "parameters of the network", "qsgd8: share of the bytes without compression"
    ]  # fmt: skip
    quick = fedlab_compression.QUICK
    sent = quick.num_rounds * quick.cohort_size * report.PARAMETERS * 4
    assert summary["results"][0]["uplink_bytes"] == sent
    assert "models/top10 seed=0" in runs


def test_bad_settings_are_named(capsys):
    for argv, told in (
        (["--settings", "qsgd5"], "'qsgd8'"),
        (["--alpha", "0"], "alpha must"),
        (["--seeds", "1", "1"], "seeds must name"),
    ):
        assert cli.main(["run", "fedlab_compression", "--no-cache", *argv]) == 2
        shown = capsys.readouterr()
        assert told in shown.err + shown.out
