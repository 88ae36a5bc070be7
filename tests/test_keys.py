"""A round's keys are the folds that they are said to be, of every kind of key, one by one and side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lab import keys

data = lambda key: np.asarray(jax.random.key_data(key))


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("number", [0, 1, 7, 2**31 - 1])
def test_keys_are_folds_of_folds(kind, number):
    key, fold = jax.random.key(3, impl=kind), jax.random.fold_in
    round_keys = jax.jit(keys.of_round)(key, jnp.int32(number))
    client_keys = jax.jit(keys.of_client)(key, jnp.int32(number))
    for made in (round_keys, client_keys):
        for i, own in enumerate(made):
            np.testing.assert_array_equal(data(own), data(fold(fold(key, number), i)))


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_clients_side_by_side_draw_what_they_draw_alone(kind):
    key, ids = jax.random.key(5, impl=kind), jnp.array([4, 0, 9], jnp.int32)
    together = jax.vmap(lambda client: keys.of_client(key, client))(ids)
    for i, client in enumerate(ids):
        for made, alone in zip(together, keys.of_client(key, client), strict=True):
            np.testing.assert_array_equal(data(made[i]), data(alone))
