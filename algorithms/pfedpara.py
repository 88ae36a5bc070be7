"""pFedPara (Hyeon-Woo, Ye-Bin and Oh, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated
Learning", ICLR 2022, section 2.3).

Kernels ``W1 * (W2 + 1)`` of two low-rank halves, of which clients share the first and keep the second:
:func:`fedjax_lab.transforms.fedpara` under :func:`fedjax_lab.transforms.private`. Kept per client: half of the factors.
Travels: the other half each way. Deviation: the second halves start at zero, so that all begin with one model.
"""

from typing import Any

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def pfedpara(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    gamma: Any = 0.1,
    rank: int | None = None,
    predicate: Any = None,
    **local_work: Any,
) -> fl.Round:
    """FedAvg of one half of each kernel, beside another that never leaves its client.

    Args:
      model: the model.
      client_optimizer: the local optimizer.
      gamma, rank, predicate: as for :func:`fedjax_lab.transforms.fedpara`.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.
    """
    factorized = fl.transforms.fedpara(model, gamma, rank=rank, predicate=predicate, personal=True)
    base = fedavg(factorized, client_optimizer, **local_work)
    return fl.compose(base, fl.transforms.private(fl.transforms.personal_factors))
