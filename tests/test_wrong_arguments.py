"""Arguments of the wrong kind, in the wrong order or shape: each is refused with what was meant, before compilation.

What is as good as the right kind (NumPy's scalars, lists of weights, pairs in place of a dict, 64-bit arrays) is taken.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedadam import fedadam
from algorithms.fedavg import fedavg
from algorithms.fedavgm import fedavgm
from algorithms.fedprox import fedprox
from algorithms.local_only import local_only
from tests.problems import assert_same_bits, softmax_data, softmax_model
from tests.refusals import COMPILED, PROGRAMS, raises, refused

MODEL, SGD, DATA = softmax_model(), optax.sgd(0.1), softmax_data()
ROUND = fedavg(MODEL, SGD)
ROWS = {"x": np.ones((2, 4), np.float32), "y": np.array([0, 1])}
build = lambda round: fl.synchronous(round, DATA)
data = fl.FederatedData


def pandas_frame():
    return pytest.importorskip("pandas").DataFrame({"who": [1, 1, 2], "x": [1.0, 2, 3], "y": [0, 1, 1]})


CASES = {
    # data
    "no ids": (lambda: data.from_clients([ROWS, ROWS]), ["dict(enumerate(clients))", "entry 0 is a dict"]),
    "no ids, generated": (lambda: data.from_clients(r for r in [ROWS]), ["dict(enumerate(clients))"]),
    "no clients at all": (lambda: data.from_clients(None), ["a NoneType"]),
    "lists for arrays": (lambda: data.from_clients({"a": {"x": [[1.0, 2]], "y": [0]}}), ["'a'", "x/0/0", "np.asarray"]),
    "empty lists": (lambda: data.from_clients({"a": ROWS, "b": {"x": [], "y": []}}), ["'b'", "np.asarray"]),
    "frames": (lambda: data.from_clients({"a": pandas_frame()}), ["client 'a'", "from_table"]),
    "a frame": (lambda: data.from_clients(pandas_frame()), ["DataFrame"]),
    "a grouped frame": (lambda: data.from_clients(pandas_frame().groupby("who")), ["client 1", "from_table"]),
    "a frame and ids": (lambda: data.from_arrays(pandas_frame(), [1, 1, 2]), ["from_table"]),
    "ids first": (lambda: data.from_arrays([1, 2], ROWS), ["one id per row"]),
    "some ids missing": (lambda: data.from_arrays(ROWS, ["a", None]), ["client_ids", "missing"]),
    "ids that are NaN": (lambda: data.from_arrays(ROWS, [1.0, np.nan]), ["client_ids", "missing"]),
    "ids that can't be ids": (lambda: data.from_clients([([1], ROWS)]), ["[1]", "strings or integers"]),
    "attributes in a list": (lambda: data.from_clients({"a": ROWS}, attrs=[1]), ["attrs must be a dict"]),
    "attributes of text": (lambda: data.from_clients({"a": ROWS}, attrs={"city": ["Ulm"]}), ["'city'", "numeric"]),
    "too few owners": (lambda: data.from_assignment(ROWS, np.array([0])), ["field x", "1 rows"]),
    "owners out of range": (lambda: data.from_assignment(ROWS, np.array([0, 5]), 2), ["5", "0..1"]),
    "fractional owners": (lambda: data.from_assignment(ROWS, np.array([0.0, 1])), ["int[rows]"]),
    "a position too far": (lambda: DATA.select([8]), ["position 8", "0..7"]),
    "a position twice": (lambda: DATA.select([1, 1]), ["1 occurs more than once"]),
    "ids for positions": (lambda: DATA.select(["c0"]), ["integers", "'c0'"]),
    "shares of more parts": (lambda: DATA.split_clients((0.5, 0.3, 0.2)), ["the first part alone"]),
    "a share in words": (lambda: DATA.split("0.8"), ["0.8"]),
    "a number of clients for a partition": (lambda: fl.datasets.digits(100), ["partitioner", "iid(100)"]),
    # rounds
    "optimizer first": (lambda: fedavg(SGD, MODEL), ["model must be", "The model comes first"]),
    "a Flax module": (lambda: fedavg(fl.models.dense.Dense(3), SGD), ["model must be", "from_flax"]),
    "local training too": (lambda: local_only(MODEL, 0.1), ["client_optimizer", "got 0.1"]),
    "hidden units without a list": (lambda: fl.models.mlp(10, 64), ["(64,)"]),
    "weighting misspelt": (lambda: fedavg(MODEL, SGD, weighting="exmples"), ["did you mean 'examples'?"]),
    "weighting too short": (lambda: build(fedavg(MODEL, SGD, weighting=[1, 2])), ["8 non-negative", "(2,)"]),
    "weighting below zero": (lambda: fedavg(MODEL, SGD, weighting=[1, -1]), ["weighting", "-1 at position 1"]),
    "weighting NaN": (lambda: fedavg(MODEL, SGD, weighting=[1, np.nan]), ["weighting", "nan at position 1"]),
    "weighting nobody": (lambda: fedavg(MODEL, SGD, weighting=[0, 0]), ["weighting", "zeros only"]),
    "weighting by name": (lambda: fedavg(MODEL, SGD, weighting={"c0": 1}), ["weighting", "non-negative numbers"]),
    "no weighting": (lambda: fedavg(MODEL, SGD, weighting=None), ["weighting"]),
    "epochs and steps": (lambda: fedavg(MODEL, SGD, epochs=1, steps=1), ["not both"]),
    "epochs by a function, real": (lambda: build(fedavg(MODEL, SGD, epochs=lambda c, k: 1.5)), ["epochs", "1.5"]),
    "beta above one": (lambda: fedadam(MODEL, SGD, beta2=1.5), ["beta2", "between 0 and 1"]),
    "momentum above one": (lambda: fedavgm(MODEL, SGD, momentum=9), ["momentum", "between 0 and 1"]),
    "mu below zero": (lambda: fedprox(MODEL, SGD, mu=-1), ["mu", "-1"]),
    "a transform not called": (lambda: fl.compose(ROUND, fl.transforms.proximal), ["mu must be a number"]),
    "no transform": (lambda: fl.compose(ROUND, 0.1), ["transform 1", "0.1"]),
    "a transform that returns nothing": (lambda: fl.compose(ROUND, lambda r: None), ["transform 1", "no Round"]),
    "transform first": (lambda: fl.compose(fl.transforms.proximal(1.0), ROUND), ["takes a Round first"]),
    # processes
    "data first": (lambda: fl.synchronous(DATA, ROUND), ["takes a Round first", "FederatedData"]),
    "an algorithm not called": (lambda: fl.synchronous(fedavg, DATA), ["call it with a model"]),
    "both parts of the data": (lambda: fl.synchronous(ROUND, DATA.split(0.8)), [".train or .test"]),
    "a dict for data": (lambda: fl.synchronous(ROUND, {"a": ROWS}), ["from_clients"]),
    "a number for a sampler": (lambda: fl.synchronous(ROUND, DATA, 3), ["fl.uniform(10)", "got 3"]),
    "a sampler not called": (lambda: fl.synchronous(ROUND, DATA, fl.everyone), ["fl.uniform(10)"]),
    "half a lane": (lambda: fl.synchronous(ROUND, DATA, lanes=2.5), ["lanes must be a positive integer"]),
    "dropout of a number": (lambda: fl.dropout(10, 0.5), ["sampler must be", "got 10"]),
    "dropout the other way": (lambda: fl.dropout(0.5, fl.uniform(3)), ["rate must be a number"]),
    "infinite weights": (lambda: fl.weighted(1, [1.0] * 7 + [np.inf]).init(DATA), ["weights", "inf at position 7"]),
    # evaluation
    "both parts to evaluate on": (lambda: fl.per_client_accuracy(DATA.split(0.8)), [".train or .test"]),
    "a dict to evaluate on": (lambda: fl.global_metrics({"a": ROWS}), ["from_clients"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused(case):
    call, words = CASES[case]
    refused(call, *words)


def without_data():
    return fl.synchronous(ROUND)


def test_python_says_it_where_an_argument_is_missing():
    refused(without_data, "data", error=TypeError)
    refused(lambda: fedavg(MODEL, SGD, epoch=1), "'epoch'", error=TypeError)
    for key in ("seed", None, 1.5, True):
        init = fl.synchronous(ROUND, DATA).init
        refused(lambda init=init, key=key: init(key), "integer seed", f"got {key!r}", error=TypeError)


# ---- models ----


def loss_as(change):
    return MODEL._replace(loss=lambda *a: change(*MODEL.loss(*a)))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (loss_as(lambda losses, state: (losses.mean(), state)), ["loss", "one value for each example", "got shape ()"]),
        (loss_as(lambda losses, state: (losses[:, None], state)), ["loss", "got shape (10, 1)"]),
        (loss_as(lambda losses, state: losses), ["loss must return a tuple", "model_state"]),
        (MODEL._replace(init=lambda key: MODEL.init(key)[0]), ["init must return a tuple", "model_state"]),
    ],
)
def test_a_model_whose_functions_return_something_else(model, words):
    refused(lambda: build(fedavg(model, SGD)), *words)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (
            lambda p, s, batch: {"accuracy": jnp.mean(batch["y"])},
            ["accuracy", "one value for each", "shape ()"],
        ),
        (lambda p, s, batch: {"accuracy": batch["x"]}, ["accuracy", "one value for each example"]),
        (lambda p, s, batch: batch["y"], ["metrics must be a dict"]),
        (lambda p, s, batch: {"acc": batch["y"]}, ["no metric ['accuracy']", "['acc']"]),
        (None, ["no model metrics"]),
    ],
)
def test_metrics_of_another_form(metrics, words):
    process = build(fedavg(MODEL._replace(metrics=metrics), SGD))
    state = process.init(0)
    raises(lambda: fl.per_client_accuracy(DATA)(process, state), *words)


@pytest.fixture(scope="module")
def process():
    return build(ROUND)


GOOD = {"w": np.zeros((4, 3)), "b": np.zeros(3)}


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (GOOD | {"w": np.zeros((5, 3))}, ["leaf w has shape (5, 3)", "(4, 3)"]),
        ({"w": GOOD["w"]}, ["has the leaves ['w']", "['b', 'w']"]),
        (GOOD | {"w": np.zeros((4, 3), int)}, ["leaf w is int32", "float32"]),
        (GOOD | {"b": np.array([0, np.nan, 0])}, ["leaf b is NaN or infinite"]),
        (fl.Variables(GOOD), ["params/w"]),
        (np.zeros(3), ["(the array)"]),
    ],
)
def test_parameters_to_start_from(process, params, words):
    COMPILED.clear()
    raises(lambda: fl.run(process, 1, params=params), *words)
    assert not PROGRAMS & set(COMPILED)


RUNS = {
    "a round": (lambda p: fl.run(ROUND, 1), ["Process", "got Round"]),
    "the other way": (lambda p: fl.run(3, p), ["num_rounds must be an integer"]),
    "half a round": (lambda p: fl.run(p, 1.5), ["num_rounds must be an integer", "1.5"]),
    "a key for a seed": (lambda p: fl.run(p, 1, seed=jax.random.key(1)), ["seed must be an integer"]),
    "every zero rounds": (lambda p: fl.run(p, 1, every=0), ["every must be an integer of at least 1"]),
    "a number for callbacks": (lambda p: fl.run(p, 1, callbacks=3), ["callback", "got 3"]),
    "data for evaluate": (lambda p: fl.run(p, 1, evaluate=DATA), ["evaluate must be a function"]),
    "evaluate not called": (lambda p: fl.run(p, 1, evaluate=fl.per_client_accuracy), ["must be a FederatedData"]),
    "evaluate gives arrays": (lambda p: fl.run(p, 1, evaluate=lambda p, s: {"a": np.zeros(3)}), ["'a'", "one number"]),
    "evaluate gives a number": (lambda p: fl.run(p, 1, evaluate=lambda p, s: 0.5), ["must return a dict", "float"]),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_is_refused(process, case):
    call, words = RUNS[case]
    raises(lambda: call(process), *words)


# ---- what is as good ----


def test_numpys_scalars_are_numbers(process):
    settings = {"epochs": np.int64(1), "batch_size": np.int32(10), "weighting": [float(n) for n in DATA.sizes]}
    same = fl.synchronous(fedavg(MODEL, optax.sgd(np.float32(0.1)), **settings), DATA, lanes=np.int64(8))
    assert_same_bits(fl.run(same, np.int64(1)).params, fl.run(fl.synchronous(ROUND, DATA, lanes=8), 1).params)
    assert_same_bits(process.init(np.int64(3)), process.init(3))


def test_arrays_of_other_widths_and_homes_are_data(process):
    """64 bits, unsigned bytes, JAX's own, pairs from a generator: the same data."""
    clients = {i: DATA.client(i).arrays for i in DATA.ids}
    widths = {"x": np.float64, "y": np.int64}
    wide = data.from_clients((i, {name: c[name].astype(to) for name, to in widths.items()}) for i, c in clients.items())
    device = data.from_clients({i: jax.tree.map(jnp.asarray, c) for i, c in clients.items()}).on_device()
    expected = fl.run(process, 1).params
    for other in (wide, device):
        assert_same_bits(fl.run(fl.synchronous(ROUND, other), 1).params, expected)
    pixels = data.from_clients({"a": {"x": np.full((2, 4), 255, np.uint8), "y": np.array([0, 1])}})
    ones = data.from_clients({"a": {"x": np.ones((2, 4), np.float32), "y": np.array([0, 1])}})
    results = [fl.run(fl.synchronous(fedavg(fl.models.mlp(3), SGD), d), 1).params for d in (pixels, ones)]
    assert_same_bits(*results)


