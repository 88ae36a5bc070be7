"""IFCA (Ghosh, Chung, Yin and Ramchandran, "An Efficient Framework for Clustered Federated Learning", NeurIPS 2020,
algorithm 1).

The cluster estimate by the least loss, the local work (options I and II) and the step of each cluster's model are
:func:`fedjax_lab.transforms.clusters` over FedAvg. Kept per client: nothing. Travels: k models down, one up with its
cluster's number.

Deviation: the paper's options have full batches and equal weights; others are possible here.
"""

from typing import Any

import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.fedsgd import fedsgd


def ifca(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    k: int,
    averaging: str = "model",
    weighting: Any = "uniform",
    spread: Any = 0.0,
    **local_work: Any,
) -> fl.Round:
    """k models, of which each client trains the one that suits it best.

    Args:
      model: the model.
      client_optimizer: the local optimizer; the paper's is SGD of rate gamma.
      k: the number of clusters; 1 is FedAvg.
      averaging: ``"model"`` (option II): tau local steps, ``steps=tau``, and each model becomes the mean of its
        clients' copies. ``"gradient"`` (option I): one full-batch gradient, and each model moves by the sum of its
        clients' steps over the number of all clients in the round.
      weighting: of the means; ``"uniform"`` is the paper's.
      spread: see :func:`fedjax_lab.transforms.clusters`; linear models that start at zero need some.
      **local_work: as for :func:`algorithms.fedavg.fedavg`; gradient averaging takes none of it but
        ``server_optimizer``.

    Raises:
      ValueError: k below 1 or above the cohort, another ``averaging``, local work for gradient averaging.
    """
    if averaging not in ("model", "gradient"):
        near = fl.checks.nearest(str(averaging), ("model", "gradient"))
        raise ValueError(f"averaging must be 'model' or 'gradient'; got {fl.checks.shown(averaging)}{near}")
    if averaging == "model":
        base = fedavg(model, client_optimizer, weighting=weighting, **local_work)
        return fl.compose(base, fl.transforms.clusters(k, spread=spread))
    server_optimizer = local_work.pop("server_optimizer", optax.sgd(1.0))
    if local_work:
        raise ValueError(f"gradient averaging makes one full-batch step; it takes no {', '.join(local_work)}")
    base = fedsgd(model, client_optimizer, weighting=weighting, server_optimizer=server_optimizer)
    return fl.compose(base, fl.transforms.clusters(k, divide_by="cohort", spread=spread))
