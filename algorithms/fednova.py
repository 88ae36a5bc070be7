"""FedNova (Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization",
NeurIPS 2020, section 4).

A client's update is ``-eta sum_t a_t g_t`` for weights ``a`` that its optimizer and its number of steps determine.
Each sends its normalised update ``d_k``, the one above divided by ``eta |a_k|_1``, and the server moves by
``tau_eff sum_k p_k d_k`` with ``tau_eff = sum_k p_k |a_k|_1``. Kept per client: nothing. Travels: a model down; up
a model and one number for each of its leaves.

Deviation: ``eta |a_k|_1`` is not taken from the paper's formulas but measured, as the way that the optimizer goes on
a gradient of 1. That is the same for SGD, momentum and a proximal term, and holds also for Nesterov's momentum,
learning-rate schedules, and momentum with a proximal term at once. For optimizers that aren't linear in their
gradients (Adam) it counts the steps as that optimizer sizes them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def fednova(model: fl.Model, client_optimizer: fl.ClientOptimizer, *, mu: Any = 0.0, **local_work: Any) -> fl.Round:
    """FedAvg whose updates are normalised by the work behind them, so that unequal local work biases nothing.

    Args:
      model: the model.
      client_optimizer: SGD, also with momentum; it starts afresh every round.
      mu: strength of a proximal term in the local objective, as in FedProx.
      **local_work: as for :func:`algorithms.fedavg.fedavg`; the paper's server momentum is a ``server_optimizer``.
    """
    fl.checks.absent(local_work, "keep_optimizer_state", "FedNova counts what the steps of one round add up to")
    base = fl.compose(fedavg(model, client_optimizer, **local_work), fl.transforms.proximal(mu))

    def client_update(message, state, client, key, tilt=fl.identity):
        out = base.client_update(message, state, client, key, tilt)
        rule = fl.optimizer_of_round(client_optimizer, client.env.round if callable(client_optimizer) else 0)
        way = reach(rule, mu, out.upload.params, out.trained.steps)
        normalised = jax.tree.map(lambda u, a: (u / jnp.where(a == 0, 1, a)).astype(u.dtype), out.upload.params, way)
        return out._replace(upload=(out.upload._replace(params=normalised), way), bytes_up=None)

    def server_update(server, aggregate, key):
        update, tau_eff = aggregate
        moved = jax.tree.map(lambda d, t: t * d, update.params, tau_eff)
        return base.server_update(server, update._replace(params=moved), key)

    return base._replace(
        client_update=client_update,
        aggregate=fl.aggregators.pair(base.aggregate, fl.aggregators.mean()),
        server_update=server_update,
    )


def reach(optimizer: optax.GradientTransformation, mu: Any, like: Any, steps: jax.Array) -> Any:
    """``eta |a|_1`` of a number of steps for each leaf of ``like``: how far they lead on a gradient of 1."""
    rule = optax.with_extra_args_support(optimizer)
    start = jax.tree.map(lambda leaf: jnp.float32(0), like)

    def step(_, carry):
        w, state = carry
        gradient = jax.tree.map(lambda x: 1 + mu * x, w)
        updates, state = rule.update(gradient, state, w, value=jnp.float32(0))
        return optax.apply_updates(w, updates), state

    return jax.tree.map(jnp.negative, jax.lax.fori_loop(0, steps, step, (start, rule.init(start)))[0])
