"""Learning rates that aren't positive are found out before anything is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms.fedavg import fedavg
from fedjax_lab.descent import goes_downhill
from fedjax_lab.local import local_training
from tests.problems import softmax_model
from tests.refusals import refused

MODEL = softmax_model()
is_vector = lambda param: param.ndim == 1


@pytest.mark.parametrize("rate", [0.0, -0.1, np.nan, -np.inf])
@pytest.mark.parametrize("make", [optax.sgd, optax.adam, lambda r: optax.sgd(r, momentum=0.9), optax.rmsprop])
def test_other_rates_are_refused(make, rate):
    with pytest.raises(ValueError, match=r"client_optimizer .*learning rate must be positive"):
        fedavg(MODEL, make(rate))
    with pytest.raises(ValueError, match=r"server_optimizer .*learning rate must be positive"):
        fedavg(MODEL, optax.sgd(0.1), server_optimizer=make(rate))


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(1e-6),
        optax.adagrad(0.1),
        optax.adamw(0.1, weight_decay=0.1),
        optax.yogi(0.1),
        optax.lion(0.1),
        optax.sgd(optax.warmup_constant_schedule(0.0, 0.1, 10)),
        optax.MultiSteps(optax.sgd(0.1), every_k_schedule=200).gradient_transformation(),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        optax.masked(optax.sgd(0.1), {"w": True, "b": False}),  # wants particular parameters: can't be asked
        optax.adafactor(0.1),
        optax.masked(optax.sgd(0.1), lambda params: jax.tree.map(is_vector, params)),
        optax.chain(optax.masked(optax.set_to_zero(), lambda params: jax.tree.map(is_vector, params)), optax.sgd(0.1)),
        optax.contrib.muon(0.1),
    ],
)
def test_what_goes_downhill_passes(optimizer):
    goes_downhill(optimizer, "client_optimizer")


def test_a_traced_rate_passes():
    def build(rate):
        goes_downhill(optax.sgd(rate), "client_optimizer")
        return rate

    assert jax.jit(build)(jnp.float32(-1.0)) == -1.0


def test_a_schedule_over_rounds_that_begins_uphill_is_refused():
    refused(lambda: local_training(softmax_model(), lambda r: optax.sgd(-0.1)), "in round 0, not downhill")
    local_training(softmax_model(), lambda r: optax.sgd(0.1 * r / 10))  # warms up from nothing


@pytest.mark.parametrize("form", [lambda o: o, lambda o: lambda round: o])
def test_line_searches_are_refused_by_name(form):
    with pytest.raises(ValueError, match=r"client_optimizer searches along a line.*linesearch=None"):
        fedavg(MODEL, form(optax.lbfgs(0.1)))
    fedavg(MODEL, form(optax.lbfgs(0.1, linesearch=None)))


def test_line_searches_of_the_server_too():
    with pytest.raises(ValueError, match="server_optimizer searches along a line"):
        fedavg(MODEL, optax.sgd(0.1), server_optimizer=optax.lbfgs())
