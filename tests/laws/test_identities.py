"""Settings that make one algorithm another, and the server optimizers against the paper's lines."""

import jax
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedadagrad import fedadagrad
from algorithms.fedadam import fedadam
from algorithms.fedavg import fedavg
from algorithms.fedavgm import fedavgm
from algorithms.fedopt import adaptive, fedopt
from algorithms.fedprox import fedprox
from algorithms.fedyogi import fedyogi
from tests.laws.table import LOCAL, MODEL, SGD
from tests.problems import assert_close, assert_same_bits, softmax_data, steps

COHORT = fl.uniform(5)


def final(round, sampler=COHORT, rounds=3):
    process = fl.synchronous(round, softmax_data(), sampler)
    return process.params(steps(process, rounds)[0])


@pytest.fixture(scope="module")
def plain():
    return final(fedavg(MODEL, SGD, **LOCAL))


def test_fedprox_without_prox_is_fedavg(plain):
    assert_same_bits(final(fedprox(MODEL, SGD, mu=0.0, **LOCAL)), plain)


def test_no_dropout_is_the_sampler_itself(plain):
    assert_same_bits(final(fedavg(MODEL, SGD, **LOCAL), fl.dropout(COHORT, 0.0)), plain)
    assert_same_bits(final(fedavg(MODEL, SGD, **LOCAL), fl.drop_stragglers(COHORT, 0.0)), plain)


def test_no_stragglers_is_full_work(plain):
    assert_same_bits(final(fedavg(MODEL, SGD, epochs=fl.partial_work(2, 0.0), batch_size=10)), plain)


def test_server_momentum_of_zero_and_unit_sgd_are_averaging(plain):
    assert_close(final(fedavgm(MODEL, SGD, momentum=0.0, **LOCAL)), plain)
    assert_same_bits(final(fedopt(MODEL, SGD, server_optimizer=optax.sgd(1.0), **LOCAL)), plain)


def test_fedprox_pulls_harder_with_larger_mu():
    start = fl.synchronous(fedavg(MODEL, SGD), softmax_data()).init(jax.random.key(0)).server.variables.params
    moved = [
        float(optax.tree.norm(jax.tree.map(lambda a, b: a - b, final(fedprox(MODEL, SGD, mu=mu, **LOCAL)), start)))
        for mu in (0.0, 1.0, 5.0)
    ]
    assert moved[0] > moved[1] > moved[2] > 0


UPDATES = np.array([[1.0, -2.0, 0.5], [0.5, 1.0, 0.0], [-1.0, 0.25, 2.0]])


@pytest.mark.parametrize("kind", ["adagrad", "adam", "yogi"])
def test_adaptive_servers_follow_algorithm_2(kind):
    """Three server steps by hand, in float64, from the lines of algorithm 2."""
    eta, beta1, beta2, tau = 0.1, 0.9, 0.99, 1e-2
    x, m, v = np.zeros(3), np.zeros(3), np.full(3, tau**2)
    lines = {
        "adagrad": lambda v, u: v + u**2,
        "adam": lambda v, u: beta2 * v + (1 - beta2) * u**2,
        "yogi": lambda v, u: v - (1 - beta2) * u**2 * np.sign(v - u**2),
    }
    second = {
        "adagrad": lambda v, s: v + s,
        "adam": lambda v, s: beta2 * v + (1 - beta2) * s,
        "yogi": lambda v, s: v - (1 - beta2) * s * np.sign(v - s),
    }
    rule = adaptive(lambda v, s: jax.numpy.asarray(second[kind](v, s)), eta, beta1, tau)
    params = jax.numpy.zeros(3)
    state = rule.init(params)
    for u in UPDATES:
        m = beta1 * m + (1 - beta1) * u
        v = lines[kind](v, u)
        x = x + eta * m / (np.sqrt(v) + tau)
        steps_, state = rule.update(-jax.numpy.asarray(u, jax.numpy.float32), state, params)
        params = params + steps_
    np.testing.assert_allclose(params, x, rtol=1e-5)


@pytest.mark.parametrize(("make", "kind"), [(fedadagrad, "adagrad"), (fedadam, "adam"), (fedyogi, "yogi")])
def test_each_server_uses_its_own_second_moment(make, kind):
    """After one round from v = tau^2, each algorithm's v follows from the mean update alone."""
    tau, data = 0.1, softmax_data()
    process = fl.synchronous(make(MODEL, SGD, beta1=0.0, tau=tau, **LOCAL), data)
    mean = fl.synchronous(fedavg(MODEL, SGD, **LOCAL), data)
    (state, _), (plain_state, _) = steps(process, 1), steps(mean, 1)
    start = mean.params(mean.init(jax.random.key(0)))
    u = np.asarray(mean.params(plain_state)["w"] - start["w"])
    expected = {
        "adagrad": tau**2 + u**2,
        "adam": 0.99 * tau**2 + 0.01 * u**2,
        "yogi": tau**2 - 0.01 * u**2 * np.sign(tau**2 - u**2),
    }[kind]
    np.testing.assert_allclose(state.server.opt_state.v["w"], expected, rtol=1e-4)
    moved = np.asarray(process.params(state)["w"] - start["w"])
    np.testing.assert_allclose(moved, 0.1 * u / (np.sqrt(expected) + tau), rtol=2e-3, atol=1e-7)
