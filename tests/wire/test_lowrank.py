"""Low rank: the best approximation, and subspaces that get better from round to round."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lab import wire
from fedjax_lab.wire.base import shapes
from tests.wire.table import context

RNG = np.random.default_rng(0)
U, V = np.linalg.qr(RNG.normal(size=(30, 30)))[0], np.linalg.qr(RNG.normal(size=(20, 20)))[0]
SINGULAR = 0.6 ** np.arange(20) * 5
MATRIX = jnp.asarray((U[:, :20] * SINGULAR) @ V.T, jnp.float32)


def tail(rank):
    """The error of the best approximation (Eckart and Young)."""
    return np.sqrt((SINGULAR[rank:] ** 2).sum())


@pytest.mark.parametrize(
    ("link", "slack"),
    [
        (wire.low_rank(4), 1 + 1e-4),
        (wire.low_rank(4, iterations=3), 1.001),
        (wire.factorize(4, sweeps=10), 1.01),
    ],
    ids=["svd", "iteration", "least squares"],
)
def test_error_of_the_best_approximation(link, slack):
    x = {"w": MATRIX, "conv": MATRIX.reshape(5, 6, 20), "b": jnp.ones(20), "thin": jnp.ones((30, 2))}
    got, size = wire.round_trip(link, x)
    for name in ("w", "conv"):
        error = float(jnp.linalg.norm(got[name] - x[name]))
        assert tail(4) * (1 - 1e-4) <= error <= tail(4) * slack
    # Vectors, and matrices of which two factors would be no smaller, travel whole.
    np.testing.assert_array_equal(got["b"], x["b"])
    np.testing.assert_array_equal(got["thin"], x["thin"])
    assert size == 4 * (2 * 4 * (30 + 20) + 20 + 60)


def test_power_sgd_finds_the_best_subspace_over_the_rounds():
    """Of the same matrix: a random subspace at first, nearly the best one after some turns; never worse."""
    link = wire.power_sgd(4)
    server, errors, sizes = link.init(shapes(MATRIX)), [], []
    for turn in range(8):
        ctx = context(jax.random.key(turn), server)
        payload, _, size = link.encode(MATRIX, (), ctx)
        got, server = link.decode(payload, ctx)
        errors.append(float(jnp.linalg.norm(got - MATRIX)))
        sizes.append(int(size))
    assert errors[0] <= np.linalg.norm(SINGULAR)
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1.01 * tail(4)
    assert sizes[:2] == [1 + 4 * 4 * 30, 1 + 4 * 4 * 20]  # M Q, then M' P, and which of both


def test_power_sgd_of_a_sum_is_that_of_the_mean():
    link = wire.power_sgd(3)
    a, b = MATRIX, jnp.asarray(RNG.normal(size=(30, 20)), jnp.float32)
    server = link.init(shapes(MATRIX))
    for turn in range(3):
        ctx = context(jax.random.key(turn), server)
        one, two, mean = (link.encode(m, (), ctx)[0] for m in (a, b, (a + b) / 2))
        together = jax.tree.map(lambda x, y: (x + y) / 2, one, two)
        got, server = link.decode(together, ctx)
        np.testing.assert_allclose(got, link.decode(mean, ctx)[0], atol=1e-4)


def test_matrices_of_no_content_stay_finite():
    for link in (wire.low_rank(2), wire.low_rank(2, iterations=2), wire.factorize(2), wire.power_sgd(2)):
        got, _ = wire.round_trip(link, jnp.zeros((12, 9)))
        np.testing.assert_array_equal(got, np.zeros((12, 9)))
