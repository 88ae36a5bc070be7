"""FedRecon against NumPy, its bytes, its statelessness, and what it gives a client that never trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.fedrecon import fedrecon
from algorithms.local_only import local_only
from algorithms.scaffold import scaffold
from fedjax_lab.transforms import leaves, personal_model, private, reconstruction
from tests.laws.test_centralised import numpy_gradient
from tests.problems import softmax_data, softmax_model, steps
from tests.transforms.test_nothing_private import travelling

MODEL = softmax_model()
HEAD = leaves("params/b")
ETA, ETA_R, K_R = 0.5, 0.3, 3


def round_():
    return fedrecon(
        MODEL, optax.sgd(ETA), private=HEAD, reconstruction_optimizer=optax.sgd(ETA_R), reconstruction_steps=K_R,
        steps=2, batch_size=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    data = softmax_data((9, 6, 1))
    process = fl.synchronous(round_(), data)
    return data, process, *steps(process, 2)


def rebuilt(w, x, y):
    """Line R: K_R full-batch steps on b alone, from zero."""
    b = np.zeros(3)
    for _ in range(K_R):
        b = b - ETA_R * numpy_gradient(w, b, x, y)[1]
    return b


def examples(part):
    batch, mask = part.full()
    return np.asarray(batch["x"], np.float64)[np.asarray(mask)], np.asarray(batch["y"])[np.asarray(mask)]


def test_it_is_algorithm_1(trained):
    _, process, state, _ = trained
    w = np.asarray(process.params(process.init(jax.random.key(0)))["w"], np.float64)
    for _ in range(2):
        total, weight = 0.0, 0
        for k in range(2):  # the third has nothing left to train on
            support, query = process.data.view(jnp.int32(k)).split(0.5)
            b, own = rebuilt(w, *examples(support)), w.copy()
            for _ in range(2):
                own = own - ETA * numpy_gradient(own, b, *examples(query))[0]
            total, weight = total + int(query.size) * (own - w), weight + int(query.size)
        w = w + total / weight
    np.testing.assert_allclose(process.params(state)["w"], w, atol=1e-5)
    np.testing.assert_array_equal(process.params(state)["b"], np.zeros(3))


def test_nothing_private_travels_and_nothing_is_kept(trained):
    data, process, state, metrics = trained
    assert fl.total_bytes(metrics["uplink_bytes"]) == fl.total_bytes(metrics["downlink_bytes"]) == 3 * 4 * 12
    assert jax.tree.leaves(process.clients(state).table) == []
    over = fl.compose(scaffold(MODEL, optax.sgd(0.1)), reconstruction(MODEL, HEAD))
    for shapes in travelling(over, data.on_device()):
        assert sorted(shapes) == [(4, 3), (4, 3)]  # the shared part, and the control variate of what is shared


def test_a_client_uses_what_it_rebuilds_from_all_its_data_also_if_it_never_took_part(trained):
    data, process, state, _ = trained
    w = np.asarray(process.params(state)["w"], np.float64)
    unseen = fl.FederatedData.from_clients({"new": data.client("c1").arrays})
    found = fl.client_metrics(unseen, unseen, personal=True)(process, state)
    rows = data.client("c1").arrays
    b = rebuilt(w, rows["x"], rows["y"])
    expected = np.mean(np.argmax(rows["x"] @ w + b, -1) == rows["y"])
    assert found.values["accuracy"][0] == pytest.approx(expected, abs=1e-6)
    again = fl.client_metrics(data, personal=True)(process, state)
    assert again.values["loss"][1] == pytest.approx(found.values["loss"][0], rel=1e-6)


@pytest.mark.slow
def test_over_other_rounds_it_trains():
    data = softmax_data()
    over = fl.compose(scaffold(MODEL, optax.sgd(0.3)), reconstruction(MODEL, HEAD), personal_model(0.5))
    process = fl.synchronous(over, data, fl.uniform(4))
    state, metrics = steps(process, 6)
    assert np.isfinite(float(metrics["loss"]))
    assert fl.per_client_accuracy(data)(process, state)["personal_accuracy"] > 0.6


BASE = fedavg(MODEL, optax.sgd(0.1))
OTHER = softmax_model(classes=5)


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: reconstruction(MODEL, HEAD, support=1.0), "support must be a share"),
        (lambda: reconstruction(MODEL, HEAD, support=0), "support must be a share"),
        (lambda: reconstruction(optax.sgd(0.1), HEAD), "model must be a fl.Model"),
        (lambda: fl.compose(BASE, reconstruction(MODEL, HEAD, epochs=2)), "only together with a client_optimizer"),
        (lambda: fl.compose(local_only(MODEL, optax.sgd(0.1)), reconstruction(MODEL, HEAD)), "sends none"),
        (lambda: fl.compose(BASE, private(HEAD), reconstruction(MODEL, HEAD)), "put it first"),
        (lambda: process(BASE, reconstruction(MODEL, lambda path: True)), "makes everything private"),
        (lambda: process(BASE, reconstruction(MODEL, leaves("params/c"))), "makes nothing private"),
        (lambda: process(BASE, reconstruction(OTHER, HEAD)), "give it the Round's own model"),
        (lambda: process(BASE, reconstruction(MODEL, HEAD), sizes=(1, 1)), "no client has two examples"),
    ],
)
def test_refusals(build, word):
    with pytest.raises(ValueError, match=word):
        build()


def process(*parts, sizes=(5, 4)):
    return fl.synchronous(fl.compose(*parts), softmax_data(sizes))
