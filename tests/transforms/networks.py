"""A network of plain functions that works in any width, and its gradient steps."""

import jax
import jax.numpy as jnp
import optax

import fedjax_lab as fl

HIDDEN = 6


def network(hidden: int = HIDDEN, features: int = 4, classes: int = 3) -> fl.Model:
    """Two layers with a sigmoid between, which is not zero at zero: a unit left out must be out of the gradient too."""

    def init(key):
        one, two = jax.random.split(key)
        return {
            "hidden": {"kernel": jax.random.normal(one, (features, hidden)), "bias": jnp.full(hidden, 0.1)},
            "output": {"kernel": jax.random.normal(two, (hidden, classes)), "bias": jnp.zeros(classes)},
        }

    def apply(params, x):
        y = jax.nn.sigmoid(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
        return y @ params["output"]["kernel"] + params["output"]["bias"][None]

    return fl.models.from_functions(init, apply, num_classes=classes)


def descent(model: fl.Model, params, arrays, rate: float, steps: int):
    """Gradient steps on the mean loss of a client's arrays, by optax and jax.grad alone."""
    mask = jnp.ones(len(arrays["y"]), bool)
    mean = lambda p: jnp.mean(model.loss(p, (), arrays, mask, None, True)[0])
    for _ in range(steps):
        params = optax.apply_updates(params, jax.tree.map(lambda g: -rate * g, jax.grad(mean)(params)))
    return params
