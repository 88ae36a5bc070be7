"""How MOCHA's tasks are related: the regularizers of Smith et al. 2017, section 3.2 and appendix B.1.

With the tasks' models as the columns of ``W`` and ``m`` tasks, each is ``R(W) = 1/2 tr(W M^-1 W')``, where ``M``
follows from a relationship matrix ``Omega`` that is given or learned. Only ``M`` enters the dual problem, and so
none is ever inverted that may be singular. ``rows`` below has the models as rows, ``[m, features]``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

import fedjax_lab as fl

Array = jax.Array


class Coupling(NamedTuple):
    """A regularizer that couples tasks.

    Attributes:
      start: ``(m) -> Omega: float32[m, m]``.
      covariance: ``(Omega) -> M: float32[m, m]``.
      learn: ``(rows) -> Omega``, the best one for these models; ``None`` if it is fixed.
      check: ``(m)``; raises ValueError for a number of tasks that doesn't suit.
    """

    start: Callable[[int], Array]
    covariance: Callable[[Array], Array]
    learn: Callable[[Array], Array] | None = None
    check: Callable[[int], None] = lambda m: None


def mean_regularized(lam1: Any, lam2: Any) -> Coupling:
    """All tasks are drawn to their mean: ``lam1 sum_t |w_t - mean|^2 + lam2 sum_t |w_t|^2``.

    Evgeniou and Pontil, "Regularized Multi-Task Learning", KDD 2004; Smith et al. 2017, equation 2 with
    ``Omega = I - 11'/m``.

    Args:
      lam1: pull to the mean; 0 leaves the tasks alone.
      lam2: pull to 0, positive.

    Raises:
      ValueError: a negative ``lam1``, a ``lam2`` that isn't positive.
    """
    fl.checks.not_negative(lam1, "lam1")
    fl.checks.positive(lam2, "lam2")

    def covariance(omega):
        # Omega is a projection: its inverse on the mean is 1/lam2, off it 1/(lam1 + lam2).
        mean = jnp.eye(len(omega)) - omega
        return 0.5 * (mean / lam2 + omega / (lam1 + lam2))

    return Coupling(lambda m: jnp.eye(m) - jnp.full((m, m), 1 / m), covariance)


def fixed(omega: Any, lam1: Any = 1.0, lam2: Any = 0.0) -> Coupling:
    """A given relationship matrix: ``lam1 tr(W Omega W') + lam2 |W|^2`` (Smith et al. 2017, equation 2).

    Args:
      omega: ``float[m, m]``, symmetric and positive definite, a precision: negative entries draw two tasks together.
      lam1: its strength, positive.
      lam2: pull to 0.

    Raises:
      ValueError: a matrix that isn't square, finite, symmetric and positive definite; one that isn't for the data's
        number of clients, when a Process is built; a ``lam1`` that isn't positive, a negative ``lam2``.
    """
    fl.checks.positive(lam1, "lam1")
    fl.checks.not_negative(lam2, "lam2")
    matrix = _positive_definite(omega, "omega")
    values, vectors = (x.astype(np.float32) for x in np.linalg.eigh(matrix))

    def check(m):
        if len(matrix) != m:
            raise ValueError(f"omega relates {len(matrix)} tasks, but the data have {m} clients, a task each")

    covariance = lambda omega: _from_eigen(0.5 / (lam1 * values + lam2), vectors)
    return Coupling(lambda m: jnp.asarray(matrix, jnp.float32), covariance, check=check)


def trace_norm(lam: Any, *, ridge: Any = 0.0, epsilon: float = 1e-6) -> Coupling:
    """Models that share a subspace: ``lam (ridge |W|^2 + tr(W Omega^-1 W'))`` over Omega of trace 1.

    The best Omega is ``(W'W)^(1/2) / tr((W'W)^(1/2))`` and leaves ``lam |W|_*^2``, the trace norm (Zhang and Yeung,
    "A Convex Formulation for Learning Task Relationships in Multi-Task Learning", UAI 2010; Argyriou et al., "Convex
    Multi-Task Feature Learning", 2008). ``W'W + epsilon I`` stands for ``W'W``, which is exact for a penalty
    ``lam epsilon tr(Omega^-1)`` beside: Omega stays positive definite.

    Args:
      lam: strength, positive.
      ridge: the paper's ``1/sigma^2``.
      epsilon: how far Omega stays from singular, in the models' units squared.

    Raises:
      ValueError: a ``lam`` or ``epsilon`` that isn't positive, a negative ``ridge``.
    """
    fl.checks.positive(lam, "lam")
    fl.checks.not_negative(ridge, "ridge")
    fl.checks.positive(epsilon, "epsilon")

    def covariance(omega):
        values, vectors = jnp.linalg.eigh(omega)
        return _from_eigen(values / (1 + ridge * values) / (2 * lam), vectors)

    def learn(rows):
        values, vectors = jnp.linalg.eigh(_gram(rows))
        roots = jnp.sqrt(jnp.maximum(values, 0) + epsilon)
        return _from_eigen(roots / jnp.sum(roots), vectors)

    return Coupling(lambda m: jnp.eye(m) / m, covariance, learn)


def clustered(lam: Any, *, k: int, eta: Any, epsilon: float = 1e-9) -> Coupling:
    """Tasks in clusters that aren't known: ``lam tr(W (eta I + Omega)^-1 W')``, 0 <= Omega <= I of trace k.

    Zhou et al., "Clustered Multi-Task Learning Via Alternating Structure Optimization", NIPS 2011, the convex
    relaxation, which is also ASO's; Smith et al. 2017, appendix B.1. The best Omega has the eigenvectors of ``W'W``
    and the eigenvalues ``clip(tau s - eta, 0, 1)``, with s the roots of those of ``W'W`` and tau such that they
    sum to k.

    Args:
      lam: strength, positive.
      k: number of clusters, at most the number of tasks.
      eta: positive; the smaller, the more the rest beside the clusters is penalised.
      epsilon: added to the eigenvalues of ``W'W``, so that k of them are positive.

    Raises:
      ValueError: a ``lam``, ``eta`` or ``epsilon`` that isn't positive; a ``k`` that isn't a positive integer, or
        above the number of clients, when a Process is built.
    """
    for value, name in ((lam, "lam"), (eta, "eta"), (epsilon, "epsilon")):
        fl.checks.positive(value, name)
    fl.checks.positive(k, "k", integer=True)

    def check(m):
        if k > m:
            raise ValueError(f"k={k} clusters are more than the {m} tasks, a client each")

    def learn(rows):
        values, vectors = jnp.linalg.eigh(_gram(rows))
        s = jnp.sqrt(jnp.maximum(values, 0) + epsilon)
        shares = lambda tau: jnp.clip(tau * s - eta, 0, 1)
        # Their sum grows with tau and is linear between these.
        bends = jnp.sort(jnp.concatenate([eta / s, (1 + eta) / s]))
        tau = jnp.interp(jnp.float32(k), jnp.sum(jax.vmap(shares)(bends), -1), bends)
        return _from_eigen(shares(tau), vectors)

    covariance = lambda omega: (eta * jnp.eye(len(omega)) + omega) / (2 * lam)
    return Coupling(lambda m: jnp.eye(m) * (k / m), covariance, learn, check)


def graphical(lam: Any, *, ridge: Any = 0.0, prior: Any = 1.0, sparsity: Any = 0.0, steps: int = 200) -> Coupling:
    """A Gaussian graphical model of the tasks: ``lam (ridge |W|^2 + tr(W Omega W') - d log det Omega)`` and priors.

    Smith et al. 2017, appendix B.1, the probabilistic priors: each feature's weights over the tasks are a draw from
    a Gaussian of precision Omega, a zero of which says that two tasks are independent given the others. Omega
    minimises ``tr((S + prior I) Omega) - log det Omega + sparsity sum_{s != t} |Omega_st|`` with ``S = W'W / d``:
    ``(S + prior I)^-1`` without sparsity, else the graphical lasso, by ADMM.

    Args:
      lam: strength, positive.
      ridge: the paper's ``1/sigma^2``.
      prior: positive, a variance that weights have before any are seen; without it W = 0 would be the best.
      sparsity: penalty on relations.
      steps: ADMM's iterations.

    Raises:
      ValueError: a ``lam`` or ``prior`` that isn't positive, a negative ``ridge`` or ``sparsity``, no ``steps``.
    """
    fl.checks.positive(lam, "lam")
    fl.checks.positive(prior, "prior")
    fl.checks.not_negative(ridge, "ridge")
    fl.checks.not_negative(sparsity, "sparsity")
    fl.checks.positive(steps, "steps", integer=True)
    dense = not isinstance(sparsity, Tracer) and sparsity == 0

    def covariance(omega):
        values, vectors = jnp.linalg.eigh(omega)
        return _from_eigen(0.5 / (lam * (ridge + values)), vectors)

    def learn(rows):
        S = _gram(rows) / rows.shape[1] + prior * jnp.eye(len(rows))
        if not dense:
            return _graphical_lasso(S, sparsity, steps)
        values, vectors = jnp.linalg.eigh(S)
        return _from_eigen(1 / values, vectors)

    return Coupling(lambda m: jnp.eye(m) / prior, covariance, learn)


def _graphical_lasso(S: Array, sparsity: Any, steps: int) -> Array:
    """Boyd et al., "Distributed Optimization and Statistical Learning via ADMM", 2011, section 6.5."""
    m = len(S)
    diagonal = jnp.eye(m, dtype=bool)
    rho = jnp.trace(S) / m  # Omega is of the size of 1/S: steps of its own scale

    def step(_, carry):
        Z, U = carry
        values, vectors = jnp.linalg.eigh(rho * (Z - U) - S)
        X = _from_eigen((values + jnp.sqrt(values**2 + 4 * rho)) / (2 * rho), vectors)
        kept = jnp.sign(X + U) * jnp.maximum(jnp.abs(X + U) - sparsity / rho, 0)
        Z = jnp.where(diagonal, X + U, kept)
        return Z, U + X - Z

    start = jnp.where(diagonal, 1 / S, 0)
    return jax.lax.fori_loop(0, steps, step, (start, jnp.zeros_like(S)))[0]


def safe_sigma(covariance: Array) -> Array:
    """The smallest safe sigma', with all tasks taking part (Smith et al. 2017, equation 5 with gamma = 1).

    ``max_v sum_st M_st v_s'v_t / sum_t M_tt |v_t|^2``, the largest eigenvalue of M scaled to a diagonal of ones;
    a hair is added against rounding.
    """
    scale = jnp.sqrt(jnp.maximum(jnp.diag(covariance), jnp.finfo(covariance.dtype).tiny))
    return (1 + 1e-5) * jnp.linalg.eigvalsh(covariance / (scale[:, None] * scale[None, :]))[-1]


def _gram(rows: Array) -> Array:
    """``W'W``, in full precision on every backend."""
    return jnp.matmul(rows, rows.T, precision="highest")


def _from_eigen(values: Any, vectors: Any) -> Array:
    return jnp.matmul(vectors * values[None, :], vectors.T, precision="highest")


def _positive_definite(matrix: Any, name: str) -> np.ndarray:
    """The matrix in float64. Raises ValueError for one that isn't square, finite, symmetric, positive definite."""
    given = np.asarray(matrix)
    found: Any = given.astype(np.float64) if given.dtype.kind in "iuf" else np.full(1, np.nan)
    if found.ndim != 2 or found.shape[0] != found.shape[1] or not found.size:
        raise ValueError(f"{name} must be a square matrix of numbers, [tasks, tasks]; got {fl.checks.shown(matrix)}")
    if not np.isfinite(found).all():
        raise ValueError(f"{name} must be finite; got {fl.checks.shown(matrix)}")
    apart = np.abs(found - found.T)
    if apart.max() > 1e-5 * np.abs(found).max():
        s, t = np.unravel_index(apart.argmax(), apart.shape)
        raise ValueError(f"{name} must be symmetric; entries {s},{t} and {t},{s} are {found[s, t]} and {found[t, s]}")
    values = np.linalg.eigvalsh(found)
    if values[0] <= 1e-7 * np.abs(values).max():
        raise ValueError(
            f"{name} must be positive definite; its smallest eigenvalue is {values[0]:.3g}. Of a singular one, "
            f"give {name} + c I"
        )
    return (found + found.T) / 2
