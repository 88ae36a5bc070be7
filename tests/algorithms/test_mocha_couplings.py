"""MOCHA's relationship matrices against closed forms and other solvers, and its losses' dual steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

from algorithms import mocha_couplings as couplings
from algorithms.mocha_losses import excess, named
from tests.refusals import refused

RNG = np.random.default_rng(3)
ROWS = RNG.normal(size=(5, 3)) @ RNG.normal(size=(3, 7))  # five tasks in three dimensions
GRAM = ROWS @ ROWS.T
OMEGA = np.eye(5) * 1.5 - 0.2


def learned(coupling):
    return np.asarray(jax.jit(coupling.learn)(jnp.asarray(ROWS, jnp.float32)))


def test_regularizers_are_inverted_rightly():
    center = np.eye(5) - 0.2
    for coupling, omega, expected in (
        (couplings.mean_regularized(0.7, 0.2), center, 2 * (0.7 * center + 0.2 * np.eye(5))),
        (couplings.fixed(OMEGA, 0.7, 0.2), OMEGA, 2 * (0.7 * OMEGA + 0.2 * np.eye(5))),
        (couplings.trace_norm(0.7, ridge=0.3), OMEGA, 2 * 0.7 * (0.3 * np.eye(5) + np.linalg.inv(OMEGA))),
        (couplings.clustered(0.7, k=2, eta=0.1), OMEGA, 2 * 0.7 * np.linalg.inv(0.1 * np.eye(5) + OMEGA)),
        (couplings.graphical(0.7, ridge=0.3), OMEGA, 2 * 0.7 * (0.3 * np.eye(5) + OMEGA)),
    ):
        covariance = coupling.covariance(jnp.asarray(omega, jnp.float32))
        np.testing.assert_allclose(covariance @ expected, np.eye(5), atol=2e-5)
        assert coupling.start(5).shape == (5, 5)


def test_sigma_is_the_smallest_safe_one():
    M = np.linalg.inv(OMEGA + np.diag([0.1, 2, 0.3, 1, 0.5]))
    expected = scipy.linalg.eigh(M, np.diag(np.diag(M)), eigvals_only=True)[-1]
    assert float(couplings.safe_sigma(jnp.asarray(M, jnp.float32))) == pytest.approx(expected, rel=1e-4)
    assert float(couplings.safe_sigma(jnp.eye(4))) == pytest.approx(1, rel=1e-4)


def test_trace_norm_is_the_matrix_root_and_leaves_the_trace_norm_squared():
    root = np.real(scipy.linalg.sqrtm(GRAM + 1e-3 * np.eye(5)))
    omega = learned(couplings.trace_norm(1.0, epsilon=1e-3))
    np.testing.assert_allclose(omega, root / np.trace(root), atol=1e-4)
    nuclear = np.linalg.svd(ROWS, compute_uv=False).sum()
    assert np.trace(GRAM @ np.linalg.inv(omega.astype(np.float64))) == pytest.approx(nuclear**2, rel=1e-2)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_clusters_are_the_best_matrix_of_their_set(k):
    eta = 0.2
    omega = learned(couplings.clustered(1.0, k=k, eta=eta)).astype(np.float64)
    values = np.linalg.eigvalsh(omega)
    assert values.min() > -1e-5 and values.max() < 1 + 1e-5 and values.sum() == pytest.approx(k, rel=1e-5)
    s = np.sqrt(np.maximum(np.linalg.eigvalsh(GRAM), 0) + 1e-9)
    spent = lambda log_tau: np.clip(np.exp(log_tau) * s - eta, 0, 1).sum() - k
    tau = np.exp(scipy.optimize.brentq(spent, np.log(eta / s.max()), np.log((1 + eta) / s.min())))
    np.testing.assert_allclose(values, np.clip(tau * s - eta, 0, 1), atol=1e-4)
    np.testing.assert_allclose(omega @ GRAM, GRAM @ omega, atol=1e-3)  # the same eigenvectors


def test_graphical_relations_are_the_inverse_or_the_graphical_lasso():
    from sklearn.covariance import graphical_lasso

    S = GRAM / 7 + 0.5 * np.eye(5)
    np.testing.assert_allclose(learned(couplings.graphical(1.0, prior=0.5)), np.linalg.inv(S), atol=1e-4)
    _, precision = graphical_lasso(S, alpha=0.3, tol=1e-9, enet_tol=1e-9, max_iter=1000)
    sparse = learned(couplings.graphical(1.0, prior=0.5, sparsity=0.3))
    assert 0 < (precision == 0).sum() < 20
    np.testing.assert_allclose(sparse, precision, atol=2e-3)


@pytest.mark.parametrize("loss", ["squared", "logistic", "hinge"])
def test_dual_steps_are_the_minimum(loss):
    dual = named(loss)
    alpha, y, u, q = (a.ravel() for a in np.meshgrid([0.0, 0.3, 1.0], [-1.0, 1.0], [-4, 0.2, 9], [0.0, 0.5, 20, 900]))
    u, alpha = np.where(q == 0, 0.0, u), alpha * y
    given = [jnp.asarray(a, jnp.float32) for a in (alpha, y, u, q)]
    made = np.asarray(jax.jit(dual.step)(*given), np.float64)
    low, high = (np.minimum(0, y), np.maximum(0, y)) if dual.signs else (np.full(len(y), -9.0), np.full(len(y), 9.0))
    for i in range(len(y)):
        objective = lambda a, i=i: _conjugate(loss, a, y[i]) + a * u[i] + q[i] / 2 * (a - alpha[i]) ** 2
        best = scipy.optimize.minimize_scalar(objective, bounds=(low[i], high[i]), options={"xatol": 1e-10})
        ends = min(objective(low[i] * (1 - 1e-12)), objective(high[i] * (1 - 1e-12)), best.fun)
        assert objective(made[i]) <= ends + 1e-5 * (1 + abs(ends) + q[i])


@pytest.mark.parametrize("loss", ["squared", "logistic", "hinge"])
def test_fenchel_and_young(loss):
    """The excess is at least 0, and 0 where -alpha is the loss's slope."""
    dual = named(loss)
    u = jnp.linspace(-3, 3, 31)
    for y in (-1.0, 1.0):
        y = jnp.full_like(u, y)
        slope = jax.vmap(jax.grad(dual.loss))(u, y)
        np.testing.assert_allclose(excess(dual, -slope, y, u), 0, atol=1e-5)
        np.testing.assert_allclose(dual.conjugate(0.4 * y, y), [_conjugate(loss, 0.4 * float(y[0]), float(y[0]))] * 31)
        assert (excess(dual, 0.5 * y, y, u) >= 0).all() and excess(dual, 0.5 * y, y, u).max() > 0.1


