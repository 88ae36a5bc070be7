"""JAX's 64-bit mode: what is computed in float64 stays so, and float32 models take float64 data."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.scaffold import scaffold
from algorithms.virtual import virtual
from fedjax_lab.wire.base import float_norm
from tests.problems import assert_same_bits, quadratic_model, softmax_model, steps

SGD = optax.sgd(0.1)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def rows(*shape, classes=3):
    rng = np.random.default_rng(0)
    clients = {
        k: {"x": rng.normal(size=(n, *shape)), "y": rng.integers(0, classes, n)} for k, n in enumerate((4, 7, 1))
    }
    return fl.FederatedData.from_clients(clients)


def test_gradient_descent_on_quadratics_to_the_last_digits():
    rng = np.random.default_rng(0)
    A = np.stack([np.diag(rng.uniform(0.3, 1.5, 3)) for _ in range(4)])
    b = rng.normal(size=(4, 3))
    data = fl.FederatedData.from_clients({k: {"A": A[k : k + 1], "b": b[k : k + 1]} for k in range(4)})
    process = fl.synchronous(fedavg(quadratic_model(), SGD, weighting="uniform"), data)
    w = np.zeros(3)
    for _ in range(5):
        w -= 0.1 * np.einsum("kij,kj->ki", A, w - b).mean(0)
    found = process.params(steps(process, 5)[0])
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, w, rtol=1e-13)


class Normalised(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.out = nnx.BatchNorm(4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.norm(x))


ROUNDS = {
    "pieces": (lambda: fedavg(softmax_model(), SGD, steps=2, batch_size=None), rows(4)),
    "scaffold": (lambda: scaffold(softmax_model(), SGD, option="I"), rows(4)),
    "scaffold, float32 parameters": (lambda: scaffold(fl.models.mlp(3), SGD, option="I"), rows(4)),
    "meta": (lambda: fl.compose(fedavg(fl.models.mlp(3), SGD), fl.transforms.per_fedavg(0.1)), rows(4)),
    "posteriors": (lambda: virtual(softmax_model(), SGD, prior_scale=1.0, samples=2), rows(4)),
    "batch norm": (
        lambda: fedavg(fl.models.resnet(3, blocks=(1,), width=4, norm=fl.models.batch_norm()), SGD),
        rows(6, 6, 1),
    ),
    "batch norm, NNX": (lambda: fedavg(fl.models.from_nnx(Normalised), SGD), rows(4)),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_what_adds_up_losses_gradients_or_statistics(name):
    make, data = ROUNDS[name]
    process = fl.synchronous(make(), data, fl.uniform(2))
    state, metrics = steps(process, 1)
    assert np.isfinite(metrics["loss"])
    assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, process.init(0))
    assert np.isfinite(fl.global_metrics(data)(process, state)["loss"])


def test_a_language_model():
    rng = np.random.default_rng(0)
    data = fl.FederatedData.from_clients({k: {n: rng.integers(0, 9, (2, 5)) for n in "xy"} for k in range(2)})
    process = fl.synchronous(fedavg(fl.models.char_lstm(9, hidden=4), SGD), data)
    assert {leaf.dtype for leaf in jax.tree.leaves(process.params(steps(process, 1)[0]))} == {jnp.dtype("float32")}


def test_a_run_resumes_bit_for_bit(tmp_path):
    process = fl.synchronous(fedavg(softmax_model(), SGD), rows(4), fl.uniform(2))
    whole = fl.run(process, 4)
    for rounds in (2, 4):
        parts = fl.run(process, rounds, out=tmp_path)
    assert_same_bits(parts.state, whole.state)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_norms_of_what_only_float64_holds(scale):
    np.testing.assert_allclose(float_norm([scale * jnp.array([3.0, 4.0]), jnp.zeros(2)]), 5 * scale, rtol=1e-12)
