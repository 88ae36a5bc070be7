"""The issue's list of bad input, case by case as a user meets it: data and settings.

What is wrong is named before anything is compiled. Files, folders and commands: test_bad_files.py.
"""

import json

import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedadam import fedadam
from algorithms.fedavg import fedavg
from algorithms.fedavgm import fedavgm
from tests.problems import softmax_model
from tests.refusals import COMPILED, PROGRAMS, raises, refused

MODEL = fl.models.logistic_regression(3)
SGD = optax.sgd(0.1)


def client(rows=4, label=2, **changes):
    return {"x": np.ones((rows, 2), np.float32), "y": np.full(rows, label)} | changes


def data(**sick):
    return fl.FederatedData.from_clients({"ann": client(), "bob": client(**sick)})


def process(federated_data, sampler=None, model=MODEL, **options):
    return fl.synchronous(fedavg(model, SGD, **options), federated_data, sampler)


def test_the_counter_sees_what_is_compiled():
    COMPILED.clear()
    fl.run(process(data()), 1)
    assert set(COMPILED) >= PROGRAMS - {"jit(step)"}  # which is a part of many


# ---- data ----


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fl.FederatedData.from_clients({}), ["at least one client"]),
        (lambda: fl.FederatedData.from_clients({"ann": client(0), "bob": client(0)}), ["none of the 2 clients"]),
        (lambda: fl.FederatedData.from_arrays({"x": np.zeros((0, 2))}, []), ["client_ids is empty"]),
        (lambda: fl.FederatedData.from_assignment({"x": np.zeros(3)}, np.full(3, -1), 2), ["none of the 2 clients"]),
    ],
)
def test_an_empty_data_set(call, words):
    refused(call, *words)


def test_a_split_that_leaves_a_part_empty():
    ones = fl.FederatedData.from_clients({"ann": client(1), "bob": client(1)})
    train, test = ones.split(0.8)
    refused(lambda: process(test), "data of synchronous", "has no example", "2 clients are empty", "split_clients")
    process(train)


def test_a_client_whose_arrays_differ_in_length():
    refused(lambda: data(y=np.zeros(5, int)), "'bob'", "field y has 5 rows", "x has 4")
    refused(lambda: fl.FederatedData.from_arrays(client(), ["ann"] * 5), "field x has 4 rows", "client_ids has 5")


@pytest.mark.parametrize("label", [3, -1])
@pytest.mark.parametrize("model", [MODEL, softmax_model(3, 2), fl.models.mlp(3)])
def test_labels_outside_the_models_classes(label, model):
    words = (f"label {label} of client 'bob'", "field 'y', row 3", "0..2")
    sick = data(y=np.array([0, 1, 2, label]))
    refused(lambda: process(sick, model=model), *words)
    raises(lambda: process(sick.on_device(), model=model), *words)  # looked for on the device
    assert not PROGRAMS & set(COMPILED)


def test_labels_of_the_test_data_too():
    healthy = process(data())
    state = healthy.init(0)
    evaluate = fl.per_client_accuracy(data(y=np.array([0, 1, 2, 7])))
    refused(lambda: evaluate(healthy, state), "label 7 of client 'bob'", "row 3")


@pytest.mark.parametrize("model", [MODEL, softmax_model(3, 2), fl.models.mlp(3)])
@pytest.mark.parametrize("evaluate", [fl.global_metrics, fl.per_client_accuracy])
def test_test_data_of_another_shape(evaluate, model):
    wide = fl.FederatedData.from_clients({"ann": client(x=np.ones((4, 5), np.float32))})
    words = ("of one example x has shape (5,), in training (2,)",)
    raises(lambda: fl.run(process(data(), model=model), 3, evaluate=evaluate(wide)), *words)


def test_test_data_of_another_shape_that_the_model_takes():
    """This one flattens its inputs."""
    column = fl.FederatedData.from_clients({"ann": client(x=np.ones((4, 2, 1), np.float32))})
    numbers = [fl.run(process(data()), 1, evaluate=fl.global_metrics(d)).metrics[-1]["loss"] for d in (column, data())]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_features_that_are_not_finite(value):
    x = np.ones((4, 2))
    x[2, 1] = value
    refused(lambda: data(x=x), "field x of client 'bob'", "row 2", "NaN, infinite or too large")
    refused(lambda: fl.FederatedData.from_arrays({"x": x}, [7, 7, 8, 8]), "field x of client 8, row 0")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.array([0, 1, 0.5, 1]), ["label 0.5 of client 'bob' (field 'y', row 2)", "integers 0..2"]),
        (np.array([0.0, 1, 2, 1]), ["labels 'y' must be integers 0..2", "float32", "y.astype(np.int32)"]),
        (np.array(["cat", "dog", "cat", "cat"]), ["client 'bob': field y has dtype <U3", "encode text as numbers"]),
        (np.array([0, None, 1, 1]), ["client 'bob': field y has dtype object", "missing"]),
        (np.eye(3, dtype=int)[[0, 1, 2, 0]], ["'bob'", "field y has shape (3,)", "'ann'"]),
        (np.array([0, 1, 2, 2**40]), ["field y has int64 values", "do not fit int32"]),
    ],
)
def test_labels_that_are_not_integers(labels, words):
    refused(lambda: process(data(y=labels)), *words)


