"""FedDyn against its pseudo-code in NumPy, the optimum that FedAvg misses, and FedProx in the first round."""

import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.feddyn import feddyn
from algorithms.fedprox import fedprox
from tests.algorithms.quadratics import DIM, MODEL, cohorts, quadratics, trajectory

ETA, TAU, ALPHA = 0.2, 5, 0.5
WORK = {"steps": TAU, "batch_size": None}


def pseudo_code(weights, rounds, chosen):
    """Algorithm 1, with gradient steps for the argmin; by weight, of which the paper's is the uniform one."""
    q, m = quadratics(), len(weights)
    omega = weights / weights.mean()
    theta, h, g, path = np.zeros(DIM), np.zeros(DIM), np.zeros((m, DIM)), []
    for r in range(rounds):
        models = {}
        for k in chosen[r]:
            w = theta.copy()
            for _ in range(TAU):
                w = w - ETA * (q.gradient(k, w) - g[k] + ALPHA * (w - theta))
            g[k] = g[k] - ALPHA * (w - theta)
            models[k] = w
        h = h - ALPHA / m * sum(omega[k] * (w - theta) for k, w in models.items())
        theta = sum(weights[k] * w for k, w in models.items()) / sum(weights[k] for k in models) - h / ALPHA
        path.append(theta)
    return path


def test_reaches_the_optimum_that_fedavg_misses():
    q, p = quadratics(), quadratics().shares()
    path = trajectory(feddyn(MODEL, optax.sgd(ETA), alpha=ALPHA, **WORK), 120)
    np.testing.assert_allclose(path[1:6], pseudo_code(q.sizes, 5, [range(4)] * 5), atol=1e-5)
    np.testing.assert_allclose(path[-1], q.optimum(p), atol=1e-5)
    assert np.abs(q.fedavg_limit(p, ETA, [TAU] * 4) - q.optimum(p)).max() > 1e-2


def test_half_of_the_clients_a_round_with_uniform_weights():
    path = trajectory(feddyn(MODEL, optax.sgd(ETA), alpha=ALPHA, weighting="uniform", **WORK), 600, fl.uniform(2))
    expected = pseudo_code(np.ones(4), 600, cohorts(2, 600))
    np.testing.assert_allclose(path[1:6], expected[:5], atol=1e-5)
    np.testing.assert_allclose(path[-1], quadratics().optimum(np.full(4, 0.25)), atol=1e-5)


def test_the_first_round_goes_twice_as_far_as_fedprox():
    # From g = h = 0 the local problem is FedProx's, and -h/alpha is the mean update once more.
    start, dyn = trajectory(feddyn(MODEL, optax.sgd(ETA), alpha=ALPHA, **WORK), 1)
    _, prox = trajectory(fedprox(MODEL, optax.sgd(ETA), mu=ALPHA, **WORK), 1)
    np.testing.assert_allclose(dyn - start, 2 * (prox - start), rtol=1e-5)


@pytest.mark.parametrize("alpha", [0, -1.0, "1", float("nan")])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(ValueError, match="alpha must"):
        feddyn(MODEL, optax.sgd(ETA), alpha=alpha)
