"""FedAvgM (Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", 2019, section 4.3): FedAvg with server momentum.

Kept per client: nothing, or the client optimizer's state by choice. Travels: a model each way.
"""

from typing import Any

import optax

import fedjax_lab as fl
from algorithms.fedopt import fedopt


def fedavgm(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    server_learning_rate: Any = 1.0,
    momentum: Any = 0.9,
    **local_work: Any,
) -> fl.Round:
    """FedAvg whose server keeps ``v = momentum v + mean update`` and moves by it.

    Args:
      model: the model.
      client_optimizer: the local optimizer.
      server_learning_rate: applied to ``v``.
      momentum: the paper's beta; 0 is FedAvg.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.
    """
    fl.checks.positive(server_learning_rate, "server_learning_rate")
    fl.checks.probability(momentum, "momentum")
    server = optax.sgd(server_learning_rate, momentum=momentum)
    return fedopt(model, client_optimizer, server_optimizer=server, **local_work)
