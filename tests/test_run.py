"""run: rounds, records, evaluation and refusals, on a walk that compiles at once."""

import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab.records import round_records
from tests.problems import assert_same_bits, softmax_data, softmax_model
from tests.promises.resuming import walk
from tests.test_run_folder import lines

BYTES_A_ROUND = 40_000 * 65536 + 7  # what the walk reports


# ---- rounds ----


def test_agrees_with_steps_made_one_by_one():
    process = walk()
    state, losses = process.init(jax.random.key(3)), []
    for _ in range(7):
        state, metrics = process.step(state, process.data)
        losses.append(float(metrics["loss"]))
    result = fl.run(process, 7, seed=3, every=3)
    np.testing.assert_allclose(result.params, state.w, rtol=1e-6)
    np.testing.assert_allclose([m["loss"] for m in result.metrics], losses, rtol=1e-6)
    assert [m["round"] for m in result.metrics] == [1, 2, 3, 4, 5, 6, 7]
    assert (result.rounds, result.stopped) == (7, "all rounds done")


@pytest.mark.parametrize("every", [1, 2, 5, 100])
def test_the_same_bits_for_any_every(every):
    process = walk()
    whole, result = fl.run(process, 11, every=11), fl.run(process, 11, every=every)
    assert_same_bits(result.state, whole.state)
    assert result.metrics == whole.metrics


def test_the_rounds_of_the_first_dispatch_count_as_running():
    """Each round sleeps for 50 ms in a callback."""
    base = walk()

    def step(state, data):
        state, metrics = base.step(state, data)
        io_callback(lambda: time.sleep(0.05), None, ordered=True)
        return state, metrics

    result = fl.run(base._replace(step=jax.jit(step)), 4, every=4)
    assert result.seconds >= 0.2
    assert len(result.metrics) == 4 and result.compile_seconds > 0


def test_bytes_are_exact_integers():
    result = fl.run(walk(), 9, every=4)
    assert result.uplink_bytes == 9 * BYTES_A_ROUND > 2**34
    assert result.downlink_bytes == 9 * 65537
    assert result.metrics[0]["uplink_bytes"] == BYTES_A_ROUND
    assert all(type(m["uplink_bytes"]) is int for m in result.metrics)


def test_probes_count_in_the_totals():
    base = walk()

    def step(state, data):
        state, metrics = base.step(state, data)
        return state, metrics | {"probe_uplink_bytes": jnp.array([0, 5], jnp.uint32)}

    result = fl.run(base._replace(step=step), 4)
    assert result.uplink_bytes == 4 * (BYTES_A_ROUND + 5)
    assert result.metrics[0]["probe_uplink_bytes"] == 5


def test_one_trace_in_a_hundred_rounds():
    base, traces = walk(), []

    def step(state, data):
        traces.append(1)
        return base.step(state, data)

    process = base._replace(step=step)
    for seed in (0, 1):
        fl.run(process, 100, seed=seed, every=7)  # 14 chunks and a remainder
    assert len(traces) == 1


def test_a_federated_run_has_one_trace_and_no_recompilation(tmp_path):
    base, traces = softmax_model(), []

    def loss(*args):
        traces.append(1)
        return base.loss(*args)

    algorithm = fedavg(base._replace(loss=loss), optax.sgd(0.1), batch_size=4)
    process = fl.synchronous(algorithm, softmax_data(), fl.dropout(fl.uniform(4), 0.3))
    fl.run(process, 3, every=3)
    before = len(traces)
    evaluate = fl.global_metrics(softmax_data())
    fl.run(process, 100, every=3, out=tmp_path, seed=5)
    fl.run(process, 10, every=3, evaluate=evaluate, seed=6)
    assert len(traces) == before


def test_data_may_be_replaced_without_compiling_again():
    base, traces = walk(), []

    def step(state, data):
        traces.append(1)
        state, metrics = base.step(state, data)
        return state, metrics | {"first": data.arrays["x"][0, 0]}

    process = base._replace(step=step)
    data = process.data
    doubled = jax.tree.map(lambda x: 2 * x, data.arrays)
    other = process._replace(data=type(data)(doubled, *[getattr(data, n) for n in (
        "starts", "sizes", "attrs", "id_table", "max_size", "tile")]))  # fmt: skip
    a, b = fl.run(process, 2, every=2), fl.run(other, 2, every=2)
    assert b.metrics[0]["first"] == 2 * a.metrics[0]["first"]
    assert len(traces) == 1


def test_the_users_arrays_survive():
    process, params = walk(), jnp.array([1.0, 2.0, 3.0])
    first = fl.run(process, 3, params=params)
    assert params.tolist() == [1, 2, 3]
    assert first.params.shape == (3,)
    second = fl.run(process, 3, params=first.params, every=3)
    assert not np.array_equal(first.params, second.params)
    assert np.isfinite(first.state.table).all() and np.isfinite(process.data.arrays["x"]).all()


