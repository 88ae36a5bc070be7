"""How published code draws the parameters that training starts from, where that isn't Flax's way."""

from typing import Any

import jax

import fedjax_lab as fl


def pytorch_start(model: fl.Model) -> fl.Model:
    """A model of dense layers, every weight and bias drawn as PyTorch does: uniform in +-1/sqrt(inputs).

    Flax draws weights of the same layer 1.7 times as large (normal, of variance 1/inputs), and biases of zero.

    Args:
      model: its parameters are ``{layer: {"kernel": [inputs, outputs], "bias": [outputs]}}``.
    """
    usual: Any = model.init_from

    def draw(key, params):
        drawn = {}
        for i, (name, layer) in enumerate(sorted(params.items())):
            bound = layer["kernel"].shape[0] ** -0.5
            keys = dict(zip(sorted(layer), jax.random.split(jax.random.fold_in(key, i), len(layer)), strict=True))
            drawn[name] = {n: jax.random.uniform(keys[n], w.shape, w.dtype, -bound, bound) for n, w in layer.items()}
        return drawn

    def init(key):
        params, state = model.init(key)
        return draw(key, params), state

    def init_from(key, batch):
        params, state = usual(key, batch)
        return draw(key, params), state

    return model._replace(init=init, init_from=init_from if usual else None)
