"""q-FedSGD (Li et al., "Fair Resource Allocation in Federated Learning", ICLR 2020, algorithm 1).

As :mod:`algorithms.q_fedavg` with ``dw_k`` the gradient of all the client's data, which one full-batch step of rate
``1/L`` gives. Kept per client: nothing. Travels: a model down; a gradient and one number up.
"""

from typing import Any

import optax

import fedjax_lab as fl
from algorithms.q_fedavg import q_fedavg


def q_fedsgd(model: fl.Model, *, q: Any, L: Any, **options: Any) -> fl.Round:
    """Gradient descent on ``sum_k p_k F_k^(q+1) / (q+1)`` with a step size that follows from ``L``.

    Args:
      model: the model, whose losses must not be negative.
      q: fairness; 0 is gradient descent of rate ``1/L``.
      L: estimate of the gradients' Lipschitz constant.
      **options: ``weighting`` and ``server_optimizer`` of :func:`algorithms.fedavg.fedavg`.
    """
    fl.checks.positive(L, "L")
    return q_fedavg(model, optax.sgd(1 / L), q=q, L=L, steps=1, batch_size=None, **options)
