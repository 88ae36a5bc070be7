"""HeteroFL (Diao, Ding and Tarokh, "HeteroFL: Computation and Communication Efficient Federated Learning for
Heterogeneous Clients", ICLR 2021, algorithm 1).

FedAvg whose clients train the first units of every hidden layer, as many as each can afford:
:func:`fedjax_lab.transforms.width_slices`, where the deviations are told. Kept per client: nothing. Travels: each
client's part each way, and four bytes down where clients differ.
"""

from typing import Any

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def heterofl(
    model: fl.Model, client_optimizer: fl.ClientOptimizer, *, rate: Any, units: Any = None, **local_work: Any
) -> fl.Round:
    """FedAvg of models of several widths, the smaller ones parts of the larger.

    Args:
      model: the model; its hidden units are found from its loss.
      client_optimizer: the local optimizer.
      rate: each client's share of the hidden units: a number, an array over the population, or the name of a client
        attribute. The paper's complexity levels a to e are 1, 1/2, 1/4, 1/8 and 1/16.
      units: as for :func:`fedjax_lab.transforms.width_slices`.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.
    """
    return fl.compose(fedavg(model, client_optimizer, **local_work), fl.transforms.width_slices(rate, units))
