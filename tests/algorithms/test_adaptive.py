"""What servers adapt from round to round: FedProx's mu, and Adaptive-FedAvg's learning rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.adaptive_fedavg import adaptive_fedavg
from algorithms.adaptive_fedprox import adaptive_fedprox
from algorithms.fedprox import fedprox
from tests.algorithms.quadratics import DIM, MODEL, fedavg_path, quadratics, trajectory

ETA, TAU = 0.2, 5
WORK = {"steps": TAU, "batch_size": None}


def test_mu_follows_the_loss_as_the_heuristic_says():
    """A made-up sequence of losses through the server alone."""
    losses = [3.0, 2.0, 2.5, 2.4, 2.3, 2.2, 2.1, 2.0, 1.9, 2.0, 2.0]
    # Up at 2.5 and at the second 2.0; down after five falls in a row (2.4 to 2.0); an equal loss ends the fall.
    expected = [0.5, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.5, 0.5, 0.6, 0.6]
    round = adaptive_fedprox(MODEL, optax.sgd(ETA), mu=0.5, **WORK)
    server, mus = round.init(jax.random.key(0), quadratics().data), []
    still = fl.Variables(jnp.zeros(DIM))
    for loss in losses:
        server, metrics = round.server_update(server, (still, jnp.float32(loss)), None)
        mus.append(float(metrics["mu"]))
    np.testing.assert_allclose(mus, expected, rtol=1e-6)


def test_mu_never_falls_below_zero_and_without_change_it_is_fedprox():
    path = trajectory(adaptive_fedprox(MODEL, optax.sgd(ETA), mu=0.7, change=0.0, **WORK), 3)
    np.testing.assert_allclose(path, trajectory(fedprox(MODEL, optax.sgd(ETA), mu=0.7, **WORK), 3), atol=1e-6)
    lower = adaptive_fedprox(MODEL, optax.sgd(0.05), mu=0.05, patience=1, **WORK)  # the loss falls in each round
    process = fl.synchronous(lower, quadratics().data)
    state = process.init(0)
    for _ in range(3):
        state, metrics = process.step(state, process.data)
    assert float(metrics["mu"]) == 0


def test_mu_acts_in_the_next_round_on_the_loss_at_the_model_received():
    q, p = quadratics(), quadratics().shares()
    w, mu, last, expected = np.zeros(DIM), 0.3, np.inf, []
    for _ in range(4):
        loss = sum(p[k] * q.loss(k, w) for k in range(4))
        models = []
        for k in range(4):
            x = w.copy()
            for _ in range(TAU):
                x = x - ETA * (q.gradient(k, x) + mu * (x - w))
            models.append(x)
        w = p @ models
        mu, last = max(mu + (0.1 if loss > last else -0.1 if loss < last < np.inf else 0), 0), loss
        expected.append(w)
    path = trajectory(adaptive_fedprox(MODEL, optax.sgd(ETA), mu=0.3, patience=1, **WORK), 4)
    np.testing.assert_allclose(path[1:], expected, atol=1e-5)


def test_the_learning_rate_follows_the_moving_variance():
    """The paper's averages, with their biases corrected, in NumPy; from a start that isn't zero."""
    q, p, betas = quadratics(), quadratics().shares(), (0.5, 0.6, 0.7)
    w = np.array([1.0, -2.0, 0.5])
    m, v, r, before, rate, expected, rates = 0, 0, 0, 0, 1.0, [], []
    for t in range(1, 6):
        centre = m / (1 - betas[0] ** (t - 1)) if t > 1 else 0
        m = betas[0] * m + (1 - betas[0]) * w
        v = betas[1] * v + (1 - betas[1]) * np.mean((w - centre) ** 2)
        now = v / (1 - betas[1] ** t)
        r = betas[2] * r + (1 - betas[2]) * (now / before if t > 2 else 1)
        before, rate = now, min(1, r / (1 - betas[2] ** t) / t)
        rates.append(rate)
        models = []
        for k in range(4):
            x = w.copy()
            for _ in range(TAU):
                x = x - rate * ETA * q.gradient(k, x)
            models.append(x)
        w = p @ models
        expected.append(w)
    assert len(set(rates)) == 5
    start = MODEL._replace(init=lambda key: (jnp.asarray([1.0, -2.0, 0.5]), ()))
    beta1, beta2, beta3 = betas
    path = trajectory(adaptive_fedavg(start, optax.sgd(ETA), beta1=beta1, beta2=beta2, beta3=beta3, **WORK), 5)
    np.testing.assert_allclose(path[1:], expected, atol=1e-5)


def test_two_rounds_without_decay_are_fedavg():
    path = trajectory(adaptive_fedavg(MODEL, optax.sgd(ETA), decay=False, **WORK), 2)
    np.testing.assert_allclose(path, fedavg_path()[:3], atol=1e-6)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: adaptive_fedprox(MODEL, optax.sgd(ETA), mu=-1), "mu must"),
        (lambda: adaptive_fedprox(MODEL, optax.sgd(ETA), change=-1), "change must"),
        (lambda: adaptive_fedprox(MODEL, optax.sgd(ETA), patience=0), "patience must"),
        (lambda: adaptive_fedavg(MODEL, optax.sgd(ETA), beta1=1.0), "beta1 must"),
        (lambda: adaptive_fedavg(MODEL, optax.sgd(ETA), beta3=-0.1), "beta3 must"),
        (lambda: adaptive_fedavg(MODEL, lambda r: optax.sgd(ETA)), "client_optimizer must"),
        (lambda: adaptive_fedavg(MODEL, optax.sgd(ETA), keep_optimizer_state=True), "keep_optimizer_state"),
    ],
)
def test_refusals(call, word):
    with pytest.raises(ValueError, match=word):
        call()
