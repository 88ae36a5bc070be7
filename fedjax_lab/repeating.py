"""The same cohort for several rounds in a row."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.sampling import Sampler, check_sampler


class RepeatedState(NamedTuple):
    """The inner sampler's state, its last cohort, and how many rounds that has served already."""

    inner: Any
    ids: jax.Array
    present: jax.Array
    served: jax.Array


def repeated(sampler: Sampler, rounds: int = 2) -> Sampler:
    """Draw a cohort and keep it for several rounds.

    For algorithms that speak with the same clients more than once
    (:func:`fedjax_lab.transforms.gradient_rounds`). Dropouts go outside: ``fl.dropout(fl.repeated(...), 0.1)``.

    Args:
      sampler: draws the cohorts.
      rounds: how many rounds each serves.
    """
    check_sampler(sampler)
    checks.positive(rounds, "rounds", integer=True)

    def init(data):
        inner, key = sampler.init(data), jax.random.key(0)
        probe = lambda ids: jnp.zeros(ids.shape, jnp.float32)
        ids, present, _ = jax.eval_shape(lambda: sampler.sample(inner, key, data, probe))
        return RepeatedState(inner, jnp.zeros(ids.shape, ids.dtype), jnp.zeros(present.shape, bool), jnp.int32(0))

    def sample(state, key, data, probe):
        drawn = sampler.sample(state.inner, key, data, probe)
        again = state.served > 0
        keep = lambda old, new: jnp.where(again, old, new)
        ids, present = keep(state.ids, drawn[0]), keep(state.present, drawn[1])
        inner = jax.tree.map(keep, state.inner, drawn[2])
        return ids, present, RepeatedState(inner, ids, present, (state.served + 1) % rounds)

    def update(state, ids, ok, metrics):
        return state._replace(inner=sampler.update(state.inner, ids, ok, metrics))

    return Sampler(init, sample, update)
