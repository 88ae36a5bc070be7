"""FedEM (Marfoq, Neglia, Bellet, Kameni and Vidal, "Federated Multi-Task Learning under a Mixture of Distributions",
NeurIPS 2021, algorithm 1).

Every client's data come from a mixture of the same M distributions, in proportions of its own. The E step, the
client's weights, and the local solver with the responsibilities held are :func:`fedjax_lab.transforms.mixture`; the
server's means are FedAvg's, by examples. Kept per client: its M weights.
Travels: M models each way.

Deviation: the local solver makes its steps on all components at once.
"""

from typing import Any

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def fedem(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    M: int,
    spread: Any = 0.0,
    personalize_steps: int = 1,
    **local_work: Any,
) -> fl.Round:
    """FedAvg of a mixture of M components that each client weighs its own way.

    Args:
      model: of one component; its loss stands for a negative log likelihood.
      client_optimizer: the local optimizer.
      M: components; with one it is FedAvg.
      spread: see :func:`fedjax_lab.transforms.with_components`; linear models that start at zero need some.
      personalize_steps: see :func:`fedjax_lab.transforms.mixture`.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.
    """
    fl.checks.positive(M, "M", integer=True)
    components = fl.transforms.with_components(model, M, spread=spread)
    base = fedavg(components, client_optimizer, **local_work)
    return fl.compose(base, fl.transforms.mixture(personalize_steps=personalize_steps))
