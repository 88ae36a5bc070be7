"""FedNova: the paper's normalising constants, the optimum under unequal work, and FedAvg under equal work."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms.fedavg import fedavg
from algorithms.fednova import fednova, reach
from tests.algorithms.quadratics import MODEL, fedavg_path, quadratics, trajectory

ETA, TAUS = 0.05, np.array([9, 2, 5, 1])


def unequal(client, key):
    return jnp.asarray(TAUS)[client.id]


def momentum_norm(tau, rho):  # section 4: a = [1 - rho^tau, ..., 1 - rho] / (1 - rho)
    return (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)


def proximal_norm(tau, alpha):  # section 4: a = [(1 - alpha)^(tau - 1), ..., 1]
    return (1 - (1 - alpha) ** tau) / alpha


@pytest.mark.parametrize("tau", [0, 1, 7])
def test_the_way_on_a_gradient_of_one_is_the_papers_norm(tau):
    way = lambda optimizer, mu=0.0: float(reach(optimizer, mu, jnp.zeros(3), jnp.int32(tau)))
    np.testing.assert_allclose(way(optax.sgd(0.1)), 0.1 * tau, rtol=1e-6)
    np.testing.assert_allclose(way(optax.sgd(0.1, 0.9)), 0.1 * momentum_norm(tau, 0.9), rtol=1e-5)
    np.testing.assert_allclose(way(optax.sgd(0.1), 2.0), 0.1 * proximal_norm(tau, 0.2), rtol=1e-5)
    rates = optax.exponential_decay(0.1, 1, 0.5)  # a learning-rate schedule: the sum of its rates
    np.testing.assert_allclose(way(optax.sgd(rates)), 0.1 * (1 - 0.5**tau) / 0.5, rtol=1e-5)


def pseudo_code(rounds, mu, rho):
    """Section 4 with each client's own accumulation vector a, built as a vector."""
    q, p = quadratics(), quadratics().shares()
    x, path = np.zeros(3), []
    for _ in range(rounds):
        d, norms = [], []
        for k, tau in enumerate(TAUS):
            w, v, gradients = x.copy(), 0, []
            for _ in range(tau):
                gradients.append(q.gradient(k, w))
                v = rho * v + gradients[-1] + (mu * (w - x))
                w = w - ETA * v
            if mu and rho:
                raise ValueError("the paper has no vector for both")
            a = [(1 - ETA * mu) ** (tau - 1 - t) if mu else (1 - rho ** (tau - t)) / (1 - rho) for t in range(tau)]
            np.testing.assert_allclose(w - x, -ETA * np.einsum("t,ti->i", a, gradients))
            d.append(np.einsum("t,ti->i", a, gradients) / sum(a))
            norms.append(sum(a))
        x = x - (p @ norms) * ETA * (p @ d)
        path.append(x)
    return path


@pytest.mark.parametrize(("mu", "rho"), [(0.0, 0.0), (0.0, 0.5), (1.0, 0.0)])
def test_is_the_pseudo_code_for_momentum_and_prox(mu, rho):
    path = trajectory(fednova(MODEL, optax.sgd(ETA, rho or None), mu=mu, steps=unequal, batch_size=None), 4)
    np.testing.assert_allclose(path[1:], pseudo_code(4, mu, rho), atol=2e-6)


def test_undoes_unequal_work_of_which_fedavg_makes_another_objective():
    """With small steps FedAvg minimises sum_k p_k tau_k F_k; FedNova minimises sum_k p_k F_k."""
    q, p, eta = quadratics(), quadratics().shares(), 5e-3
    right, wrong = q.optimum(p), q.optimum(p * TAUS / (p @ TAUS))
    work = {"steps": unequal, "batch_size": None}
    nova = trajectory(fednova(MODEL, optax.sgd(eta), **work), 4000)[-1]
    plain = trajectory(fedavg(MODEL, optax.sgd(eta), **work), 4000)[-1]
    np.testing.assert_allclose(plain, q.fedavg_limit(p, eta, TAUS), atol=1e-5)
    # What is left of the distance is of first order in the rate.
    limit = lambda rate: np.linalg.norm(q.fedavg_limit(p / TAUS / (p / TAUS).sum(), rate, TAUS) - right)
    np.testing.assert_allclose(nova, q.fedavg_limit(p / TAUS / (p / TAUS).sum(), eta, TAUS), atol=1e-5)
    np.testing.assert_allclose(limit(eta) / limit(eta / 2), 2, rtol=0.05)
    assert np.linalg.norm(nova - right) < 0.05 * np.linalg.norm(wrong - right)
    assert np.linalg.norm(plain - wrong) < 0.05 * np.linalg.norm(wrong - right)


def test_equal_work_is_fedavg():
    path = trajectory(fednova(MODEL, optax.sgd(0.2), steps=5, batch_size=None), 3)
    np.testing.assert_allclose(path, fedavg_path(), atol=1e-6)


def test_a_learning_rate_that_differs_by_leaf_cancels_leaf_by_leaf():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    rates = optax.multi_transform({"slow": optax.sgd(0.1), "fast": optax.sgd(1.0)}, {"a": "slow", "b": "fast"})
    way = jax.tree.map(float, reach(rates, 0.0, params, jnp.int32(3)))
    assert way == {"a": pytest.approx(0.3), "b": pytest.approx(3.0)}


def test_refusals():
    with pytest.raises(ValueError, match="mu must"):
        fednova(MODEL, optax.sgd(ETA), mu=-1)
    with pytest.raises(ValueError, match="keep_optimizer_state"):
        fednova(MODEL, optax.sgd(ETA), keep_optimizer_state=True)
