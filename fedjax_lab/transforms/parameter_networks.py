"""Networks that make a model's parameters from an embedding, for :func:`fedjax_lab.transforms.hypernetwork`."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp

from fedjax_lab import checks

PyTree = Any


class Hypernetwork(NamedTuple):
    """A function from a client's embedding to its parameters.

    Attributes:
      init: ``(key, embedding: float32[size], params) -> phi``, its own parameters; ``params`` are those that the model
        would start from.
      apply: ``(phi, embedding) -> params``, of the model's structure, or all of them in one vector in the order of
        ``jax.tree.leaves``.
    """

    init: Callable[[jax.Array, jax.Array, PyTree], PyTree]
    apply: Callable[[PyTree, jax.Array], Any]


def perceptron(hidden: Sequence[int] = (100,), head_scale: Any = 0.1) -> Hypernetwork:
    """Layers of ReLU units, and from the last a linear map to the model's parameters.

    The map's offset begins at the parameters that the model would start from, so that all clients begin near
    these.

    Args:
      hidden: the units of each layer; none at all is a linear network.
      head_scale: of the last map at the start: by so much, about, the clients' parameters differ to begin with,
        in units of one over the square root of its inputs.
    """
    for units in hidden:
        checks.positive(units, "hidden", integer=True, unit=" of units in each layer")
    checks.positive(head_scale, "head_scale")

    def init(key, embedding, params):
        flat, _ = jax.flatten_util.ravel_pytree(params)
        widths = (*embedding.shape, *hidden, flat.size)
        scales = (*[math.sqrt(2.0)] * len(hidden), head_scale)
        keys = jax.random.split(key, len(widths) - 1)
        layers = []
        for k, low, high, scale in zip(keys, widths[:-1], widths[1:], scales, strict=True):
            layers.append(
                {"kernel": scale / math.sqrt(low) * jax.random.normal(k, (low, high)), "bias": jnp.zeros(high)}
            )
        layers[-1]["bias"] = flat.astype(jnp.float32)
        return layers

    def apply(phi, embedding):
        x = embedding
        for layer in phi[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x @ phi[-1]["kernel"] + phi[-1]["bias"]

    return Hypernetwork(init, apply)


def as_network(given: Any) -> Hypernetwork:
    """A Flax module as a Hypernetwork, :func:`perceptron` for ``None``. Raises ValueError for what is neither."""
    if given is None:
        return perceptron()
    if isinstance(given, Hypernetwork):
        return given
    if isinstance(given, nn.Module):
        return Hypernetwork(
            lambda key, embedding, params: nn.meta.unbox(given.init(key, embedding)),
            lambda phi, embedding: given.apply(phi, embedding),
        )
    raise ValueError(
        f"network must be a Flax module or fl.transforms.Hypernetwork(init, apply); got {checks.shown(given)}"
    )


def shaped(made: Any, params: PyTree) -> PyTree:
    """What a network made, in the structure and types of ``params``."""
    if not _in_one(made, params):
        return jax.tree.map(lambda m, p: m.astype(p.dtype), made, params)
    leaves, structure = jax.tree.flatten(params)
    ends, parts = 0, []
    for leaf in leaves:
        parts.append(made[ends : ends + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
        ends += leaf.size
    return jax.tree.unflatten(structure, parts)


def fits(made: Any, params: PyTree) -> None:
    """Refuse a network that doesn't give the model's parameters, by the shapes of what it ``made``."""
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    if _in_one(made, params) or shapes(made) == shapes(params):
        return
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    wanted = {name: leaf.shape for name, leaf in checks.named_leaves(params)}
    got = {name: leaf.shape for name, leaf in checks.named_leaves(made)}
    raise ValueError(f"the hypernetwork gives {got}, but the model has {wanted}, or one vector of {total} numbers")


def _in_one(made: Any, params: PyTree) -> bool:
    """Whether a network gave one vector of all parameters."""
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    return getattr(made, "shape", None) == (total,) and jax.tree.structure(made) == jax.tree.structure(0)
