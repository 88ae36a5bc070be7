"""HypCluster (Mansour, Mohri, Ro and Suresh, "Three Approaches for Personalization with Applications to Federated
Learning", 2020, section 3, algorithm HypCluster).

Each sampled client is assigned to the hypothesis with the least loss on its data, and each hypothesis makes a step on
the data of its clients, by examples: :func:`fedjax_lab.transforms.clusters` over FedAvg. It differs from IFCA in that
clients weigh by their examples and only a sample of them takes part. Kept per client: nothing. Travels: q models
down, one up with its number.

Deviation: the paper's first step, which trains one model and starts the q around it, is left to the caller
(``process.init(key, params)`` with leaves ``[q, ...]``, or ``spread``).
"""

from typing import Any

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def hypcluster(
    model: fl.Model, client_optimizer: fl.ClientOptimizer, *, q: int, spread: Any = 0.0, **local_work: Any
) -> fl.Round:
    """q hypotheses, of which each client trains and uses the one that suits it best.

    Args:
      model: the model.
      client_optimizer: the local optimizer.
      q: the number of hypotheses; 1 is FedAvg.
      spread: see :func:`fedjax_lab.transforms.clusters`; linear models that start at zero need some.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.

    Raises:
      ValueError: q below 1 or above the cohort.
    """
    fl.checks.positive(q, "q", integer=True)
    return fl.compose(fedavg(model, client_optimizer, **local_work), fl.transforms.clusters(q, spread=spread))
