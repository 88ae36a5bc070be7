"""CFL (Sattler, Mueller and Samek, "Clustered Federated Learning: Model-Agnostic Distributed Multitask Optimization
under Privacy Constraints", IEEE Transactions on Neural Networks and Learning Systems 2020, algorithms 1
to 3).

FedAvg until it settles; where clients still pull in different directions, their cluster is divided in two by the
cosine similarity of their updates, and so on: :func:`fedjax_lab.transforms.split_clusters`. Who comes later goes down
the tree of divisions by its updates. Kept per client: nothing; the server keeps its cluster, and of each division the
model and two directions. Travels: a model each way. All clients should take part in every round (``fl.everyone()``).

Deviations: at most ``max_clusters`` models, so that the state has a fixed shape; down the tree it goes by the mean
direction of each half's updates, where the paper keeps them all and goes by the most similar one; that works for
clients that missed a division as it does for new ones.
"""

from typing import Any

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def clustered_fl(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    max_clusters: int,
    eps1: Any,
    eps2: Any,
    gamma_max: Any = 0.0,
    min_rounds: int = 20,
    linkage: str = "single",
    **local_work: Any,
) -> fl.Round:
    """FedAvg whose clients part ways when their updates disagree.

    Args:
      model: the model.
      client_optimizer: the local optimizer.
      max_clusters: how many models there may be; 1 is FedAvg.
      eps1, eps2: a cluster is divided when its mean update is shorter than eps1 and a member's longer than eps2. The
        authors' code has 0.4 and 1.6 for its network; the metrics ``largest_mean_update`` and
        ``longest_update`` of a run say what suits another.
      gamma_max, min_rounds, linkage: see :func:`fedjax_lab.transforms.split_clusters`.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.
    """
    divide = fl.transforms.split_clusters(
        max_clusters, eps1=eps1, eps2=eps2, gamma_max=gamma_max, min_rounds=min_rounds, linkage=linkage
    )
    return fl.compose(fedavg(model, client_optimizer, **local_work), divide)
