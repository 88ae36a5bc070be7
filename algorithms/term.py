"""TERM (Li, Beirami, Sanjabi and Smith, "Tilted Empirical Risk Minimization", ICLR 2021; among groups and within
them, equation 9, its stochastic solver, algorithm 2; federated in "On Tilted Losses in Machine Learning", JMLR 2023).

The objective is ``1/t log sum_k p_k exp(t F_k)``, whose gradient is the clients' mean weighed by
``p_k exp(t F_k)``: t > 0 is fairer, t < 0 ignores outliers. Within a client its examples can be tilted likewise, by
``tau``. Kept per client: nothing. Travels: a model and one number down; a model and its weight up.

The number down is the server's estimate of the objective: weights are ``exp(t (F_k - estimate))``, as in algorithm 2,
so that nothing overflows; it cancels in the mean. Deviations: local steps as in FedAvg; within a client the weights
``exp(tau f_i)`` are normalised over the batch and not by a running estimate, so that a full batch is exact.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fedjax_lab as fl
from algorithms.fedavg import FedAvgState, fedavg

LARGEST = 60.0  # exponent of a weight, e^60 = 1e26: what is beyond is cut, and sums stay finite


class TERMState(NamedTuple):
    """FedAvg's state, and the last round's tilted loss ``estimate: float32[]``."""

    inner: FedAvgState
    estimate: jax.Array


class TERMMessage(NamedTuple):
    """The model and the server's ``estimate``."""

    inner: fl.Variables
    estimate: jax.Array


def term(
    model: fl.Model, client_optimizer: fl.ClientOptimizer, *, t: Any, tau: Any = 0.0, **local_work: Any
) -> fl.Round:
    """FedAvg weighed by the exponential of the clients' losses.

    Args:
      model: the model.
      client_optimizer: the local optimizer.
      t: tilt among clients; 0 is FedAvg, large is the worst client's loss, negative suppresses the worst.
      tau: tilt among a client's examples.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.

    Raises:
      ValueError: a tilt that isn't finite.
    """
    fl.checks.finite(t, "t")
    fl.checks.finite(tau, "tau")
    inside = model if isinstance(tau, int | float) and tau == 0 else tilted_examples(model, tau)
    base = fedavg(inside, client_optimizer, **local_work)

    def client_update(message, state, client, key, tilt=fl.identity):
        out = base.client_update(message.inner, state, client, key, tilt)
        loss = _tilted_loss(model, message.inner, client, jax.random.fold_in(key, 0xF), tau)
        weight = jnp.exp(jnp.clip(t * (loss - message.estimate), -LARGEST, LARGEST))
        return out._replace(upload=(out.upload, weight, loss), bytes_up=None)

    mean = fl.aggregators.mean()

    def lift(upload, weight, message, env):
        update, tilted, loss = upload
        return (mean.lift(update, weight * tilted, message, env), mean.lift((tilted, loss), weight, message, env)), ()

    def finish(sums, env):
        update, losses = sums[0]
        return mean.finish(update, env), mean.finish(losses, env)

    def server_update(server, aggregate, key):
        update, (tilted, loss) = aggregate
        inner, metrics = base.server_update(server.inner, update, key)
        estimate = jnp.where(t == 0, loss, server.estimate + jnp.log(tilted) / jnp.where(t == 0, 1, t))
        return TERMState(inner, estimate), metrics | {"tilted_loss": estimate}

    return fl.nested(
        base,
        init=lambda key, data, params=None: TERMState(base.init(key, data, params), jnp.float32(0)),
        broadcast=lambda server, state, client, key: TERMMessage(server.inner.variables, server.estimate),
        client_update=client_update,
        aggregate=fl.Aggregator(lift, finish),
        server_update=server_update,
        loss=model.loss,
    )


def tilted_examples(model: fl.Model, tau: Any) -> fl.Model:
    """The model whose mean loss has the gradient of ``1/tau log mean_i exp(tau f_i)`` over a batch."""

    def loss(params, model_state, batch, mask, key, train):
        losses, model_state = model.loss(params, model_state, batch, mask, key, train)
        weights = jax.nn.softmax(jnp.where(mask, tau * losses, -jnp.inf)) * jnp.sum(mask)
        return jax.lax.stop_gradient(jnp.where(mask, weights, 0)) * losses, model_state

    return fl.as_model(model)._replace(loss=loss)


def _tilted_loss(model: fl.Model, variables: fl.Variables, client: fl.ClientData, key: jax.Array, tau: Any):
    """``1/tau log mean_i exp(tau f_i)`` over a client's examples, its mean loss for tau = 0; ``float32[]``."""
    if isinstance(tau, int | float) and tau == 0:
        return fl.mean_loss(model.loss, variables, client, key)

    def add(carry, batch, mask, positions, _):
        total, plain = carry
        losses = model.loss(variables.params, variables.model_state, batch, mask, key, False)[0].astype(jnp.float32)
        total = jnp.logaddexp(total, jax.nn.logsumexp(jnp.where(mask, tau * losses, -jnp.inf)))
        return total, plain + jnp.sum(jnp.where(mask, losses, 0))

    total, plain = client.fold(add, (jnp.float32(-jnp.inf), jnp.float32(0)))
    count = jnp.maximum(client.size, 1)
    tilted = (total - jnp.log(count)) / jnp.where(tau == 0, 1, tau)
    return jnp.where(client.size == 0, 0, jnp.where(tau == 0, plain / count, tilted))
