"""Federated dropout (Caldas et al., "Expanding the Reach of Federated Learning by Reducing Client Resource
Requirements", 2018, section 3.2).

FedAvg whose clients train a random part of every hidden layer, another one each round:
:func:`fedjax_lab.transforms.federated_dropout`. Kept per client: nothing. Travels: the part each way, and four bytes
down. The paper's whole scheme compresses it both ways: ``fl.compose(federated_dropout(...),
fl.uplink(fl.wire.hadamard(), fl.wire.qsgd(8)), fl.downlink(fl.wire.hadamard(), fl.wire.qsgd(8), deltas=False))``.
Deviation: each entry is averaged over the clients that had it.
"""

from typing import Any

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def federated_dropout(
    model: fl.Model, client_optimizer: fl.ClientOptimizer, *, rate: Any, units: Any = None, **local_work: Any
) -> fl.Round:
    """FedAvg of random sub-models.

    Args:
      model: the model; its hidden units are found from its loss.
      client_optimizer: the local optimizer.
      rate: the share of each hidden layer's units that a client has, the paper's federated dropout rate; 1 is FedAvg.
      units: as for :func:`fedjax_lab.transforms.federated_dropout`.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.
    """
    return fl.compose(fedavg(model, client_optimizer, **local_work), fl.transforms.federated_dropout(rate, units))
