"""kNN-Per against NumPy, for ragged clients; its neutral value, and that it leaves training alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.knn_per import knn_per
from algorithms.local_only import local_only
from fedjax_lab.transforms import nearest_neighbours
from tests.problems import assert_same_bits, softmax_data, softmax_model, steps

MODEL = softmax_model()
SIZES = (7, 12, 1)
WORK = {"epochs": 1}


def features(variables, x):
    """Something that depends on the model."""
    return jnp.tanh(x @ variables.params["w"])


@pytest.fixture(scope="module")
def trained():
    data = softmax_data(SIZES, empty=1)
    process = fl.synchronous(fedavg(MODEL, optax.sgd(0.3), **WORK), data)
    return data, softmax_data((5, 8, 3), seed=1, empty=1), process, steps(process, 2)[0]


def found(trained, **options):
    """Evaluated on other examples, with the trained model's own state; clients c0..c3."""
    _, test, process, state = trained
    round = knn_per(MODEL, optax.sgd(0.3), features=features, **options, **WORK)
    return fl.client_metrics(test, personal=True)(process._replace(round=round), state)


def by_hand(trained, k, lam, scale=1.0):
    """Equations 8 and 9, one example after the other."""
    data, test, process, state = trained
    w, b = (np.asarray(process.params(state)[n], np.float64) for n in ("w", "b"))
    losses, hits = [], []
    for name in test.ids:
        own, asked = data.client(name).arrays, test.client(name).arrays
        keys, loss, hit = np.tanh(own["x"] @ w), [], []
        for x, y in zip(asked["x"].astype(np.float64), asked["y"], strict=True):
            p = np.exp(x @ w + b) / np.exp(x @ w + b).sum()
            if len(keys):
                d = np.sqrt(((np.tanh(x @ w) - keys) ** 2).sum(1))
                near = np.argsort(d, kind="stable")[:k]
                votes = np.array([np.exp(-d[near] / scale)[own["y"][near] == c].sum() for c in range(3)])
                p = lam * votes / votes.sum() + (1 - lam) * p
            loss.append(-np.log(p[y]))
            hit.append(np.argmax(p) == y)
        losses.append(np.mean(loss) if loss else 0.0)
        hits.append(np.mean(hit) if hit else 0.0)
    return losses, hits


@pytest.mark.parametrize(("k", "lam", "scale"), [(100, 0.6, 1.0), (3, 0.3, 0.1)])
def test_it_is_the_papers_equations(trained, k, lam, scale):
    metrics = found(trained, k=k, lam=lam, scale=scale)
    losses, hits = by_hand(trained, k, lam, scale)
    np.testing.assert_allclose(metrics.values["loss"], losses, rtol=1e-4)
    np.testing.assert_allclose(metrics.values["accuracy"], hits, atol=1e-6)


def test_without_neighbours_it_is_the_inner_rounds_model(trained):
    _, test, process, state = trained
    plain = fl.client_metrics(test)(process, state)
    mixed = found(trained, lam=0.0)
    np.testing.assert_allclose(mixed.values["loss"], plain.values["loss"], rtol=1e-5)
    np.testing.assert_array_equal(mixed.values["accuracy"], plain.values["accuracy"])


def test_neighbours_alone_never_give_an_infinite_loss(trained):
    """c2 has one example: all its votes go to one class."""
    metrics = found(trained, lam=1.0, capacity=1)
    assert np.isfinite(metrics.values["loss"]).all()
    assert metrics.examples.tolist() == [5, 8, 3, 0]
    data, test, *_ = trained
    only = data.client("c2").arrays["y"][0]
    assert metrics.values["accuracy"][2] == pytest.approx(np.mean(test.client("c2").arrays["y"] == only))


def test_training_is_the_inner_rounds_bit_for_bit(trained):
    data, _, process, state = trained
    round = knn_per(MODEL, optax.sgd(0.3), features=features, **WORK)
    own = fl.synchronous(round, data)
    assert_same_bits(own.server(steps(own, 2)[0]), process.server(state))


BASE = fedavg(MODEL, optax.sgd(0.1))


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: nearest_neighbours(features, num_classes=3, lam=1.2), "lam must lie between 0 and 1"),
        (lambda: nearest_neighbours(features, num_classes=3, lam=-0.1), "lam must"),
        (lambda: nearest_neighbours(features, num_classes=3, k=0), "k must be positive"),
        (lambda: nearest_neighbours(features, num_classes=3, k=1.5), "k must be a positive integer"),
        (lambda: nearest_neighbours(features, num_classes=3, scale=0), "scale must"),
        (lambda: nearest_neighbours(features, num_classes=3, capacity=0), "capacity must"),
        (lambda: nearest_neighbours(features, num_classes=0), "num_classes must"),
        (lambda: nearest_neighbours("w", num_classes=3), "features must be a function"),
        (
            lambda: fl.compose(local_only(MODEL, optax.sgd(1)), nearest_neighbours(features, num_classes=3)),
            "sends none",
        ),
        (lambda: knn_per(MODEL._replace(num_classes=None), optax.sgd(0.1), features=features), "needs a classifier"),
    ],
)
def test_refusals(build, word):
    with pytest.raises(ValueError, match=word):
        build()


def test_representations_must_be_vectors():
    round = fl.compose(BASE, nearest_neighbours(lambda variables, x: x[:, 0], num_classes=3))
    client = softmax_data(SIZES).on_device().view(jnp.int32(0))
    with pytest.raises(ValueError, match="a vector for each of 12 examples"):
        round.personalize(fl.Variables(*MODEL.init(jax.random.key(0))), (), client, jax.random.key(0))


@pytest.mark.parametrize("k", [100, 2])
def test_of_several_weights_each_client_takes_what_predicts_its_examples_best(trained, k):
    """Each example by the others: by hand, over a grid, with a client that has one example and one without any."""
    grid = (0.0, 0.3, 0.6, 0.9)
    data, _, process, state = trained
    w, b = (np.asarray(process.params(state)[n], np.float64) for n in ("w", "b"))
    best = []
    for name in data.ids:
        own = data.client(name).arrays
        keys, losses = np.tanh(own["x"] @ w), np.zeros(len(grid))
        for i, (x, y) in enumerate(zip(own["x"].astype(np.float64), own["y"], strict=True)):
            p = np.exp(x @ w + b) / np.exp(x @ w + b).sum()
            others = np.delete(np.arange(len(keys)), i)
            d = np.sqrt(((keys[i] - keys[others]) ** 2).sum(1))
            near = np.argsort(d, kind="stable")[:k]
            votes = np.array([np.exp(-d[near])[own["y"][others[near]] == c].sum() for c in range(3)])
            for j, lam in enumerate(grid):
                mixed = lam * votes / votes.sum() + (1 - lam) * p if len(others) else p
                losses[j] -= max(np.log(mixed[y]) if mixed[y] > 0 else -np.inf, -87)
        best.append(grid[int(np.argmin(losses))])
    assert len(set(best)) > 1  # else one weight for all would do
    metrics = found(trained, lam=grid, k=k)
    each = {lam: found(trained, lam=lam, k=k) for lam in set(best)}
    for i, lam in enumerate(best):
        np.testing.assert_allclose(metrics.values["loss"][i], each[lam].values["loss"][i], rtol=1e-5)


@pytest.mark.parametrize(("lam", "said"), [((), "got none"), ((0.5, 1.5), "lam"), ([-0.1], "lam")])
def test_weights_that_cannot_be_are_refused(lam, said):
    with pytest.raises(ValueError, match=said):
        nearest_neighbours(features, num_classes=3, lam=lam)
