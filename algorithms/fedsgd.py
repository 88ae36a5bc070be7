"""FedSGD (McMahan et al. 2017, section 2): one gradient of all a client's data a round.

Kept per client: nothing. Travels: a model down, a gradient's worth up.
"""

from typing import Any

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def fedsgd(model: fl.Model, client_optimizer: fl.ClientOptimizer, **options: Any) -> fl.Round:
    """The clients' full gradients, averaged and applied: FedAvg with E = 1 and B = infinity.

    Args:
      model: the model.
      client_optimizer: ``optax.sgd(eta)``; eta is the algorithm's learning rate.
      **options: ``weighting`` and ``server_optimizer`` of :func:`algorithms.fedavg.fedavg`.
    """
    return fedavg(model, client_optimizer, steps=1, batch_size=None, **options)
