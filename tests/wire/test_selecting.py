"""The largest entries of long vectors, against sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lab.wire.selecting import SAMPLE, as_bitmap, first_bits, index_bits, largest, positions, to_words

LONG = 4 * SAMPLE + 17
SHORT = 100


def vectors(size):
    rng = np.random.default_rng(size)
    normal = rng.normal(size=size)
    return {
        "normal": normal,
        "heavy": np.exp(5 * normal) * rng.choice([-1, 1], size),
        "ties": rng.integers(-3, 4, size).astype(float),
        "all equal": np.ones(size),
        "mostly zeros": np.where(rng.random(size) < 0.001, normal, 0),
        "tiny": normal * 1e-42,  # below the smallest normal number
        "rising": np.arange(size, dtype=float),
        "few large ones": np.where(np.arange(size) % 1000 == 3, 1e30, 1e-30 * normal),
        "infinite and not a number": np.where(
            np.arange(size) == 7, np.nan, np.where(np.arange(size) == 9, -np.inf, normal)
        ),
    }


def expected(vector, count):
    """The first of the largest, NaN being larger than everything."""
    magnitude = np.abs(vector.astype(np.float32)).view(np.uint32).astype(np.int64)
    return np.sort(np.argsort(-magnitude, kind="stable")[:count])


@pytest.mark.parametrize("kind", vectors(SHORT))
@pytest.mark.parametrize(("size", "count"), [(SHORT, 1), (SHORT, 60), (LONG, 1), (LONG, 400), (LONG, LONG // 2)])
def test_the_largest_are_those_that_sorting_finds(kind, size, count):
    vector = vectors(size)[kind].astype(np.float32)
    values, where = jax.jit(largest, static_argnums=1)(jnp.asarray(vector), count)
    np.testing.assert_array_equal(where.indices(), expected(vector, count))
    np.testing.assert_array_equal(values, vector[expected(vector, count)])
    dense = np.zeros(size, np.float32)
    dense[expected(vector, count)] = values
    np.testing.assert_array_equal(where.scatter(values), dense)
    bits = -(-size // 8) if as_bitmap(count, size) else -(-count * index_bits(size) // 8)
    assert where.data.shape == (bits,)


def test_lanes_of_different_vectors_select_each_their_own():
    rows = np.stack([vectors(LONG)[k] for k in ("normal", "ties", "rising")]).astype(np.float32)
    _, where = jax.jit(jax.vmap(lambda v: largest(v, 300)))(jnp.asarray(rows))
    for row, data in zip(rows, where.data, strict=True):
        one = type(where)(data, 300, LONG)
        np.testing.assert_array_equal(one.indices(), expected(row, 300))


def test_bitmaps():
    mask = np.random.default_rng(0).random(77) < 0.4
    words = to_words(jnp.asarray(mask))
    np.testing.assert_array_equal(positions(words, int(mask.sum())), np.flatnonzero(mask))
    for count in (0, 1, 9, int(mask.sum()), 77):
        kept = positions(first_bits(words, count), min(count, int(mask.sum())))
        np.testing.assert_array_equal(kept, np.flatnonzero(mask)[:count])
    assert (index_bits(1), index_bits(2), index_bits(3), index_bits(4), index_bits(5)) == (1, 1, 2, 2, 3)
