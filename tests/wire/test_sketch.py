"""Sketches: linear, and off by no more than their papers say."""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab import wire
from fedjax_lab.wire.sketch import _Hashes
from tests.problems import assert_close
from tests.wire.table import context

SIZE, WIDTH = 2000, 100
X = jnp.asarray(np.random.default_rng(0).normal(size=SIZE) ** 3, jnp.float32)
NORM = float(jnp.linalg.norm(X))


def read(link, x, seeds):
    def one(seed):
        ctx = context(jax.random.key(seed), ())
        return wire.undo(link, link.encode(x, (), ctx)[0], ctx)

    return np.asarray(jax.jit(lambda s: jax.lax.map(one, s))(jnp.arange(seeds)), np.float64)


def test_one_row_errs_by_what_the_other_entries_weigh():
    """Charikar et al. 2002, lemma 1: unbiased, and a variance of (|x|^2 - x_i^2) / width."""
    off = read(wire.count_sketch(1, width=WIDTH), X, 400) - np.asarray(X)
    expected = (NORM**2 - np.asarray(X, np.float64) ** 2) / WIDTH
    np.testing.assert_allclose((off**2).mean(), expected.mean(), rtol=0.05)
    # Chebyshev, for every row and entry: more than twice |x| / sqrt(width) in at most a quarter of the cases.
    assert (np.abs(off) > 2 * NORM / WIDTH**0.5).mean() <= 0.25


def test_the_median_of_five_rows_rarely_errs_by_more_than_the_bound():
    """Three of five rows would have to: at most 10.4% by Chebyshev, and far less of them as it is."""
    off = read(wire.count_sketch(5, width=WIDTH), X, 60) - np.asarray(X)
    five = sum(10 * 0.25**3 * 0.75**2 if k == 3 else 5 * 0.25**4 * 0.75 if k == 4 else 0.25**5 for k in (3, 4, 5))
    wrong = (np.abs(off) > 2 * NORM / WIDTH**0.5).mean()
    assert wrong <= five
    single = np.abs(read(wire.count_sketch(1, width=WIDTH), X, 60) - np.asarray(X))
    assert wrong < 0.5 * (single > 2 * NORM / WIDTH**0.5).mean()


def test_heavy_entries_are_found():
    """Ten entries of 30 among noise: the ten largest of what a sketch of a quarter of the size says."""
    heavy = np.arange(10) * 37
    x = jnp.asarray(np.random.default_rng(1).normal(size=20_000), jnp.float32).at[heavy].set(30.0)
    got = read(wire.count_sketch(5, width=1000), x, 20)
    found = [set(np.argsort(-np.abs(row))[:10]) == set(heavy) for row in got]
    assert np.mean(found) > 0.9


def test_even_rows_take_the_middle_of_two():
    link = wire.count_sketch(4, width=7)
    ctx = context(jax.random.key(0), ())
    table = link.encode(X[:30], (), ctx)[0]
    each = np.stack(_Hashes(ctx.public, 7, True).read(table.code, 30))
    np.testing.assert_allclose(wire.undo(link, table, ctx), np.median(each, 0), rtol=1e-6)


def test_sketches_add_up():
    """The sketch of a sum is the sum of sketches; so a sum is read once."""
    for link in (wire.count_sketch(3, width=50), wire.count_mean_sketch(3, width=0.05)):
        ctx = context(jax.random.key(3), ())
        one, two, both = (link.encode(v, (), ctx)[0] for v in (X, X[::-1], X + X[::-1]))
        assert_close(jax.tree.map(lambda a, b: a + b, one, two), both, atol=1e-3, rtol=1e-5)


def test_fetch_sgd_by_hand():
    """In a table without collisions: momentum 1/2, the two largest of the accumulated error are applied."""
    link = wire.fetch_sgd(3, width=4096, k=2, momentum=0.5)
    x = jnp.array([4.0, -3.0, 2.0, 1.0])
    state = link.init(jax.eval_shape(lambda: x))
    velocity, error = np.zeros(4), np.zeros(4)
    for _ in range(4):
        ctx = context(jax.random.key(0), state)
        got, state = link.decode(link.encode(x, (), ctx)[0], ctx)
        velocity = 0.5 * velocity + np.asarray(x)
        error = error + velocity
        expected = np.zeros(4)
        top = np.argsort(-np.abs(error))[:2]
        expected[top] = error[top]
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        error[top] = velocity[top] = 0
