"""q-FedAvg (Li et al., "Fair Resource Allocation in Federated Learning", ICLR 2020, algorithm 2).

The objective is ``sum_k p_k F_k^(q+1) / (q+1)``. With ``L`` an estimate of the Lipschitz constant of the gradients
and ``dw_k = L (w_t - w_k)`` the update of client k, it sends ``D_k = F_k^q dw_k`` and
``h_k = q F_k^(q-1) |dw_k|^2 + L F_k^q``, and the server moves by ``- sum_k D_k / sum_k h_k``. Kept per client:
nothing. Travels: a model down; a model and one number up.

Deviations: the sums weigh p_k where the paper samples by it; ``F_k``, the loss at the model received, is raised to
at least 1e-10, as in the authors' code, so that ``q < 1`` is defined for a client that fits perfectly; batch-norm
statistics are averaged by p_k.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def q_fedavg(model: fl.Model, client_optimizer: fl.ClientOptimizer, *, q: Any, L: Any, **local_work: Any) -> fl.Round:
    """FedAvg that helps clients of larger loss more, for accuracies that differ less between clients.

    Args:
      model: the model, whose losses must not be negative.
      client_optimizer: the local optimizer.
      q: fairness; 0 is FedAvg, larger is fairer.
      L: estimate of the gradients' Lipschitz constant; one over the best learning rate for ``q = 0``.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.

    Raises:
      ValueError: a negative ``q``, an ``L`` that isn't positive.
    """
    fl.checks.not_negative(q, "q")
    fl.checks.positive(L, "L")
    base = fedavg(model, client_optimizer, **local_work)

    def client_update(message, state, client, key, tilt=fl.identity):
        out = base.client_update(message, state, client, key, tilt)
        loss = jnp.maximum(fl.mean_loss(model.loss, message, client, jax.random.fold_in(key, 0xF)), 1e-10)
        gradient = jax.tree.map(lambda u: -L * u, out.upload.params)
        h = q * loss ** (q - 1) * optax.tree.norm(gradient, squared=True) + L * loss**q
        change = jax.tree.map(lambda g: (-(loss**q) * g).astype(g.dtype), gradient)
        return out._replace(upload=(out.upload._replace(params=change), h), bytes_up=None)

    mean = fl.aggregators.mean()

    def finish(sums, env):
        update, h = mean.finish(sums, env)
        return update._replace(params=fl.aggregators.divide(update.params, h))

    return base._replace(client_update=client_update, aggregate=mean._replace(finish=finish))
