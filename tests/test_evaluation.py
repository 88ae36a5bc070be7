"""Evaluation as a Round: against plain NumPy over each client's rows."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.local_only import local_only
from fedjax_lab.evaluation import ClientMetrics, summarise
from tests.problems import softmax_data, softmax_model, steps

MODEL = softmax_model()


def by_hand(params, data, name):
    """Accuracy of each client, in NumPy."""
    rows = data.client(name).arrays
    if not len(rows["y"]):
        return 0.0
    return float(np.mean(np.argmax(rows["x"] @ np.asarray(params["w"]) + np.asarray(params["b"]), -1) == rows["y"]))


@pytest.fixture(scope="module")
def trained():
    data = softmax_data(empty=1)
    process = fl.synchronous(fedavg(MODEL, optax.sgd(0.3)), data, fl.uniform(5))
    return data, process, steps(process, 5)[0]


def test_clients_metrics_are_those_of_their_rows(trained):
    data, process, state = trained
    found = fl.client_metrics(data)(process, state)
    expected = [by_hand(process.params(state), data, name) for name in data.ids]
    np.testing.assert_allclose(found.values["accuracy"], expected, atol=1e-6)
    assert found.examples.tolist() == data.sizes.tolist()


def test_global_metrics_pool_all_examples(trained):
    data, process, state = trained
    params = process.params(state)
    logits = data.arrays["x"] @ np.asarray(params["w"]) + np.asarray(params["b"])
    report = fl.global_metrics(data)(process, state)
    assert report["accuracy"] == pytest.approx(np.mean(np.argmax(logits, -1) == data.arrays["y"]), abs=1e-6)
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), data.arrays["y"]]
    assert report["loss"] == pytest.approx(loss.mean(), rel=1e-5)


def test_the_summary_of_known_values():
    metrics = ClientMetrics(
        {"accuracy": np.array([0.1, 0.5, 0.9, 0.0, 0.7]), "loss": np.array([3.0, 2.0, 1.0, 0.0, 5.0])},
        np.array([10, 10, 20, 0, 10]),
    )
    report = summarise(metrics)
    assert report["accuracy"] == pytest.approx((1 + 5 + 18 + 7) / 50)
    assert report["accuracy_mean"] == pytest.approx(0.55)
    assert report["accuracy_variance"] == pytest.approx(np.var([0.1, 0.5, 0.9, 0.7]))
    assert report["accuracy_p50"] == pytest.approx(0.6)
    assert report["accuracy_worst10"] == pytest.approx(0.1)  # the worst of four
    assert report["loss_worst10"] == pytest.approx(5.0)  # high losses are the worst
    twenty = ClientMetrics({"accuracy": np.arange(20) / 20}, np.ones(20))
    assert summarise(twenty)["accuracy_worst10"] == pytest.approx(0.025)
    with pytest.raises(ValueError, match="acuracy"):
        summarise(metrics, ("acuracy",))


def test_a_subset_in_another_order_finds_its_clients(trained):
    data, process, state = trained
    part = data.select([4, 0, 2])
    found = fl.client_metrics(part)(process, state)
    expected = [by_hand(process.params(state), data, data.ids[k]) for k in (4, 0, 2)]
    np.testing.assert_allclose(found.values["accuracy"], expected, atol=1e-6)


def test_personal_models_are_each_clients_own_and_unseen_clients_start_from_the_server():
    data = softmax_data((30, 40, 20, 25), seed=3)
    seen, unseen = data.select([0, 1, 3]), data.select([2])
    process = fl.synchronous(local_only(MODEL, optax.sgd(0.5), epochs=5), seen)
    state, _ = steps(process, 4)
    found = fl.client_metrics(seen, personal=True)(process, state)
    tables = process.clients(state).table
    own = [leaf for leaf in jax.tree.leaves(tables) if leaf.shape[1:] == (4, 3)]
    assert len(own) == 1
    w = np.asarray(own[0])
    bias = next(np.asarray(x) for x in jax.tree.leaves(tables) if x.shape[1:] == (3,))
    expected = [by_hand({"w": w[k], "b": bias[k]}, seen, seen.ids[k]) for k in range(3)]
    np.testing.assert_allclose(found.values["accuracy"], expected, atol=1e-6)
    fresh = fl.client_metrics(unseen, personal=True)(process, state)
    start = process.init(jax.random.key(0))
    model = process.variables(start) if process.round.model else None
    if model is not None:
        assert fresh.values["accuracy"][0] == pytest.approx(by_hand(model.params, unseen, unseen.ids[0]), abs=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
def test_clients_left_out_for_values_that_are_not_finite_are_counted(trained, bad):
    """As if they were absent; a client without examples is absent anyway."""
    data, process, state = trained
    assert "non_finite_clients" not in fl.global_metrics(data)(process, state)
    rows = data.arrays["x"].copy()
    rows[int(data.starts[3]) + 2, 1] = rows[int(data.starts[6]), 0] = bad
    spoilt = dataclasses.replace(data, arrays=data.arrays | {"x": rows})
    assert np.flatnonzero(fl.client_metrics(spoilt)(process, state).non_finite).tolist() == [3, 6]
    without = data.select([0, 1, 2, 4, 5, 7, 8])
    for evaluate in (fl.global_metrics, fl.per_client):
        report = evaluate(spoilt)(process, state)
        assert report.pop("non_finite_clients") == 2
        assert report == pytest.approx(evaluate(without)(process, state), rel=1e-6)


def test_models_of_clients_own_that_diverged_are_counted():
    """They would only be missing from the mean, which would look the better for it."""
    train = softmax_data()
    process = fl.synchronous(fl.compose(fedavg(MODEL, optax.sgd(0.1)), fl.transforms.personal_model(0.5)), train)
    state, _ = steps(process, 1)
    table = jax.tree.map(lambda x: x.at[2].set(np.nan) if x.dtype.kind == "f" else x, state.clients.table)
    report = fl.per_client_accuracy(train)(process, state._replace(clients=state.clients._replace(table=table)))
    assert report["personal_non_finite_clients"] == 1


def test_support_must_match():
    data = softmax_data()
    with pytest.raises(ValueError, match="same clients"):
        fl.client_metrics(data.select([0]), data.select([1]))


# ---- in two halves, of which a larger program may contain the first ----


@pytest.mark.parametrize("make", [fedavg, local_only])
def test_part_of_a_larger_program_it_says_the_same_and_leaves_nothing_behind(make):
    data = softmax_data()
    test, support = softmax_data(seed=1), softmax_data(seed=2)
    process_for = lambda rate: fl.synchronous(make(MODEL, optax.sgd(rate)), data, fl.uniform(5))
    state, _ = steps(process_for(0.3), 2)
    evaluate = fl.combined(fl.per_client(test), fl.per_client_accuracy(test, support))

    @jax.jit
    def found(rate, state):
        return evaluate.arrays(process_for(rate), state)

    with jax.checking_leaks():
        arrays = jax.device_get(found(0.3, state))
    expected = evaluate(process_for(0.3), state)
    assert evaluate.numbers(arrays) == pytest.approx(expected, rel=1e-6)
    assert ("personal_accuracy_p50" in expected) == (make is local_only)


def test_combined_with_a_function_of_the_hosts(trained):
    data, process, state = trained
    counts = lambda process, state: {"clients": process.data.num_clients, "loss": 0.0}
    both = fl.combined(fl.global_metrics(data), counts)
    report = both(process, state)
    assert (report["clients"], report["loss"]) == (data.num_clients, 0.0)
    assert report["accuracy"] == fl.global_metrics(data)(process, state)["accuracy"]
    assert not hasattr(both, "arrays")


def test_one_name_and_whole_numbers_of_examples(trained):
    data, process, state = trained
    alone = fl.per_client(data, names="accuracy")(process, state)
    assert alone == fl.per_client_accuracy(data)(process, state)
    counts = fl.client_metrics(data)(process, state).examples
    assert counts.dtype == np.int32
    np.testing.assert_array_equal(counts, data.sizes)


@pytest.mark.parametrize(("name", "worst"), [("mse", 4.0), ("val_nll", 4.0), ("Loss", 4.0), ("recall", 1.0)])
def test_which_end_of_a_metric_is_its_worst(name, worst):
    metrics = ClientMetrics({name: np.array([1.0, 4.0, 2.0])}, np.ones(3))
    assert summarise(metrics)[f"{name}_worst10"] == worst
