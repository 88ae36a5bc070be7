"""FedPA (Al-Shedivat et al., "Federated Learning via Posterior Averaging: A New Perspective and Practical
Algorithms", ICLR 2021, algorithms 1, 3 and 4).

After ``burn_in`` units of local work a client takes the mean iterate of each further unit as a sample of its
posterior (IASG, algorithm 4). With the samples' mean ``m`` and shrunk covariance ``S``, it sends
``S^-1 (m - w)`` in place of FedAvg's ``w_k - w``, and the server treats the mean as FedOpt does. Kept per client:
nothing. Travels: a model each way.

Deviations: ``S^-1 (m - w)`` is solved exactly in the space that the samples span (Woodbury's identity), which is
what the paper's recursion (appendix C) computes one sample at a time; the paper's first rounds of FedAvg are a run of
``fedavg`` whose ``params`` begin this one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def fedpa(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    samples: int,
    rho: Any,
    burn_in: int = 0,
    weighting: Any = "examples",
    **local_work: Any,
) -> fl.Round:
    """Clients upload what moves the global posterior's mode, estimated from samples of their own posteriors.

    Args:
      model: the model.
      client_optimizer: SGD of a constant rate, whose iterates are the samples.
      samples: the paper's l, posterior samples a round; a client holds them all at once.
      rho: shrinkage of the covariance, ``rho_l I + (1 - rho_l) cov`` with ``rho_l = 1/(1 + (l - 1) rho)``; 0 is
        the identity, with which the update is the mean sample's.
      burn_in: units of local work before the first sample.
      weighting: p_k of the objective.
      **local_work: as for :func:`algorithms.fedavg.fedavg`: ``epochs`` or ``steps`` of one unit, which makes one
        sample.

    Raises:
      ValueError: no samples, a negative ``rho`` or ``burn_in``.
    """
    fl.checks.positive(samples, "samples", integer=True)
    fl.checks.not_negative(rho, "rho")
    fl.checks.not_negative(burn_in, "burn_in", integer=True)
    fl.checks.absent(local_work, "keep_optimizer_state", "FedPA's samples start afresh every round")
    iterates = fl.recording(client_optimizer, lambda grads, params, updates: jax.tree.map(jnp.add, params, updates))
    base = fedavg(model, iterates, weighting=weighting, **local_work)

    def client_update(message, state, client, key, tilt=fl.identity):
        start, _ = ravel_pytree(message.params)
        rule = fl.optimizer_of_round(iterates, client.env.round if callable(iterates) else 0)

        def unit(i, carry):
            variables, opt_state, drawn, loss, steps = carry
            run = base.local(variables, client, jax.random.fold_in(key, i), tilt, fl.forget_recorded(opt_state))
            sample, _ = ravel_pytree(fl.mean_recorded(run))
            place = jnp.where(i < burn_in, samples, i - burn_in)  # outside: dropped
            drawn = drawn.at[place].set(sample.astype(drawn.dtype), mode="drop")
            return run.variables, run.opt_state, drawn, loss + run.loss, steps + run.steps

        empty = jnp.zeros((samples, start.size), jnp.promote_types(start.dtype, jnp.float32))
        carry = (message, rule.init(message.params), empty, jnp.float32(0), jnp.int32(0))
        units = burn_in + samples
        variables, opt_state, drawn, loss, steps = fl.client_loop(client, units, unit, carry)
        delta = posterior_delta(drawn, start, rho)
        change = fl.difference(variables, message)._replace(params=_like(delta, message.params))
        return fl.ClientOutput(
            upload=change,
            weight=fl.client_weight(weighting, client),
            metrics={"loss": loss / units},
            trained=fl.Trained(message, variables, steps, loss / units, opt_state),
        )

    return base._replace(client_update=client_update)


def posterior_delta(samples: jax.Array, start: jax.Array, rho: Any) -> jax.Array:
    """``S^-1 (mean - start)`` for the samples' shrunk covariance S; ``[l, d], [d] -> [d]`` at the cost of l^2 d."""
    mean, last = jnp.mean(samples, axis=0), samples.shape[0] - 1
    spread, delta = samples - mean[None], mean - start
    gram = jnp.eye(samples.shape[0]) + rho * spread @ spread.T
    inside = jnp.linalg.solve(gram, spread @ delta)
    return (1 + last * rho) * (delta - rho * spread.T @ inside)


def _like(flat: jax.Array, tree: Any) -> Any:
    """A flat vector in the shapes and types of a tree."""
    return ravel_pytree(tree)[1](flat.astype(ravel_pytree(tree)[0].dtype))
