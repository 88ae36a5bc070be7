"""kNN-Per (Marfoq et al., "Personalized Federated Learning through Local Memorization", ICML 2022, algorithm 1).

A global model is trained, here by FedAvg (line 1); each client looks an example's representation up among those of its
own training data (line 3, the datastore) and mixes the two predictions (equation 9):
:func:`fedjax_lab.transforms.nearest_neighbours`. Kept per client: its data. Travels: what FedAvg sends. Deviation:
of several ``lam`` each client takes the one that suits its own examples, each left out in turn; the paper takes
validation examples.
"""

from typing import Any

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab.transforms.knn import Features


def knn_per(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    features: Features,
    lam: Any = 0.5,
    k: int = 10,
    scale: Any = 1.0,
    capacity: int | None = None,
    **local_work: Any,
) -> fl.Round:
    """FedAvg whose clients remember their examples.

    Args:
      model: a classifier that says its ``num_classes``.
      client_optimizer: the local optimizer.
      features, lam, k, scale, capacity: as for :func:`fedjax_lab.transforms.nearest_neighbours`.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.

    Raises:
      ValueError: a model that doesn't say how many classes it has; what the transform refuses.
    """
    model = fl.as_model(model)
    if model.num_classes is None:
        raise ValueError("knn_per() needs a classifier: a model with num_classes, such as fl.models.mlp(10)")
    looks_up = fl.transforms.nearest_neighbours(
        features, num_classes=model.num_classes, lam=lam, k=k, scale=scale, capacity=capacity
    )
    return fl.compose(fedavg(model, client_optimizer, **local_work), looks_up)
