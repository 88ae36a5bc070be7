"""Samplers: who takes part in a round."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fedjax_lab import checks, shuffle
from fedjax_lab.data import FederatedData
from fedjax_lab.local import straggles

PyTree = Any


class Sampler(NamedTuple):
    """How a server chooses a cohort.

    Attributes:
      init: ``(data) -> state``. Raises ValueError when the population doesn't suit.
      sample: ``(state, key, data, probe) -> (ids: int32[cohort], present: bool[cohort], state)``. Ids are
        distinct positions in the population; ``num_clients`` marks an empty slot. Present are those who
        will answer; ``key`` is the round's public key (``Env.key``). ``probe(ids) -> float32[n]`` runs the
        Round's loss for candidates; its bytes count.
      update: ``(state, ids, ok, metrics) -> state`` after the round: who survived, and each slot's metrics.
    """

    init: Callable[[FederatedData], PyTree]
    sample: Callable[..., tuple[jax.Array, jax.Array, PyTree]]
    update: Callable[..., PyTree] = lambda state, ids, ok, metrics: state


def uniform(cohort_size: int) -> Sampler:
    """``cohort_size`` distinct clients, uniformly at random; costs the same for any population."""
    checks.positive(cohort_size, "cohort_size", integer=True)

    def init(data):
        if cohort_size > data.num_clients:
            raise ValueError(f"cohort_size {cohort_size} is larger than the population of {data.num_clients} clients")
        return ()

    def sample(state, key, data, probe):
        ids = shuffle.permute(jnp.arange(cohort_size), data.num_clients, shuffle.seed_of(key))
        return ids, jnp.ones(cohort_size, bool), state

    return Sampler(init, sample)


def everyone() -> Sampler:
    """All clients, in every round (full participation, cross-silo)."""

    def sample(state, key, data, probe):
        return jnp.arange(data.num_clients), jnp.ones(data.num_clients, bool), state

    return Sampler(lambda data: (), sample)


def fixed(ids: Sequence[int] | Sequence[str] | np.ndarray) -> Sampler:
    """The same clients in every round.

    Args:
      ids: distinct positions in the population, integers whatever the clients' own ids are; or ids that are text,
        as ``data.ids`` has them.
    """
    ids = np.asarray(ids)
    if ids.dtype == object and all(isinstance(client, str) for client in ids.flat):
        ids = ids.astype(str)  # text of pandas
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iuU":
        raise ValueError(
            f"fixed() needs a non-empty list of clients: positions (integers), or ids that are text; got {ids!r}"
        )
    checks.unique_ids(ids.tolist())

    def positions(data) -> np.ndarray:
        if ids.dtype.kind != "U":
            return ids
        try:
            return np.array([data.id_table.index(client) for client in ids.tolist()])
        except KeyError as error:
            raise ValueError(f"fixed(): {error.args[0]}") from None

    def init(data):
        found = positions(data)
        outside = found[(found < 0) | (found >= data.num_clients)]
        if outside.size:
            raise ValueError(f"client position {outside[0]} is outside the population 0..{data.num_clients - 1}")
        return ()

    def sample(state, key, data, probe):
        return jnp.asarray(positions(data), jnp.int32), jnp.ones(len(ids), bool), state

    return Sampler(init, sample)


def weighted(cohort_size: int, weights: Any = None) -> Sampler:
    """``cohort_size`` distinct clients drawn one after the other with probability by weight.

    Args:
      cohort_size: clients a round.
      weights: ``float[population]``, by default the number of examples. Costs the population each
        round (Gumbel top-k), unlike :func:`uniform`.
    """
    checks.positive(cohort_size, "cohort_size", integer=True)

    def table(data):
        return jnp.asarray(data.sizes if weights is None else weights, jnp.float32)

    def init(data):
        if weights is None and isinstance(data.sizes, Tracer):  # looked at before, when the process was built
            return ()
        w = np.asarray(data.sizes if weights is None else weights)
        checks.weights(w, "weights", data.num_clients)
        if cohort_size > (w > 0).sum():
            raise ValueError(f"cohort_size {cohort_size} exceeds the {(w > 0).sum()} clients of positive weight")
        return ()

    def sample(state, key, data, probe):
        scores = jnp.log(table(data)) + jax.random.gumbel(key, (data.num_clients,))
        return jax.lax.top_k(scores, cohort_size)[1], jnp.ones(cohort_size, bool), state

    return Sampler(init, sample)


def dropout(sampler: Sampler, rate: float) -> Sampler:
    """Each invited client fails to answer with probability ``rate``, independently in every round."""
    checks.probability(rate, "rate")
    check_sampler(sampler)

    def sample(state, key, data, probe):
        ids, present, state = sampler.sample(state, key, data, probe)
        stays = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, 7), i)))(ids)
        return ids, present & (stays >= rate), state

    return sampler._replace(sample=sample)


def drop_stragglers(sampler: Sampler, fraction: float) -> Sampler:
    """Leave out the clients that straggle, as FedAvg does (Li et al. 2020, section 5.2).

    They are the ones that :func:`fedjax_lab.partial_work` lets do part of their work, so that both can be
    compared in the same rounds.
    """
    checks.probability(fraction, "fraction")
    check_sampler(sampler)

    def sample(state, key, data, probe):
        ids, present, state = sampler.sample(state, key, data, probe)
        return ids, present & ~jax.vmap(lambda i: straggles(key, i, fraction))(ids), state

    return sampler._replace(sample=sample)


def check_sampler(sampler: object) -> None:
    """Refuse what isn't a Sampler: a cohort size, or a function that makes one."""
    if not isinstance(sampler, Sampler):
        raise ValueError(f"sampler must be a Sampler, such as fl.uniform(10); got {checks.shown(sampler)}")
