"""Divide and conquer (Zhang, Duchi and Wainwright, "Communication-Efficient Algorithms for Statistical Optimization",
JMLR 2013, algorithms AVGM, section 2.2, and SAVGM, section 2.3): each client minimises its own loss, the minimisers are
averaged, once.

Averaging takes away variance and not bias. SAVGM estimates the bias from a second fit, to a part ``r`` of the client's
data, and subtracts it: ``(theta_1 - r theta_2) / (1 - r)``. Both are linear, so that the client sends that combination
alone. Kept per client: nothing. Travels: a model each way, in one round; more rounds go on from the mean.
"""

from typing import Any

import jax
import jax.numpy as jnp

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def divide_and_conquer(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    r: float | None = None,
    weighting: Any = "uniform",
    **local_work: Any,
) -> fl.Round:
    """The mean of the clients' own minimisers, by default without, with ``r`` with a correction of their bias.

    It is FedAvg with one round of so much local work that every client gets to its minimiser.

    Args:
      model: the model.
      client_optimizer: the local optimizer.
      r: the part of a client's data that the second fit is made to, between 0 and 1; ``None``: there is none (AVGM).
      weighting: of the mean; the paper's clients all have as much data.
      **local_work: as for :func:`algorithms.fedavg.fedavg`: enough of it.

    Raises:
      ValueError: an ``r`` that isn't between 0 and 1.
    """
    base = fedavg(model, client_optimizer, weighting=weighting, **local_work)
    if r is None:
        return base
    fl.checks.positive(r, "r")
    if not r < 1:
        raise ValueError(f"r must be a part of the client's data, below 1; got {r!r}")
    local = base.local
    assert local is not None

    def client_update(message, state, client, key, tilt=fl.identity):
        out = base.client_update(message, state, client, key, tilt=tilt)
        part, _ = client.split(r)
        second = local(message, part, jax.random.fold_in(key, 0xDC), tilt)
        again = fl.difference(second.variables, message)
        share = part.size / jnp.maximum(client.size, 1)
        # A client of one example has no smaller part.
        correct = lambda a, b: jnp.where(share < 1, (a - share * b) / jnp.maximum(1 - share, 1e-6), a).astype(a.dtype)
        return out._replace(upload=jax.tree.map(correct, out.upload, again))

    return base._replace(client_update=client_update)
