"""Small problems that many tests share, so that compiled shapes repeat."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_lab as fl

SIZES = (5, 12, 1, 30, 8, 23, 17, 9)
# Sizes of clients; the oracle compiles each operation for every size of a batch: of 10, 5 and 1 here.
FEW_SHAPES = (5, 15, 1, 30, 10, 25, 5, 15)


def softmax_model(classes: int = 3, features: int = 4) -> fl.Model:
    """Softmax regression as plain functions, started at small fixed weights."""

    def logits(params, batch):
        return batch["x"] @ params["w"] + params["b"][None]

    def init(key):
        return {"w": 0.1 * jax.random.normal(key, (features, classes)), "b": jnp.zeros(classes)}, ()

    def loss(params, model_state, batch, mask, key, train):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), batch["y"]), model_state

    def metrics(params, model_state, batch):
        out = logits(params, batch)
        return {
            "loss": optax.softmax_cross_entropy_with_integer_labels(out, batch["y"]),
            "accuracy": (jnp.argmax(out, -1) == batch["y"]).astype(jnp.float32),
        }

    return fl.Model(init, loss, metrics, num_classes=classes)


@functools.cache
def softmax_data(sizes: tuple[int, ...] = SIZES, seed: int = 0, empty: int = 0) -> fl.FederatedData:
    """Heterogeneous clients of the given sizes, and ``empty`` ones at the end."""
    rng = np.random.default_rng(seed)
    clients = {}
    for k, n in enumerate((*sizes, *[0] * empty)):
        x = rng.normal(rng.normal(size=4), 1, size=(n, 4)).astype(np.float32)
        y = np.argmax(x @ rng.normal(size=(4, 3)), -1)
        clients[f"c{k}"] = {"x": x, "y": y}
    return fl.FederatedData.from_clients(clients)


def quadratic_model(dim: int = 3) -> fl.Model:
    """One row {"A": [d, d], "b": [d]} a client; loss 0.5 (w - b)' A (w - b)."""

    def loss(params, model_state, batch, mask, key, train):
        d = params[None] - batch["b"]
        return 0.5 * jnp.einsum("ni,nij,nj->n", d, batch["A"], d), model_state

    return fl.Model(
        lambda key: (jnp.zeros(dim), ()), loss, lambda p, s, b: {"loss": loss(p, s, b, None, None, False)[0]}
    )


@functools.cache
def quadratic_data(clients: int = 5, dim: int = 3, seed: int = 0) -> tuple[fl.FederatedData, np.ndarray]:
    """Quadratics with different curvatures and minimisers, and the minimiser of their plain mean."""
    rng = np.random.default_rng(seed)
    A = np.stack([np.diag(rng.uniform(0.3, 1.5, dim)) for _ in range(clients)])
    b = rng.normal(0, 2, (clients, dim))
    optimum = np.linalg.solve(A.sum(0), np.einsum("kij,kj->i", A, b))
    return fl.FederatedData.from_clients({k: {"A": A[k : k + 1], "b": b[k : k + 1]} for k in range(clients)}), optimum


def steps(process: fl.Process, rounds: int, seed: int = 0, params=None):
    """The state after some rounds and the last round's metrics."""
    state, metrics = process.init(jax.random.key(seed), params), {}
    for _ in range(rounds):
        state, metrics = process.step(state, process.data)
    return state, metrics


def assert_seeds_vmap(process) -> None:
    """One vmapped step of two seeds is each seed's own step."""
    many = jax.jit(jax.vmap(lambda s: process.step(s, process.data)[0]))
    keys = jax.random.split(jax.random.key(5), 2)
    together = many(jax.tree.map(lambda *x: jnp.stack(x), *[process.init(k) for k in keys]))
    for i, key in enumerate(keys):
        alone = process.step(process.init(key), process.data)[0]
        assert_close(process.params(alone), jax.tree.map(lambda x, i=i: x[i], process.params(together)))


def assert_same_bits(a, b):
    """Equal leaf by leaf, NaN equal to NaN."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def assert_close(a, b, atol=1e-6, rtol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=atol, rtol=rtol)
