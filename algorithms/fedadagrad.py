"""FedAdagrad (Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2).

Kept per client: nothing, or the client optimizer's state by choice. Travels: a model each way.
"""

from typing import Any

import fedjax_lab as fl
from algorithms.fedopt import adaptive, fedopt


def fedadagrad(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    server_learning_rate: Any = 0.1,
    beta1: Any = 0.0,
    tau: Any = 1e-3,
    **local_work: Any,
) -> fl.Round:
    """FedAvg with the paper's FedAdagrad server: ``v += u^2``.

    Args:
      model: the model.
      client_optimizer: the local optimizer, SGD in the paper.
      server_learning_rate: the paper's eta.
      beta1: decay of the first moment.
      tau: degree of adaptivity.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.
    """
    server = adaptive(lambda v, square: v + square, server_learning_rate, beta1, tau)
    return fedopt(model, client_optimizer, server_optimizer=server, **local_work)