def test_no_rounds_at_all():
    process = walk()
    result = fl.run(process, 0, evaluate=lambda p, s: {"w0": s.w[0]})
    assert result.metrics == [{"round": 0, "w0": 1.0}]
    assert (result.uplink_bytes, result.rounds) == (0, 0)
    assert_same_bits(result.state, process.init(jax.random.key(0)))


def test_a_result_is_told_in_a_line():
    text = repr(fl.run(walk(), 2))
    assert text.startswith("Result(2 rounds, all rounds done, 5,242,880,014 bytes up, 131,074 down")
    assert "\n" not in text and len(text) < 300


# ---- records ----


def test_values_become_plain_python():
    metrics = {
        "loss": np.array([0.5, np.nan], np.float32),
        "count": np.array([3, 4], np.int32),
        "sent_bytes": np.array([[1, 2], [0, 9]], np.uint32),
        "flag": np.array([True, False]),
        "histogram": np.array([[1.0, np.inf], [2.0, 3.0]], np.float32),
        "blown": np.array([np.inf, -np.inf], np.float32),
    }
    first, second = round_records(4, 2, metrics)
    assert first == {
        "round": 5, "loss": 0.5, "count": 3, "sent_bytes": 65538, "flag": True, "histogram": [1.0, None],
    }  # fmt: skip
    assert second == {"round": 6, "count": 4, "sent_bytes": 9, "flag": False, "histogram": [2.0, 3.0]}
    json.dumps([first, second], allow_nan=False)


def test_a_round_that_nobody_survived_has_no_loss(tmp_path):
    algorithm = fedavg(softmax_model(), optax.sgd(0.1), batch_size=4)
    process = fl.synchronous(algorithm, softmax_data(), fl.dropout(fl.uniform(4), 1.0))
    result = fl.run(process, 2, out=tmp_path)
    assert [sorted(m) for m in result.metrics] == [
        ["downlink_bytes", "invited", "non_finite", "round", "survivors", "uplink_bytes"]
    ] * 2
    assert lines(tmp_path) == result.metrics
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


# ---- evaluation ----


def test_evaluation_at_logging_points():
    evaluate = lambda process, state: {"w0": state.w[0], "rounds": state.round, "bad": math.nan}
    result = fl.run(walk(), 8, evaluate=evaluate, every=3)
    assert [m["round"] for m in result.metrics] == list(range(9))
    assert [m["rounds"] for m in result.metrics if "rounds" in m] == [0, 3, 6, 8]
    assert result.metrics[0] == {"round": 0, "w0": 1.0, "rounds": 0}
    assert result.metrics[-1]["w0"] == float(result.state.w[0])


def test_a_name_that_rounds_use_too():
    plain = fl.run(walk(), 4, every=2)
    result = fl.run(walk(), 4, every=2, evaluate=lambda p, s: {"loss": 7.0})
    assert [m.get("loss") for m in result.metrics] == [7.0, None, 7.0, None, 7.0]
    assert [m["train_loss"] for m in result.metrics[1:]] == [m["loss"] for m in plain.metrics]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"accuracy": "high"}, "evaluate returned 'high' .str. for 'accuracy'; every entry must be one number"),
        ({"per_client": np.ones(3)}, "for 'per_client'"),
        ({"a": None}, "for 'a'"),
        (0.5, "evaluate must return a dict of numbers; it returned float"),
        ({"round": 3}, "an entry named 'round'"),
        ({"uplink_bytes": 3}, "an entry named 'uplink_bytes'"),
    ],
)
def test_evaluations_that_are_no_numbers(returned, message):
    with pytest.raises(ValueError, match=message):
        fl.run(walk(), 2, evaluate=lambda process, state: returned)


def test_a_name_that_comes_late_and_clashes():
    evaluate = lambda process, state: {"loss": 1.0} if int(state.round) else {}
    with pytest.raises(ValueError, match="'loss' for the first time after 1 rounds"):
        fl.run(walk(), 2, evaluate=evaluate)


# ---- bad arguments ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_rounds": -1}, "num_rounds must be an integer of at least 0; got -1"),
        ({"num_rounds": 2.5}, "num_rounds must be an integer; got 2.5"),
        ({"num_rounds": True}, "num_rounds must be an integer"),
        ({"every": 0}, "every must be an integer of at least 1; got 0"),
        ({"seed": -4}, "seed must be an integer of at least 0; got -4"),
        ({"seed": "a"}, "seed must be an integer; got 'a'"),
        ({"seed": 2**32}, "seed must be an integer of at least 0 and below 4294967296; got 4294967296"),
        ({"out": ""}, "out is an empty string"),
        ({"resume": "yes"}, "resume must be True, False or 'anyway'; got 'yes'"),
        ({"evaluate": 3}, "evaluate must be a function"),
        ({"callbacks": [3]}, "a callback must be a function of one Info; got 3"),
        ({"checkpoint_every": -1}, "checkpoint_every must be a number of at least 0"),
        ({"config": 3}, "config must be a dict; got int"),
        ({"config": {"a": 1, "b": object()}}, "config entry 'b' can't be written as JSON"),
        ({"process": fedavg}, "run takes a Process, such as fl.synchronous"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        fl.run(**({"process": walk(), "num_rounds": 2} | arguments))
