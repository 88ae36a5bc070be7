"""FedPD against its pseudo-code in NumPy, with and without skipped communications, and the exact optimum."""

import jax
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedpd import fedpd
from tests.algorithms.quadratics import DIM, MODEL, cohorts, quadratics, trajectory

RATE, STEPS, ETA = 0.2, 5, 1.0
WORK = {"steps": STEPS, "batch_size": None}


def solve(k, x, x_0, lam):
    """The paper's oracle I: gradient steps on the augmented Lagrangian, from where the client last stopped."""
    for _ in range(STEPS):
        x = x - RATE * (quadratics().gradient(k, x) + lam + (x - x_0) / ETA)
    return x


def pseudo_code(p, rounds, skips):
    """Algorithm 1: ``skips[r]`` rounds without communication before each with one."""
    n = len(p)
    center, x, lam = np.zeros((n, DIM)), np.zeros((n, DIM)), np.zeros((n, DIM))
    path = []
    for r in range(rounds):
        for _ in range(skips[r] + 1):
            for i in range(n):
                x[i] = solve(i, x[i], center[i], lam[i])
                lam[i] = lam[i] + (x[i] - center[i]) / ETA
                center[i] = x[i] + ETA * lam[i]
        center[:] = p @ center
        path.append(center[0].copy())
    return path


def skipped(rounds, p):
    """What the clients draw from the rounds' public keys."""
    run = jax.random.split(jax.random.key(0))[1]
    public = [jax.random.fold_in(jax.random.fold_in(run, r), 0) for r in range(rounds)]
    return [int(jax.random.geometric(jax.random.fold_in(k, 0x5C1), 1 - p)) - 1 for k in public]


@pytest.mark.parametrize(("p", "weighting"), [(0.0, "examples"), (0.5, "uniform")])
def test_is_the_pseudo_code_and_reaches_the_optimum(p, weighting):
    q = quadratics()
    shares = q.shares(weighting)
    path = trajectory(fedpd(MODEL, optax.sgd(RATE), eta=ETA, p=p, weighting=weighting, **WORK), 120)
    skips = skipped(5, p)
    assert (max(skips) > 0) == (p > 0)
    np.testing.assert_allclose(path[1:6], pseudo_code(shares, 5, skips), atol=1e-5)
    if p == 0:  # a client that goes on alone leaves the optimum: with skips, it is reached only nearly
        np.testing.assert_allclose(path[-1], q.optimum(shares), atol=1e-5)


def test_a_cohort_a_round_reaches_the_same_optimum_also_when_the_last_client_comes_late():
    q = quadratics()
    late = next(r for r in range(20) if len({i for ids in cohorts(2, r) for i in ids}) == 4)
    assert late > 2
    path = trajectory(fedpd(MODEL, optax.sgd(RATE), eta=ETA, **WORK), 400, fl.uniform(2))
    np.testing.assert_allclose(path[-1], q.optimum(q.shares()), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "word"), [({"eta": 0}, "eta"), ({"eta": 1, "p": 1.0}, "p"), ({"eta": 1, "p": -1}, "p")]
)
def test_refusals(options, word):
    with pytest.raises(ValueError, match=f"{word} must"):
        fedpd(MODEL, optax.sgd(RATE), **options)
    with pytest.raises(ValueError, match="keep_optimizer_state"):
        fedpd(MODEL, optax.sgd(RATE), eta=1, keep_optimizer_state=True)
