"""Local training: what each client learns alone, and that nothing travels."""

import jax
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.local_only import local_only
from tests.algorithms.test_template import points, squared_distance
from tests.problems import assert_close, assert_same_bits, softmax_data, softmax_model, steps


def test_each_client_goes_its_own_way_by_hand():
    # Gradient w - x from w = 0: after t steps of rate r, w = (1 - (1 - r)^t) x. Two rounds of three steps.
    process = fl.synchronous(local_only(squared_distance(2), optax.sgd(0.5), steps=3), points([3, 4], [0, -2]))
    state, metrics = steps(process, 2)
    models = process.clients(state).table.variables.params
    np.testing.assert_allclose(models, (1 - 0.5**6) * np.array([[3, 4], [0, -2]]), rtol=1e-6)
    np.testing.assert_array_equal(process.params(state), [0, 0])
    assert fl.total_bytes(metrics["uplink_bytes"]) == fl.total_bytes(metrics["downlink_bytes"]) == 0
    assert int(metrics["survivors"]) == 2


def test_a_client_alone_is_fedavg_of_that_client():
    model, data = softmax_model(), softmax_data()
    work = {"epochs": 2, "batch_size": 4}
    alone = fl.synchronous(fedavg(model, optax.sgd(0.1), **work), data.select([0]))
    local = fl.synchronous(local_only(model, optax.sgd(0.1), **work), data, lanes=3)
    first = jax.tree.map(lambda t: t[0], local.clients(steps(local, 3)[0]).table.variables.params)
    assert_close(first, alone.params(steps(alone, 3)[0]), atol=1e-6)


def test_the_optimizer_goes_on_where_it_was():
    # Heavy ball by hand: velocity 1, then 1 + 1/2 on a constant gradient -1 (|w - x| stays far from 0).
    model = fl.models.from_functions(
        lambda key: np.zeros(1, np.float32), lambda params, x: x @ params, loss=lambda out, batch: -out, metrics={}
    )
    data = fl.FederatedData.from_clients({0: {"x": np.ones((1, 1), np.float32)}})
    process = fl.synchronous(local_only(model, optax.sgd(1.0, momentum=0.5), steps=1), data)
    np.testing.assert_allclose(process.clients(steps(process, 2)[0]).table.variables.params, [[1 + 1.5]])


def test_who_is_not_there_keeps_its_bits():
    process = fl.synchronous(local_only(softmax_model(), optax.sgd(0.1)), softmax_data(), fl.fixed([1, 4]))
    state = process.init(0)
    after, _ = process.step(state, process.data)
    np.testing.assert_array_equal(np.flatnonzero(process.clients(after).known), [1, 4])
    again, _ = process.step(after, process.data)
    others = lambda s: jax.tree.map(lambda t: np.asarray(t)[[0, 2, 3, 5]], process.clients(s).table)
    assert_same_bits(others(after), others(again))


def test_evaluation_reports_the_clients_models_and_no_shared_one():
    data = softmax_data()
    process = fl.synchronous(local_only(softmax_model(), optax.sgd(0.3), epochs=5), data)
    state, _ = steps(process, 5)
    measured = fl.per_client_accuracy(data)(process, state)
    assert all(name.startswith("personal_accuracy") for name in measured)
    params, right, total = process.clients(state).table.variables.params, 0, 0
    for k, name in enumerate(data.ids):
        examples = data.client(name).arrays
        scores = examples["x"] @ np.asarray(params["w"][k]) + np.asarray(params["b"][k])
        right += (scores.argmax(1) == examples["y"]).sum()
        total += len(scores)
    assert measured["personal_accuracy"] == pytest.approx(right / total, abs=1e-6)
    with pytest.raises(ValueError, match="no model metrics"):
        fl.global_metrics(data)(process, state)


def test_it_cannot_be_pulled_towards_a_model_that_it_never_receives():
    with pytest.raises(ValueError, match="trains no model"):
        fl.compose(local_only(softmax_model(), optax.sgd(0.1)), fl.transforms.proximal(1.0))
