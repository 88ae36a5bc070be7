"""Quadratic clients of unequal sizes, for closed forms and transcriptions of pseudo-code in NumPy.

Client k's mean loss is 0.5 (w - b_k)' A_k (w - b_k) plus a constant, over rows that differ.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from tests.problems import quadratic_model

SIZES = (1, 4, 2, 3)
DIM = 3
MODEL = quadratic_model(DIM)


class Quadratics(NamedTuple):
    """``A: [clients, dim, dim]``, ``b: [clients, dim]``, in float64, and the rows they come from."""

    data: fl.FederatedData
    A: np.ndarray
    b: np.ndarray
    sizes: np.ndarray

    def gradient(self, k, w):
        return self.A[k] @ (w - self.b[k])

    def loss(self, k, w):
        d = self.rows(k)
        return np.mean([0.5 * (w - b) @ A @ (w - b) for A, b in zip(*d, strict=True)])

    def rows(self, k):
        arrays = self.data.client(self.data.ids[k]).arrays
        return np.asarray(arrays["A"], np.float64), np.asarray(arrays["b"], np.float64)

    def shares(self, weighting="examples"):
        w = self.sizes if weighting == "examples" else np.ones(len(self.sizes))
        return w / w.sum()

    def optimum(self, p):
        return np.linalg.solve(np.einsum("k,kij->ij", p, self.A), np.einsum("k,kij,kj->i", p, self.A, self.b))

    def fedavg_limit(self, p, eta, taus):
        """Where FedAvg stops after ``taus[k]`` full-batch steps: sum_k p_k (I - (I - eta A_k)^tau_k)(w - b_k) = 0."""
        pull = [
            np.eye(DIM) - np.linalg.matrix_power(np.eye(DIM) - eta * a, t) for a, t in zip(self.A, taus, strict=True)
        ]
        pull = np.stack(pull) * p[:, None, None]
        return np.linalg.solve(pull.sum(0), np.einsum("kij,kj->i", pull, self.b))


@functools.cache
def quadratics(seed: int = 0) -> Quadratics:
    rng = np.random.default_rng(seed)
    clients, A, b = {}, [], []
    for k, n in enumerate(SIZES):
        a = np.stack([np.diag(rng.uniform(0.3, 1.5, DIM)) for _ in range(n)]).astype(np.float32)
        c = (rng.normal(0, 2, DIM) + rng.normal(0, 0.3, (n, DIM))).astype(np.float32)
        clients[k] = {"A": a, "b": c}
        a, c = a.astype(np.float64), c.astype(np.float64)
        A.append(a.mean(0))
        b.append(np.linalg.solve(a.mean(0), np.einsum("nij,nj->i", a, c) / n))
    return Quadratics(fl.FederatedData.from_clients(clients), np.stack(A), np.stack(b), np.array(SIZES))


def trajectory(round: fl.Round, rounds: int, sampler: fl.Sampler | None = None, data=None, lanes=None) -> np.ndarray:
    """The parameters before the first round and after each, ``[rounds + 1, dim]``."""
    process = fl.synchronous(round, quadratics().data if data is None else data, sampler, lanes=lanes)

    @jax.jit
    def run(state):
        def body(state, _):
            state, _ = process.step(state, process.data)
            return state, process.params(state)

        return jax.lax.scan(body, state, length=rounds)[1]

    state = process.init(jax.random.key(0))
    return np.concatenate([np.asarray(process.params(state))[None], np.asarray(run(state))]).astype(np.float64)


def cohorts(size: int, rounds: int) -> list[list[int]]:
    """Whom ``fl.uniform(size)`` invites in the rounds of :func:`trajectory`."""
    data, key = quadratics().data, jax.random.split(jax.random.key(0))[1]
    public = lambda r: jax.random.fold_in(jax.random.fold_in(key, r), 0)
    sample = jax.vmap(lambda r: fl.uniform(size).sample((), public(r), data, None)[0])
    return np.asarray(jax.jit(sample)(np.arange(rounds))).tolist()


@functools.cache
def fedavg_path(eta: float = 0.2, steps: int = 5, weighting: str = "examples", rounds: int = 3) -> np.ndarray:
    """Plain FedAvg's, for identities."""
    return trajectory(fedavg(MODEL, optax.sgd(eta), steps=steps, batch_size=None, weighting=weighting), rounds)
