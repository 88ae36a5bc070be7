"""The keyed permutation: a bijection for every n, and as good as uniform.

Chi-square thresholds below are the 1 - 1e-4 quantiles; the seeds are fixed.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fedjax_lab import shuffle


@jax.jit
def _orders(n, seeds):
    return jax.vmap(lambda s: shuffle.permute(jnp.arange(80), n, s))(seeds)


def test_it_is_a_bijection_for_every_size():
    seeds = jax.random.bits(jax.random.key(0), (20,), jnp.uint32)
    for n in [*range(1, 40), 79, 80]:
        values = np.asarray(_orders(n, seeds))[:, :n]
        assert (np.sort(values, axis=1) == np.arange(n)).all()


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_few_are_equally_likely(n):
    seeds = jax.random.bits(jax.random.key(n), (100_000,), jnp.uint32)
    values = np.asarray(jax.vmap(lambda s: shuffle.permute(jnp.arange(n), n, s))(seeds))
    codes = values @ (n ** np.arange(n))
    expected = [np.array(p) @ (n ** np.arange(n)) for p in itertools.permutations(range(n))]
    counts = np.array([(codes == e).sum() for e in expected])
    assert counts.sum() == len(codes)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_pairs_of_many_are_equally_likely():
    n = 50
    seeds = jax.random.bits(jax.random.key(7), (100_000,), jnp.uint32)
    pair = np.asarray(jax.vmap(lambda s: shuffle.permute(jnp.array([0, 1]), n, s))(seeds))
    counts = np.bincount(pair[:, 0] * n + pair[:, 1], minlength=n * n).reshape(n, n)
    assert (np.diag(counts) == 0).all()
    assert stats.chisquare(counts[~np.eye(n, dtype=bool)]).pvalue > 1e-4


def test_large_domains_stay_inside_and_distinct():
    n = 2**31 - 1
    values = np.asarray(shuffle.permute(jnp.arange(10_000), n, jnp.uint32(3)))
    assert values.min() >= 0
    assert len(np.unique(values)) == 10_000
    assert abs(values.mean() / n - 0.5) < 5 / math.sqrt(12 * 10_000)


@pytest.mark.parametrize("n", [1, 3, 1000, 2**20 + 7, 2**31 - 1])
def test_scaling_is_exact_multiplication(n):
    bits = np.array([0, 1, 2**16 - 1, 2**16, 2**31, 2**32 - 1, 123456789], np.uint32)
    exact = [int(b) * n >> 32 for b in bits]
    assert np.asarray(shuffle._scale(jnp.asarray(bits), jnp.uint32(n))).tolist() == exact


def test_seeds_differ_by_key_and_tag():
    keys = jax.random.split(jax.random.key(0), 1000)
    seeds = np.asarray(jax.vmap(shuffle.seed_of)(keys))
    assert len(np.unique(seeds)) == 1000
    tags = np.asarray(jax.vmap(lambda t: shuffle.derive(jnp.uint32(1), t))(jnp.arange(1000)))
    assert len(np.unique(tags)) == 1000
