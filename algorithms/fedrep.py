"""FedRep (Collins et al., "Exploiting Shared Representations for Personalized Federated Learning", ICML 2021,
algorithm 1).

Each client has a head of its own: lines 8 to 10 train it alone on the representation received, line 11 the
representation with the head held, which is all that travels. :func:`fedjax_lab.transforms.private` with
``alternating``. Kept per client: its head. Travels: the representation each way. Deviation: the representation makes
as many local steps as asked, where the paper's analysis has one.
"""

from collections.abc import Callable
from typing import Any

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def fedrep(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    head: Callable[[str], bool],
    head_epochs: fl.Work = 10,
    **local_work: Any,
) -> fl.Round:
    """FedAvg of a shared representation, under heads that never leave their clients.

    Args:
      model: the model.
      client_optimizer: the local optimizer, of both phases.
      head: the predicate of the head's leaves, ``fl.transforms.leaves("params/Dense_1/*")``.
      head_epochs: passes in which the head is trained alone, the paper's tau.
      **local_work: as for :func:`algorithms.fedavg.fedavg`, of the representation.
    """
    shared = {"batch_size": local_work.get("batch_size", 10), "static": local_work.get("static", False)}
    first = fl.local_training(model, client_optimizer, epochs=head_epochs, **shared)
    base = fedavg(model, client_optimizer, **local_work)
    return fl.compose(base, fl.transforms.private(head, alternating=first))
