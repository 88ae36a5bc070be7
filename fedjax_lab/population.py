"""Means over a whole population, of which each round sees a cohort: control variates, dual variables."""

from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.aggregators import divide, per_population
from fedjax_lab.round import Aggregator


def population_weights(weighting: Any, data: Any) -> jax.Array:
    """:func:`fedjax_lab.client_weight` of every client, ``float32[population]``; 0 for those without examples.

    Args:
      weighting: ``"examples"``, ``"uniform"`` or an array ``float[population]``.
      data: the population, a FederatedData.

    Raises:
      ValueError: another word, or an array of another length.
    """
    checks.weighting(weighting, data.num_clients)
    sizes = jnp.asarray(data.sizes)
    if isinstance(weighting, str):
        weights = sizes if weighting == "examples" else jnp.ones(data.num_clients)
    else:
        weights = jnp.asarray(weighting, jnp.float32)
    return jnp.where(sizes > 0, weights, 0).astype(jnp.float32)


def mean_weight(weighting: Any, data: Any) -> jax.Array:
    """The mean of :func:`population_weights`, ``float32[]``.

    A client's weight divided by it is its ``p_k`` times the number of clients: 1 if all weigh the same.
    """
    return jnp.mean(population_weights(weighting, data))


def population_mean() -> Aggregator:
    """The mean over the population of weight times upload, where the absent count as zero uploads.

    Divided by :func:`mean_weight` it is what ``sum_k p_k u_k`` changes by if only the survivors' ``u_k`` change,
    and they upload the changes. The server can so keep a weighted sum over clients it rarely sees.
    """

    def lift(upload, weight, message, env):
        wide = lambda u: u.astype(jnp.promote_types(u.dtype, jnp.float32)) * weight
        return jax.tree.map(wide, upload), jnp.float32(1)

    return per_population(Aggregator(lift, lambda sums, env: divide(*sums)))
