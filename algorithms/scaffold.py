"""SCAFFOLD (Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
algorithm 1).

Line 10, the corrected step, line 12, the new control variate, line 16 and 17, the server's two means, are
:func:`fedjax_lab.transforms.control_variates`. Kept per client: its control variate, a model. Travels: two models
down, two up. Deviations: with unequal weights both means are weighted, so that the fixed point is the minimiser
of the weighted objective (the paper's is ``weighting="uniform"``); for optimizers other than plain SGD, option II's
``(x - y)/(K eta_l)`` is the mean of the gradients that the steps took, which for SGD is the same.
"""

from typing import Any

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def scaffold(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    option: str = "II",
    weighting: Any = "examples",
    **local_work: Any,
) -> fl.Round:
    """FedAvg whose local steps are corrected by control variates, against client drift.

    Args:
      model: the model.
      client_optimizer: the local optimizer; the paper's is SGD of rate eta_l.
      option: line 12's ``"I"`` (a pass over all data at the received model) or ``"II"`` (the steps' mean gradient).
      weighting: p_k of the objective; ``"uniform"`` is the paper's.
      **local_work: as for :func:`algorithms.fedavg.fedavg`; the paper's eta_g is
        ``server_optimizer=optax.sgd(eta_g)``.
    """
    rate = fl.plain_rate(client_optimizer)
    optimizer = client_optimizer if rate else fl.recording(client_optimizer)
    base = fedavg(model, optimizer, weighting=weighting, **local_work)
    return fl.compose(base, fl.transforms.control_variates(option, weighting, rate))
