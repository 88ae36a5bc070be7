"""pFedMe on MNIST: the authors' division of the digits, their personal models, and what is judged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_lab as fl
from experiments import cli, pfedme_data, pfedme_mnist
from tests.experiments.checking import read_folder

COUNTS = (6903, 7877, 6990, 7141, 6824, 6313, 6876, 7293, 6825, 6958)  # of MNIST's labels


@pytest.fixture(scope="module")
def divided():
    """Rows that are their own numbers, labelled as often as MNIST's and beginning as it does."""
    first = [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    rest = np.repeat(np.arange(10), np.array(COUNTS) - np.bincount(first, minlength=10))
    y = np.concatenate([first, np.random.default_rng(0).permutation(rest)])
    return y, pfedme_data.divide(np.arange(len(y), dtype=np.float32)[:, None], y)


def test_sizes_are_those_that_the_paper_states(divided):
    split = divided[1]
    sizes = np.asarray(split.train.sizes)
    assert (sizes.min(), sizes.max(), len(sizes)) == (1165, 3834, 20)
    whole = sizes + np.asarray(split.test.sizes)
    np.testing.assert_array_equal(sizes, (0.75 * whole).astype(int))
    assert 70_000 - 40 <= whole.sum() <= 70_000


def test_clients_have_two_labels_from_the_first_digits_on(divided):
    y, split = divided
    for k in range(20):
        rows = np.concatenate([part.client(k).arrays["x"][:, 0] for part in split]).astype(int)
        labels = np.concatenate([part.client(k).arrays["y"] for part in split])
        assert len(set(rows)) == len(rows)
        assert set(labels) == {k % 10, (k + 1) % 10}
        assert np.sum(labels != y[rows]) <= 1
        for label in (k % 10, (k + 1) % 10):
            have = np.sort(rows[y[rows] == label])
            of_label = np.flatnonzero(y == label)
            begin = int(np.searchsorted(of_label, have[0]))
            assert begin <= 1
            np.testing.assert_array_equal(have, of_label[begin : begin + len(have)])
    together = [set(split.train.client(k).arrays["x"][:, 0]) for k in (2, 12)]
    assert len(together[0] & together[1]) > 0.5 * min(map(len, together))


def gradient(w, b, x, y):
    scores = x @ w + b
    p = np.exp(scores - scores.max(1, keepdims=True))
    error = (p / p.sum(1, keepdims=True) - np.eye(10)[y]) / len(y)
    return x.T @ error, error.sum(0)


@pytest.mark.parametrize("theta_from", ["theta", pytest.param("w", marks=pytest.mark.slow)])
def test_training_and_personal_models_are_those_of_the_authors_code(theta_from):
    """Batches of all of a client's examples leave nothing to chance."""
    config = pfedme_mnist.Config(batch_size=8, cohort_size=2, theta_from=theta_from)
    rng = np.random.default_rng(0)
    clients = {
        k: {"x": rng.normal(size=(5 + k, 4)).astype(np.float32), "y": rng.integers(0, 10, 5 + k)} for k in (0, 1)
    }
    data = fl.FederatedData.from_clients(clients)
    process = pfedme_mnist.build(config, "global", data)
    state, _ = process.step(process.init(jax.random.key(0)), process.data)

    def theta(own, center, k):
        x, y = clients[k]["x"].astype(np.float64), clients[k]["y"]
        for _ in range(config.inner_steps):
            grads = gradient(*own, x, y)
            own = [t - 0.09 * (g + 0.001 * t + 15 * (t - c)) for t, g, c in zip(own, grads, center, strict=True)]
        return own

    def local(w, k):
        near = w
        for _ in range(10):
            near = theta(near if theta_from == "theta" else w, w, k)
            w = [c - 0.005 * 15 * (c - t) for c, t in zip(w, near, strict=True)]
        return w, near

    start = [np.zeros((4, 10)), np.zeros(10)]
    ends = [local(start, k)[0] for k in (0, 1)]
    w = [np.average(parts, axis=0, weights=[5, 6]) for parts in zip(*ends, strict=True)]
    ours = {np.ndim(leaf): np.asarray(leaf) for leaf in jax.tree.leaves(process.params(state))}
    np.testing.assert_allclose(ours[2], w[0], atol=1e-5)
    np.testing.assert_allclose(ours[1], w[1], atol=1e-5)
    personal = process.round.personalize(process.server(state).variables, (), process.data.view(jnp.int32(1)),
                                         jax.random.key(0)).params  # fmt: skip
    expected = local(w, 1)[0]
    if theta_from == "w":  # theta of one more mini-batch
        expected = theta(expected, expected, 1)
    personal = {np.ndim(leaf): np.asarray(leaf) for leaf in jax.tree.leaves(personal)}
    np.testing.assert_allclose(personal[2], expected[0], atol=1e-5)
    np.testing.assert_allclose(personal[1], expected[1], atol=1e-5)


def verdicts(at, config=pfedme_mnist.PAPER, sizes=(1165, 3834)):
    rows = [{"curve": "global", "at": own} for own in at]
    return {c.name: c for c in pfedme_mnist.all_checks(config, rows, {}, np.array(sizes))}


def test_curves_are_judged_by_the_mean_of_the_seeds_from_round_50_on():
    name = "global model: test accuracy after round 100"
    assert verdicts([{"100": 0.8965 + 0.014}])[name].ok
    assert verdicts([{"100": 0.8965 + 0.02}, {"100": 0.8965}])[name].ok
    assert verdicts([{"100": 0.8965 - 0.016}])[name].ok is False
    assert verdicts([{"10": 0.7145}])["global model: test accuracy after round 10"].ok is None
    assert verdicts([{}])[name].reason == "round 100 of global was not run"
    other = verdicts([{"100": 0.8965}], pfedme_mnist.Config(lam=5.0))[name]
    assert other.ok is None and other.reason == "lam is 5.0 instead of 15.0"
    sizes = "training digits of the smallest and the largest client"
    assert verdicts([])[sizes].ok
    assert verdicts([], sizes=(1165, 3833))[sizes].ok is False


@pytest.mark.slow
def test_end_to_end(data_dir, tmp_path):
    argv = ["reproduce", "pfedme_mnist", "--quick", "--no-cache", "--data-dir", data_dir, "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    summary, runs = read_folder(tmp_path / "pfedme_mnist")
    assert [c["ok"] for c in summary["checks"]] == [True]
    for found in summary["results"]:
        assert runs[found["run"]][-1]["personal_accuracy"] == found["accuracy"] > 0.8
