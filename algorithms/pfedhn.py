"""pFedHN (Shamsian et al., "Personalized Federated Learning using Hypernetworks", ICML 2021, algorithm 1).

A client's parameters from its embedding, and the steps of the network and of the embedding, are
:func:`fedjax_lab.transforms.hypernetwork`; the client's K local steps and the change that it returns are FedAvg's. Kept
on the server: the network, and for each client an embedding. Travels: a model each way. Deviations: a round may have
several clients, whose gradients of the network are averaged; the embeddings' steps are plain.
"""

from typing import Any

import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def pfedhn(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    network: Any = None,
    embedding_size: int | None = None,
    server_optimizer: optax.GradientTransformation = optax.sgd(0.01),
    embedding_learning_rate: Any = 0.01,
    **local_work: Any,
) -> fl.Round:
    """A model for each client, made by a network on the server.

    Args:
      model: the model whose parameters the network makes.
      client_optimizer: the local optimizer.
      network, embedding_size, embedding_learning_rate: as for :func:`fedjax_lab.transforms.hypernetwork`.
      server_optimizer: of the network.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.
    """
    makes = fl.transforms.hypernetwork(
        network,
        embedding_size=embedding_size,
        server_optimizer=server_optimizer,
        embedding_learning_rate=embedding_learning_rate,
    )
    return fl.compose(fedavg(model, client_optimizer, **local_work), makes)
