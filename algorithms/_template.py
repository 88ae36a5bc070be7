"""Name of the method (authors, "title", venue and year, algorithm n).

A skeleton to copy: CONTRIBUTING.md walks through it. The method here is FedAvg whose clients clip
the gradient of every local step (Pascanu, Mikolov and Bengio, "On the difficulty of training
recurrent neural networks", ICML 2013, algorithm 1).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def template(model: fl.Model, client_optimizer: fl.ClientOptimizer, *, max_norm: Any, **local_work: Any) -> fl.Round:
    """FedAvg with clipped local gradients.

    Args:
      model: the model.
      client_optimizer: the local optimizer.
      max_norm: the paper's threshold, a bound of the l2 norm of each step's gradient.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.

    Raises:
      ValueError: a ``max_norm`` that isn't positive.
    """
    fl.checks.positive(max_norm, "max_norm")

    def clip(oracle: fl.Oracle) -> fl.Oracle:
        def clipped(params, inputs, key):
            grads, aux = oracle(params, inputs, key)
            scale = jnp.minimum(1.0, max_norm / jnp.maximum(optax.tree.norm(grads), 1e-30))
            return jax.tree.map(lambda g: scale.astype(g.dtype) * g, grads), aux

        return clipped

    # A tilt may also depend on the variables received, as FedProx's does, and on the client's data.
    change = fl.transforms.tilted(lambda received, client: clip)
    return fl.compose(fedavg(model, client_optimizer, **local_work), change)