def test_an_empty_client_has_no_say_in_the_types():
    clients = {"a": ROWS, "nobody": {"x": np.zeros((0, 4)), "y": np.array([])}}
    assert data.from_clients(clients).arrays["y"].dtype == np.int32


def test_a_mask_selects_clients():
    mask = np.arange(DATA.num_clients) % 3 == 1
    assert DATA.select(mask).ids == [i for i, chosen in zip(DATA.ids, mask, strict=True) if chosen]


def test_metrics_that_are_finite_nowhere_are_left_out(process):
    """A model that diverged, or a test set without a row, doesn't end the run."""
    far = {"w": np.random.default_rng(0).normal(0, 1e30, (4, 3)), "b": np.zeros(3)}
    seen = fl.run(process, 0, params=far, evaluate=fl.per_client(DATA)).metrics
    assert seen == [{"round": 0, "non_finite_clients": DATA.num_clients}]  # all are counted
    alone = data.from_clients({k: {"x": np.ones((1, 4), np.float32), "y": np.array([k])} for k in range(3)})
    train, test = alone.split(0.8)
    for evaluate in (fl.per_client(test), fl.global_metrics(test)):
        assert set(fl.run(fl.synchronous(ROUND, train), 1, evaluate=evaluate).metrics[0]) == {"round"}
