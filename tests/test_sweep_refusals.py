"""What sweep refuses, before anything is compiled, naming the grid and the value."""

import functools
import re

import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.fedprox import fedprox
from tests.problems import softmax_data, softmax_model
from tests.promises.resuming import walk
from tests.refusals import refused


def make(learning_rate, mu=0.0):
    algorithm = fedprox(softmax_model(), optax.sgd(learning_rate), mu=mu, epochs=2, batch_size=10)
    return fl.synchronous(algorithm, softmax_data(), fl.uniform(4))


def test_grids_and_seeds_that_are_none():
    sweep = functools.partial(fl.sweep, make, 3)
    refused(lambda: sweep([], learning_rate=[0.1]), "seeds is empty", "range(8)")
    refused(lambda: sweep(3, learning_rate=[0.1]), "seeds must be a list of integers", "got 3")
    refused(lambda: sweep([0.5], learning_rate=[0.1]), "seeds must be a list of integers")
    refused(lambda: sweep([True], learning_rate=[0.1]), "seeds must be a list of integers")
    refused(lambda: sweep([1, 1], learning_rate=[0.1]), "the seed 1 occurs twice")
    refused(lambda: sweep([-1], learning_rate=[0.1]), "at least 0", "-1")
    refused(lambda: sweep([0], learning_rate=[]), "learning_rate is an empty grid")
    refused(lambda: sweep([0], learning_rate=0.1), "learning_rate must be a list of numbers", "got 0.1")
    refused(lambda: sweep([0], learning_rate=["a"]), "learning_rate must be a list of numbers")
    refused(lambda: sweep([0], learning_rate="0.1"), "learning_rate must be a list of numbers")
    refused(lambda: sweep([0], learning_rate={0.1, 0.2}), "learning_rate must be a list of numbers")
    refused(lambda: sweep([0], learning_rate=[[0.1], [0.2]]), "learning_rate must be a list of numbers")
    refused(lambda: sweep([0], learning_rate=[0.1, True]), "learning_rate must be a list of numbers")
    refused(lambda: sweep([0], learning_rate=[0.1, np.nan]), "nan is no float32 value")
    refused(lambda: sweep([0], learning_rate=[1e300]), "1e+300 is no float32 value")
    refused(lambda: sweep([0], learning_rate=[2**40]), "1099511627776 is no int32 value")
    refused(lambda: sweep([0], learning_rate=[0.1, 0.1 + 1e-12]), "the value 0.1 twice")


def test_names_that_make_process_does_not_take():
    refused(lambda: fl.sweep(make, 3, [0], learning_rat=[0.1]), "no parameter 'learning_rat'", "'learning_rate'")
    refused(lambda: fl.sweep(make, 3, [0], mu=[0.1]), "make_process needs learning_rate", "learning_rate=[...]")
    refused(lambda: fl.sweep(walk(), 3, [0]), "sweep takes a function")
    refused(lambda: fl.sweep(lambda: 3, 3, [0]), "make_process() must give a Process", "gives 3")
    algorithm = fedavg(softmax_model(), optax.sgd(0.1))
    refused(lambda: fl.sweep(lambda: algorithm, 3, [0]), "must give a Process", "fl.synchronous")


def test_what_no_grid_is_to_blame_for_is_said_as_it_is(tmp_path):
    stored = fl.FederatedData.open(softmax_data().save(tmp_path / "set"))
    streamed = lambda learning_rate: fl.synchronous(fedavg(softmax_model(), optax.sgd(learning_rate)), stored)
    sweep = functools.partial(fl.sweep, num_rounds=3, seeds=[0], learning_rate=[0.1, 0.2])
    for call, word in [
        (lambda: sweep(streamed), "data.on_device()"),
        (lambda: sweep(make, params={"w": np.zeros((4, 9)), "b": np.zeros(3)}), "params leaf w has shape (4, 9)"),
    ]:
        with pytest.raises(ValueError, match=re.escape(word)) as caught:
            call()
        assert "can't be swept" not in str(caught.value)


def test_a_value_that_is_refused_is_named():
    refused(
        lambda: fl.sweep(make, 3, [0], learning_rate=[0.1, -1]),
        "make_process(learning_rate=-1.0): client_optimizer", "not downhill",
    )  # fmt: skip
    refused(
        lambda: fl.sweep(make, 3, [0], learning_rate=[0.1, 0.2], mu=[0, -0.5]),
        "make_process(learning_rate=0.1, mu=-0.5)", "mu",
    )  # fmt: skip
    with pytest.raises(KeyError) as caught:
        fl.sweep(lambda rate: {}[rate], 3, [0], rate=[0.5])
    assert "make_process(rate=0.5)" in caught.value.__notes__[0]


def branching(rate, width=3):
    if rate > 1:
        return walk(1.0)
    return walk(rate)


def test_values_that_shapes_or_branches_depend_on():
    refused(
        lambda: fl.sweep(branching, 3, [0], rate=[0.1, 2]),
        "rate can't be swept", "test_sweep_refusals.py", "if rate > 1", "TracerBoolConversionError", "jnp.where",
    )  # fmt: skip
    refused(lambda: fl.sweep(lambda rate, width: walk(rate, width), 3, [0], rate=[0.1], width=[3]), "width can't be")

    def cohorts(learning_rate, size):
        algorithm = fedavg(softmax_model(), optax.sgd(learning_rate))
        return fl.synchronous(algorithm, softmax_data(), fl.uniform(size))

    cohorts(0.1, 2)  # whose optimizer is tried out, which compiles a few operations
    refused(lambda: fl.sweep(cohorts, 3, [0], learning_rate=[0.1, 0.2], size=[2, 4]), "size can't be swept")


def test_data_that_depend_on_a_value():
    make = lambda shift: walk(data=softmax_data(seed=shift).on_device())
    refused(lambda: fl.sweep(make, 3, [0], shift=[0, 1]), "other data for shift=1 than for shift=0")
    again = lambda rate: walk(rate, data=softmax_data.__wrapped__().on_device())  # equal, but built anew
    assert fl.sweep(again, 1, [0], rate=[0.1, 0.2]).rounds == 1


def test_other_arguments():
    refused(lambda: fl.sweep(walk, -1, [0]), "num_rounds must be an integer of at least 0")
    refused(lambda: fl.sweep(walk, 2, [0], every=0), "every must be an integer of at least 1")
    refused(lambda: fl.sweep(walk, 2, [0], batch=0.5), "batch must be an integer")
    refused(lambda: fl.sweep(walk, 2, [0], devices=1000), "devices=1000, but JAX sees")
    refused(lambda: fl.sweep(walk, 2, [0], evaluate=3), "evaluate must be a function")
    refused(lambda: fl.sweep(walk, 2, [0], params=np.array([np.nan])), "params leaf", "NaN")
