"""FedPA: its linear algebra against dense inverses, its samples against pseudo-code in NumPy, and FedAvg."""

import numpy as np
import optax
import pytest

from algorithms.fedpa import fedpa, posterior_delta
from tests.algorithms.quadratics import DIM, MODEL, fedavg_path, quadratics, trajectory

ETA = 0.2


def dense(samples, start, rho):
    """Shrunk covariance, inverted: section 3 with rho_l = 1 / (1 + (l - 1) rho)."""
    n, d = samples.shape
    shrink = 1 / (1 + (n - 1) * rho)
    covariance = np.atleast_2d(np.cov(samples, rowvar=False)) if n > 1 else np.zeros((d, d))
    return np.linalg.solve(shrink * np.eye(d) + (1 - shrink) * covariance, samples.mean(0) - start)


@pytest.mark.parametrize("rho", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_update_is_the_dense_inverse(count, rho):
    rng = np.random.default_rng(count)
    samples, start = rng.normal(size=(count, 5)), rng.normal(size=5)
    delta = posterior_delta(samples.astype(np.float32), start.astype(np.float32), rho)
    np.testing.assert_allclose(delta, dense(samples, start, rho), rtol=2e-4, atol=1e-5)


def pseudo_code(rounds, samples, burn_in, rho, steps=3):
    """Algorithms 1 and 4: after the burn-in each sample is the mean of the iterates of some steps."""
    q, p = quadratics(), quadratics().shares()
    w, path = np.zeros(DIM), []
    for _ in range(rounds):
        deltas = []
        for k in range(4):
            x, drawn = w.copy(), []
            for unit in range(burn_in + samples):
                iterates = []
                for _ in range(steps):
                    x = x - ETA * q.gradient(k, x)
                    iterates.append(x)
                if unit >= burn_in:
                    drawn.append(np.mean(iterates, axis=0))
            deltas.append(dense(np.array(drawn), w, rho))
        w = w + 0.5 * (p @ deltas)
        path.append(w)
    return path


@pytest.mark.parametrize("burn_in", [0, 2])
def test_is_the_pseudo_code(burn_in):
    options = {"steps": 3, "batch_size": None, "server_optimizer": optax.sgd(0.5)}
    path = trajectory(fedpa(MODEL, optax.sgd(ETA), samples=4, burn_in=burn_in, rho=0.5, **options), 3)
    np.testing.assert_allclose(path[1:], pseudo_code(3, 4, burn_in, 0.5), rtol=1e-4, atol=1e-5)


def test_one_sample_of_one_step_has_the_identity_for_covariance_and_is_fedavg():
    path = trajectory(fedpa(MODEL, optax.sgd(ETA), samples=1, burn_in=4, rho=3.0, steps=1, batch_size=None), 3)
    np.testing.assert_allclose(path, fedavg_path(), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"samples": 0, "rho": 1}, "samples must"), ({"samples": 1, "rho": -1}, "rho must"),
     ({"samples": 1, "rho": 1, "burn_in": 1.5}, "burn_in must"),
     ({"samples": 1, "rho": 1, "keep_optimizer_state": True}, "keep_optimizer_state")],
)  # fmt: skip
def test_refusals(options, word):
    with pytest.raises(ValueError, match=word):
        fedpa(MODEL, optax.sgd(ETA), **options)
