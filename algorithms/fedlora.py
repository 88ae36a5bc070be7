"""Federated LoRA (adapters: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1;
averaged by FedAvg as in Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning" (FedIT),
2023).

Clients train low-rank adapters beside the kernels of a model that all have: :func:`fedjax_lab.transforms.adapters`.
Kept per client: nothing. Travels: the adapters each way. The mean of products is not the product of means: what the
server averages are the factors, as FedIT does.
"""

from collections.abc import Callable
from typing import Any

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def fedlora(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    base: Any,
    rank: int = 4,
    alpha: Any = None,
    predicate: Callable[[str], bool] | None = None,
    whole: Callable[[str], bool] = lambda path: False,
    **local_work: Any,
) -> fl.Round:
    """FedAvg of adapters; what the process gives as its parameters is the whole model.

    Args:
      model: the model.
      client_optimizer: the local optimizer.
      base: its parameters, which all clients have.
      rank, alpha, predicate, whole: as for :func:`fedjax_lab.transforms.adapters`.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.
    """
    lora = fl.transforms.adapters(model, base, rank=rank, alpha=alpha, predicate=predicate, whole=whole)
    return fl.compose(fedavg(lora.model, client_optimizer, **local_work), lora.merged)
