"""Losses and metrics against values worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lab import models

LN3 = math.log(3)
# Softmax of these rows: (1/2, 1/4, 1/4) and (1/6, 1/3, 1/2).
SCORES = jnp.log(jnp.array([[2.0, 1, 1], [1, 2, 3]]))


def test_cross_entropy_and_accuracy():
    batch = {"y": jnp.array([0, 1])}
    np.testing.assert_allclose(models.cross_entropy(SCORES, batch), [math.log(2), LN3], rtol=1e-6)
    np.testing.assert_array_equal(models.accuracy(SCORES, batch), [1, 0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("odd", [0.0, np.inf, -np.inf, np.nan, 3e38])
def test_cross_entropy_and_its_gradient_are_those_of_logsumexp_bit_for_bit(dtype, odd):
    rng = np.random.default_rng(0)
    scores = jnp.asarray(30 * rng.normal(size=(7, 10)), dtype).at[0, 1].set(odd).at[1].set(-jnp.inf)
    y, weights = jnp.asarray([*range(6), 12]), jnp.asarray(rng.random(7), dtype)  # 12 is no class

    def expected(scores, batch):
        own = jax.nn.one_hot(batch["y"], 10, dtype=bool)
        value = jax.nn.logsumexp(scores, -1) - jnp.sum(jnp.where(own, scores, 0), -1)
        return jnp.where(batch["y"] < 10, value, jnp.nan)

    def both(loss):
        total = lambda scores: jnp.sum(jnp.where(y < 10, loss(scores, {"y": y}) * weights, 0).astype(jnp.float32))
        return np.asarray(loss(scores, {"y": y}), np.float32), np.asarray(jax.grad(total)(scores), np.float32)

    for found, wanted in zip(both(models.cross_entropy), both(expected), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert np.isnan(both(models.cross_entropy)[0][-1])


def test_sequences_average_over_their_real_tokens():
    scores = jnp.stack([SCORES, SCORES, SCORES])
    batch = {"y": jnp.array([[1, 2], [2, 0], [0, 0]])}  # 0 is padding
    expected = [(math.log(4) + math.log(2)) / 2, math.log(4), 0]
    np.testing.assert_allclose(models.sequence_cross_entropy(scores, batch), expected, rtol=1e-6)
    np.testing.assert_array_equal(models.sequence_accuracy(scores, batch), [0.5, 0, 0])


def test_binary_cross_entropy_is_the_mean_over_labels():
    scores = jnp.log(jnp.array([[1.0, 3], [1, 1]]))  # sigmoid: 1/2 and 3/4; 1/2 and 1/2
    y = jnp.array([[0, 1], [1, 1]])
    expected = [(math.log(2) + math.log(4 / 3)) / 2, math.log(2)]
    np.testing.assert_allclose(models.binary_cross_entropy(scores, {"y": y}), expected, rtol=1e-6)


def test_squared_error_has_no_half_and_takes_a_column():
    y = jnp.array([1.0, 5])
    np.testing.assert_allclose(models.squared_error(jnp.array([[3.0], [2]]), {"y": y}), [4, 9])
    both = jnp.array([[1.0, 2], [3, 4]])
    np.testing.assert_allclose(models.squared_error(both, {"y": both + jnp.eye(2)}), [0.5, 0.5])


def test_recall_at_k():
    scores = jnp.array([[4.0, 3, 2, 1]] * 3)
    y = jnp.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(models.recall_at(2)(scores, {"y": y}), [0.5, 1, 0])
    np.testing.assert_array_equal(models.recall_at(9)(scores, {"y": y}), [1, 1, 0])


@pytest.mark.parametrize(
    ("loss", "batch", "message"),
    [
        (models.cross_entropy, {"y": jnp.zeros(2)}, "integer class numbers; got dtype float32"),
        (models.cross_entropy, {"y": jnp.zeros((2, 1), int)}, r"shape \(2, 1\).*need shape \(2,\)"),
        (models.cross_entropy, {"label": jnp.zeros(2, int)}, r"\"y\"; the data have.*'label'"),
        (models.squared_error, {"y": jnp.zeros(2)}, r"targets \"y\" have shape \(2,\)"),
        (models.binary_cross_entropy, {"y": jnp.zeros(2, int)}, r"shape \(2,\).*\(2, 3\)"),
    ],
)
def test_labels_that_do_not_fit_are_named(loss, batch, message):
    with pytest.raises(ValueError, match=message):
        loss(SCORES, batch)
