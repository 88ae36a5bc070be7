"""FedProx (Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, algorithm 2).

FedAvg with a proximal term in the local objective, and stragglers' partial work taken as it is.

Kept per client: nothing, or the client optimizer's state by choice. Travels: a model each way.
"""

from typing import Any

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def fedprox(model: fl.Model, client_optimizer: fl.ClientOptimizer, *, mu: Any, **local_work: Any) -> fl.Round:
    """FedAvg on ``F_k(w) + mu/2 ||w - w_t||^2``.

    Args:
      model: the model.
      client_optimizer: the local solver, from optax.
      mu: strength of the proximal term; 0 is FedAvg.
      **local_work: as for :func:`algorithms.fedavg.fedavg`. Stragglers that do part of the work:
        ``epochs=fl.partial_work(20, fraction=0.9)``.
    """
    return fl.compose(fedavg(model, client_optimizer, **local_work), fl.transforms.proximal(mu))