def test_labels_that_are_booleans():
    flags = fl.FederatedData.from_clients({"ann": client(y=np.array([True, False, True, True]))})
    refused(lambda: process(flags), "labels 'y' must be integers 0..2", "bool", "y.astype(np.int32)")


def test_labels_in_one_hot_form():
    hot = fl.FederatedData.from_clients({"ann": client(y=np.eye(3, dtype=int)[[0, 1, 2, 0]])})
    refused(lambda: process(hot), 'labels "y" have shape', "one class number for each row")


def test_duplicate_ids(tmp_path):
    refused(lambda: fl.FederatedData.from_clients([("ann", client()), ("ann", client())]), "'ann'", "more than once")
    refused(lambda: fl.FederatedData.from_clients([(1, client()), (np.int64(1), client())]), "(1)", "more than once")
    refused(lambda: fl.fixed([0, 2, 0]), "id 0 occurs more than once")
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        for name in "ab":
            user = {"users": ["u1"], "num_samples": [1], "user_data": {"u1": {"x": [[1.0]], "y": [0]}}}
            (tmp_path / part / f"{name}.json").write_text(json.dumps(user))
    refused(lambda: fl.datasets.leaf(tmp_path), "'u1'", "b.json")


# ---- settings ----


def test_a_cohort_larger_than_the_population():
    refused(lambda: process(data(), fl.uniform(3)), "cohort_size 3", "population of 2 clients")
    refused(lambda: process(data(), fl.dropout(fl.uniform(3), 0.5)), "cohort_size 3")
    refused(lambda: process(data(), fl.weighted(2, [1, 0])), "cohort_size 2 exceeds the 1 clients")
    refused(lambda: process(data(), fl.fixed([0, 2])), "position 2", "0..1")


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "10", float("nan"), None])
@pytest.mark.parametrize("name", ["batch_size", "epochs", "steps"])
def test_amounts_of_work_that_are_not_positive(name, value):
    if value is None:
        value = [3]  # None means the default here
    refused(lambda: fedavg(MODEL, SGD, **{name: value}), f"{name} must be", "positive", repr(value))


@pytest.mark.parametrize("value", [0, -0.1, float("nan"), float("inf"), "fast"])
@pytest.mark.parametrize("algorithm", [fedadam, fedavgm])
def test_learning_rates_that_are_not_positive(algorithm, value):
    call = lambda: algorithm(MODEL, SGD, server_learning_rate=value)
    refused(call, "server_learning_rate must be", "positive", repr(value))


@pytest.mark.parametrize("rate", [0.0, -0.1, float("nan"), float("inf")])
def test_the_clients_learning_rate(rate):
    raises(lambda: fedavg(MODEL, optax.sgd(rate)), "client_optimizer", "learning rate must be positive and finite")
    assert not PROGRAMS & set(COMPILED)


def test_optimizers_in_place_of_which_something_else_stands():
    refused(lambda: fedavg(MODEL, 0.1), "client_optimizer", "optax.sgd(0.1)")
    refused(lambda: fedavg(MODEL, optax.adam), "client_optimizer", "call it with a learning rate")
    refused(lambda: process(data(), model=MODEL, server_optimizer=1.0), "server_optimizer", "optax.sgd(0.1)")
    refused(lambda: fl.synchronous(fedavg(MODEL, lambda r: 0.1 / (1 + r)), data()), "client optimizer of a round")


# ---- what a model reads ----


def tokens(x=3, y=3):
    fill = lambda value: np.full((2, 5), value)
    return fl.FederatedData.from_clients({"ann": {"x": fill(3), "y": fill(3)}, "bob": {"x": fill(x), "y": fill(y)}})


@pytest.mark.parametrize("model", [fl.models.char_lstm(9, hidden=4), fl.models.word_lstm(9, 4, 4)])
def test_tokens_outside_the_vocabulary(model):
    refused(lambda: process(tokens(x=9), model=model), "token 9 of client 'bob' (field 'x', row 0)", "vocabulary 0..8")
    refused(lambda: process(tokens(x=-1), model=model), "token -1 of client 'bob'")
    refused(lambda: process(tokens(y=9), model=model), "label 9 of client 'bob'", "0..8")
    process(tokens(x=8, y=8), model=model)


@pytest.mark.parametrize("label", [2, -1, 1.5])
def test_tags_that_neither_apply_nor_not(label):
    tags = np.zeros((4, 5))
    tags[2, 3] = label
    sick = fl.FederatedData.from_clients({"ann": client(y=np.eye(4, 5)), "bob": client(y=tags)})
    words = f"label {float(label)} of client 'bob' (field 'y', row 2)", "0..1"
    refused(lambda: process(sick, model=fl.models.tag_regression(5)), *words)


def test_tags_as_numbers_booleans_and_shares():
    for tags in (np.eye(4, 5), np.eye(4, 5, dtype=int), np.eye(4, 5, dtype=bool), np.full((4, 5), 0.5)):
        process(fl.FederatedData.from_clients({"ann": client(y=tags)}), model=fl.models.tag_regression(5))


@pytest.mark.parametrize(("network", "side"), [(fl.models.fedavg_cnn, 4), (fl.models.emnist_cnn, 6)])
def test_images_that_are_too_small(network, side):
    images = lambda side: fl.FederatedData.from_clients({"ann": client(x=np.ones((4, side, side), np.float32))})
    for small in range(1, side):
        raises(lambda s=small: process(images(s), model=network(3)), "too small", f"{side} x {side}")
    process(images(side), model=network(3))
