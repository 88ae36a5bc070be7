"""FedRecon (Singhal et al., "Federated Reconstruction: Partially Local Federated Learning", NeurIPS 2021,
algorithm 1).

Lines of ClientUpdate: the split of the examples in two, the reconstruction of the local leaves from the support (R),
the update of the global ones on the query (U) and its weight, the number of query examples, are
:func:`fedjax_lab.transforms.reconstruction`; the server's step is FedAvg's. Kept per client: nothing. Travels: the
global part each way.
"""

from collections.abc import Callable
from typing import Any

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def fedrecon(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    private: Callable[[str], bool],
    reconstruction_optimizer: fl.ClientOptimizer | None = None,
    reconstruction_steps: fl.Work | None = None,
    support: float = 0.5,
    **local_work: Any,
) -> fl.Round:
    """FedAvg of a part of the model; the other part is rebuilt by whoever needs it, from a few examples.

    Args:
      model: the model.
      client_optimizer: of the global part, the paper's eta_u.
      private: the predicate of the local leaves, such as ``fl.transforms.leaves("params/output/*")``.
      reconstruction_optimizer: of the local part, the paper's eta_r; by default ``client_optimizer``.
      reconstruction_steps: gradient steps of the reconstruction, the paper's k_r; by default as many epochs or steps
        as the global part is trained for.
      support: a client's share of examples to reconstruct from.
      **local_work: as for :func:`algorithms.fedavg.fedavg`, of the global part.
    """
    work = {name: local_work[name] for name in ("epochs", "steps", "batch_size", "static") if name in local_work}
    if reconstruction_steps is not None:
        work = {n: v for n, v in work.items() if n in ("batch_size", "static")} | {"steps": reconstruction_steps}
    optimizer = client_optimizer if reconstruction_optimizer is None else reconstruction_optimizer
    rebuilt = fl.transforms.reconstruction(model, private, optimizer, support=support, **work)
    return fl.compose(fedavg(model, client_optimizer, **local_work), rebuilt)
