"""Links that claim no bias have none; the same test finds the bias of those that have some."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lab import wire
from fedjax_lab.wire.base import shapes
from tests.wire.table import UNBIASED, context

DRAWS = 4000
# Of very different sizes, zero and ties among them.
X = jnp.array([3.0, -2.0, 1.0, 0.5, -0.1, 0.01, 0.0, 0.0, 1.0, 1.0, -4.0, 0.7, 0.3, -0.3, 2.2, -1.1] * 2)
OTHERS = jnp.array([1.0, -1.0])[jnp.arange(32) % 2]


def errors_in_standard_errors(link, x) -> float:
    """The largest error of a coordinate's mean over many draws, in its own standard errors."""

    def draw(key):
        ctx = context(key, link.init(shapes(x)))
        payload, _, _ = link.encode(x, link.init_client(shapes(x)), ctx)
        return wire.undo(link, payload, ctx)

    got = jax.jit(lambda keys: jax.lax.map(draw, keys, batch_size=200))(jax.random.split(jax.random.key(11), DRAWS))
    got = np.asarray(got, np.float64)
    off, error = np.abs(got.mean(0) - np.asarray(x)), got.std(0, ddof=1) / DRAWS**0.5
    # Coordinates that are always the same must be right: to rounding.
    return float(np.max(off / np.maximum(error, 1e-5)))


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_within_four_standard_errors(name):
    """32 coordinates at 4 standard errors: a fair link fails one seed in 500; this seed is fixed."""
    assert errors_in_standard_errors(UNBIASED[name], X) < 4


@pytest.mark.parametrize(
    "link",
    [
        wire.quantize(3),
        wire.top_k(0.5),
        wire.terngrad(1.0),
        wire.random_k(0.25, unbiased=False),
        wire.drive(unbiased=False),
        wire.lloyd_max(2),
        wire.eden(2, passes=1),
    ],
    ids=[
        "nearest",
        "top_k",
        "clipped",
        "random_k plain",
        "drive of least error",
        "lloyd_max without rotation",
        "a single pass",
    ],
)
def test_bias_is_found(link):
    assert errors_in_standard_errors(link, X) > 6


def test_sums_of_unbiased_payloads_are_unbiased():
    """Two clients with the same shared randomness: the sum is decoded, and not each."""
    link = wire.chain(wire.hadamard(), wire.random_k(0.5), wire.qsgd(4))

    def draw(key):
        ctx = context(key, ())
        one = link.open(link.encode(X, (), ctx)[0], ctx)
        two = link.open(link.encode(OTHERS, (), ctx._replace(private=jax.random.fold_in(key, 9)))[0], ctx)
        return link.decode(jax.tree.map(lambda a, b: a + b, one, two), ctx)[0]

    got = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(2), DRAWS)), np.float64)
    error = got.std(0, ddof=1) / DRAWS**0.5
    assert np.max(np.abs(got.mean(0) - np.asarray(X + OTHERS)) / error) < 4
