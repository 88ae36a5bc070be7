"""FedYogi (Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2).

Kept per client: nothing, or the client optimizer's state by choice. Travels: a model each way.
"""

from typing import Any

import jax.numpy as jnp

import fedjax_lab as fl
from algorithms.fedopt import adaptive, fedopt


def fedyogi(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    server_learning_rate: Any = 0.1,
    beta1: Any = 0.9,
    beta2: Any = 0.99,
    tau: Any = 1e-3,
    **local_work: Any,
) -> fl.Round:
    """FedAvg with the paper's FedYogi server: ``v -= (1 - beta2) u^2 sign(v - u^2)``.

    Args:
      model: the model.
      client_optimizer: the local optimizer, SGD in the paper.
      server_learning_rate: the paper's eta.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      tau: degree of adaptivity.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.
    """
    fl.checks.probability(beta2, "beta2")
    server = adaptive(
        lambda v, square: v - (1 - beta2) * square * jnp.sign(v - square),
        server_learning_rate,
        beta1,
        tau,
    )
    return fedopt(model, client_optimizer, server_optimizer=server, **local_work)
