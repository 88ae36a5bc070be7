"""FedPara (Hyeon-Woo, Ye-Bin and Oh, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated
Learning", ICLR 2022, section 2).

FedAvg of a model whose kernels are products of low-rank ones: :func:`fedjax_lab.transforms.fedpara`. Kept per client:
nothing. Travels: the factors each way. Deviation: without the paper's Jacobian regularisation, which is an option
there.
"""

from typing import Any

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def fedpara(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    gamma: Any = 0.1,
    rank: int | None = None,
    predicate: Any = None,
    **local_work: Any,
) -> fl.Round:
    """FedAvg of low-rank factors.

    Args:
      model: the model.
      client_optimizer: the local optimizer.
      gamma, rank, predicate: as for :func:`fedjax_lab.transforms.fedpara`.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.
    """
    return fedavg(fl.transforms.fedpara(model, gamma, rank=rank, predicate=predicate), client_optimizer, **local_work)
