"""A half-width slice of a convolutional network against the same Flax module, built half as wide."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab.transforms import hidden_units, width_slices


class Residual(nn.Module):
    """Pooling, a shortcut that ties two layers' channels, and a dense layer behind 3 x 6 pixels of them."""

    width: float

    @nn.compact
    def __call__(self, x):
        channels, units = int(8 * self.width), int(6 * self.width)
        x = nn.sigmoid(nn.Conv(channels, (3, 3), name="a")(x))
        x = x.reshape(x.shape[0], 3, 2, 6, -1).max(2)
        x = x + nn.sigmoid(nn.Conv(channels, (3, 3), name="b")(x))
        x = nn.tanh(nn.Dense(units, name="c")(x.reshape(x.shape[0], -1)))
        return nn.Dense(3, name="d")(x)


def half(p):
    rows = p["c"]["kernel"].reshape(3, 6, 8, 6)[:, :, :4, :3].reshape(-1, 3)
    return {
        "a": {"kernel": p["a"]["kernel"][..., :4], "bias": p["a"]["bias"][:4]},
        "b": {"kernel": p["b"]["kernel"][:, :, :4, :4], "bias": p["b"]["bias"][:4]},
        "c": {"kernel": rows, "bias": p["c"]["bias"][:3]},
        "d": {"kernel": p["d"]["kernel"][:3], "bias": p["d"]["bias"]},
    }


@pytest.mark.slow
def test_a_slice_of_a_convolutional_network_trains_as_the_smaller_module():
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(5, 6, 6, 1)).astype(np.float32), "y": rng.integers(0, 3, 5).astype(np.int32)}
    data = fl.FederatedData.from_clients({"c": arrays})
    big, small = (fl.models.from_flax(Residual(w), (1, 6, 6, 1), num_classes=3) for w in (1, 0.5))
    base = lambda model: fedavg(model, optax.sgd(0.5), steps=3, batch_size=None)
    sliced, own = fl.synchronous(fl.compose(base(big), width_slices(0.5)), data), fl.synchronous(base(small), data)
    state = sliced.init(jax.random.key(0))
    assert hidden_units(big.loss, sliced.variables(state), arrays).sizes == (("a", 8), ("c", 6))
    start = half(sliced.params(state))
    after = half(sliced.params(sliced.step(state, sliced.data)[0]))
    expected = own.params(own.step(own.init(jax.random.key(0), start), own.data)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after, expected)
    assert float(jnp.abs(expected["a"]["kernel"] - start["a"]["kernel"]).max()) > 1e-3