def _conjugate(loss, a, y):
    if loss == "squared":
        return a * a / 2 - a * y
    b = np.clip(a * y, 0, 1)
    if loss == "hinge":
        return -b
    return sum(p * np.log(p) if p > 0 else 0.0 for p in (b, 1 - b))


def test_bad_relations_are_refused():
    refused(lambda: couplings.fixed([[1.0, 2.0], [2.0, 1.0]]), "positive definite", "-1")
    refused(lambda: couplings.fixed(np.eye(5) - 0.2), "positive definite", "omega + c I")
    refused(lambda: couplings.fixed([[1.0, 0.5], [0.1, 1.0]]), "symmetric", "0.5 and 0.1")
    refused(lambda: couplings.fixed(np.ones((2, 3))), "square matrix")
    refused(lambda: couplings.fixed([[np.nan]]), "finite")
    refused(lambda: couplings.fixed("omega"), "square matrix")
    refused(lambda: couplings.fixed(np.eye(2), -1.0), "lam1 must be positive")
    refused(lambda: couplings.mean_regularized(-0.1, 1.0), "lam1", "at least 0")
    refused(lambda: couplings.mean_regularized(1.0, 0.0), "lam2 must be positive")
    refused(lambda: couplings.trace_norm(-1.0), "lam must be positive")
    refused(lambda: couplings.trace_norm(1.0, ridge=-1.0), "ridge")
    refused(lambda: couplings.clustered(1.0, k=0, eta=0.1), "k must be positive")
    refused(lambda: couplings.clustered(-1.0, k=1, eta=0.1), "lam must be positive")
    refused(lambda: couplings.graphical(-1.0), "lam must be positive")
    refused(lambda: couplings.graphical(1.0, sparsity=-1.0), "sparsity")
    refused(lambda: couplings.graphical(1.0, steps=0), "steps must be positive")
