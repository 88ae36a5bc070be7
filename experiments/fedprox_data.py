"""FedProx's synthetic data in shapes that all draws share, and what is measured on them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_lab as fl

CLIENTS = 30
_TILE = 64


def load(wanted: Sequence[tuple[str, int]]) -> dict[tuple[str, int], fl.Split]:
    """Data sets by name and seed.

    Their arrays are padded with rows that belong to nobody, so that all have the same shapes and one
    compiled program serves them all.
    """
    splits = {(name, seed): _draw(name, seed) for name, seed in wanted}
    trains = same_shapes([split.train for split in splits.values()])
    tests = same_shapes([split.test for split in splits.values()])
    return {key: fl.Split(a, b) for key, a, b in zip(splits, trains, tests, strict=True)}


def _draw(name: str, seed: int) -> fl.Split:
    if name == "iid":
        return fl.datasets.synthetic_iid(CLIENTS, seed=seed)
    return fl.datasets.synthetic(float(name), float(name), CLIENTS, seed=seed)


def same_shapes(data: Sequence[fl.FederatedData]) -> list[fl.FederatedData]:
    """The same clients with the same rows, in arrays of one length and without attributes."""
    rows, largest = max(d.num_examples for d in data), max(d.max_size for d in data)

    def longer(a):
        return np.concatenate([a, np.zeros((rows - len(a), *a.shape[1:]), a.dtype)])

    shared = {"id_table": data[0].id_table, "max_size": largest, "tile": min(_TILE, largest), "attrs": {}}
    return [dataclasses.replace(d, arrays=jax.tree.map(longer, d.arrays), **shared) for d in data]


class Measure:
    """Loss and dissimilarity on the training data, accuracy on test data; compiled once for all data sets."""

    def __init__(self, model: fl.Model):
        self._compiled = jax.jit(lambda params, train, test: measures(model, params, train, test))

    def on(self, test: fl.FederatedData):
        """``evaluate(process, state)`` for :func:`fedjax_lab.run`."""
        return lambda process, state: jax.device_get(self._compiled(process.params(state), process.data, test))


def measures(model: fl.Model, params: Any, train: fl.FederatedData, test: fl.FederatedData) -> dict[str, jax.Array]:
    """What the paper plots.

    ``global_loss`` is the objective, the mean loss over all training examples. ``dissimilarity`` is its
    "variance of local gradients": the mean over clients of the squared distance of their gradient to the
    global one, the mean weighted by examples (section 5.3.3, and the gradient difference of its code).
    """
    grads, losses = jax.lax.map(lambda k: client_gradient(model, params, train.view(k)), jnp.arange(train.num_clients))
    weights = train.sizes / jnp.sum(train.sizes)
    total = jax.tree.map(lambda g: jnp.tensordot(weights, g, axes=1), grads)
    distances = sum(
        jnp.sum(jnp.square(g - t[None]).reshape(g.shape[0], -1), axis=1)
        for g, t in zip(jax.tree.leaves(grads), jax.tree.leaves(total), strict=True)
    )
    right = model.metrics(params, (), test.arrays)["accuracy"]
    real = jnp.arange(right.shape[0]) < jnp.sum(test.sizes)  # the others are padding
    return {
        "global_loss": jnp.sum(weights * losses),
        "accuracy": fl.masked_mean(right, real),
        "dissimilarity": jnp.mean(distances),
    }


def client_gradient(model: fl.Model, params: Any, client: fl.ClientData) -> tuple[Any, jax.Array]:
    """Gradient and loss over all of a client's examples."""
    oracle, unused = fl.gradient_oracle(model.loss), jax.random.key(0)

    def add(sums, batch, mask, positions, key):
        grads, (loss, _) = oracle(params, ((), batch, mask), unused)
        return jax.tree.map(lambda s, x: s + jnp.sum(mask) * x, sums, (grads, loss))

    sums = client.fold(add, (jax.tree.map(jnp.zeros_like, params), jnp.float32(0)))
    return jax.tree.map(lambda s: s / jnp.maximum(client.size, 1), sums)
