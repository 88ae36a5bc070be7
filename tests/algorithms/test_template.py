"""The skeleton that contributors copy: it runs, and it computes what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms._template import template
from algorithms.fedavg import fedavg


def squared_distance(dim: int) -> fl.Model:
    """Loss ||w - x||^2 / 2 from w = 0, whose gradient at the start is -x."""
    return fl.Model(
        init=lambda key: (jnp.zeros(dim), ()),
        loss=lambda params, model_state, batch, mask, key, train: (
            0.5 * jnp.sum((params[None] - batch["x"]) ** 2, axis=1),
            model_state,
        ),
        metrics=lambda params, model_state, batch: {},
    )


def points(*rows) -> fl.FederatedData:
    return fl.FederatedData.from_clients({k: {"x": np.array([row], np.float32)} for k, row in enumerate(rows)})


def after(algorithm: fl.Round, data: fl.FederatedData, rounds: int = 1):
    process = fl.synchronous(algorithm, data)
    state = process.init(jax.random.key(0))
    for _ in range(rounds):
        state, metrics = process.step(state, process.data)
    return np.asarray(process.params(state)), metrics


def test_clipped_gradient_by_hand():
    # The gradient of the first client, -(3, 4), has norm 5 and is clipped to -(0.6, 0.8); the
    # second's, -(0, 0.5), is within the bound. One step of rate 1, and the mean of both.
    algorithm = template(squared_distance(2), optax.sgd(1.0), max_norm=1.0, steps=1)
    params, _ = after(algorithm, points([3, 4], [0, 0.5]))
    np.testing.assert_allclose(params, [0.3, 0.65], rtol=1e-6)


def test_far_below_the_bound_it_is_fedavg_bit_for_bit():
    data, model = points([3, 4], [0, 0.5], [-2, 1]), squared_distance(2)
    clipped, _ = after(template(model, optax.sgd(0.1), max_norm=1e30, steps=3), data, 3)
    plain, _ = after(fedavg(model, optax.sgd(0.1), steps=3), data, 3)
    np.testing.assert_array_equal(clipped, plain)


@pytest.mark.parametrize("bad", [0, -1.0, "1"])
def test_a_bound_that_is_not_positive_is_refused(bad):
    with pytest.raises(ValueError, match="max_norm"):
        template(squared_distance(2), optax.sgd(0.1), max_norm=bad)
