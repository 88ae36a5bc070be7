"""Process: a Round with a population and a schedule, as two pure functions."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_lab.checks import shown
from fedjax_lab.data import FederatedData
from fedjax_lab.models.base import Variables
from fedjax_lab.round import Round
from fedjax_lab.states import ClientStates

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class HostStep:
    """A step that reads from the host, and so can't be traced: :func:`fedjax_lab.streamed`.

    Attributes:
      call: ``(state, data) -> (state, metrics)``.
      program: ``()`` -> the text of what it computes on the device.
    """

    call: Callable[[PyTree, FederatedData], tuple[PyTree, dict[str, jax.Array]]]
    program: Callable[[], str]

    def __call__(self, state: PyTree, data: FederatedData) -> tuple[PyTree, dict[str, jax.Array]]:
        return self.call(state, data)


class Process(NamedTuple):
    """A federated computation that can be stepped.

    Attributes:
      init: ``(key, params=None) -> state``, one pytree that holds everything.
      step: ``(state, data) -> (state, metrics)``, one round; jitted, and a pure function that ``lax.scan``
        and ``vmap`` take as well. Its attribute ``abreast``, where it has one, is the same step for ``vmap`` over
        states whose cohorts share their lanes. A :class:`HostStep` where the data don't fit the device.
      data: the population, on the device; an argument of the step rather than a part of it.
      params: ``(state) -> params`` of the server's model.
      variables: ``(state) -> Variables``, its params and model state.
      server: ``(state) -> ServerState``, for evaluation.
      clients: ``(state) -> ClientStates``, for evaluation.
      round: what a round computes.
      mesh: the devices that share a cohort out; ``None`` for one.
      specs: how the data lie over them (:class:`fedjax_lab.sharding.Placed`).
    """

    init: Callable[..., PyTree]
    step: Callable[[PyTree, FederatedData], tuple[PyTree, dict[str, jax.Array]]]
    data: FederatedData
    params: Callable[[PyTree], PyTree]
    variables: Callable[[PyTree], Variables]
    server: Callable[[PyTree], PyTree]
    clients: Callable[[PyTree], ClientStates]
    round: Round
    mesh: Mesh | None = None
    specs: PyTree = P()


def typed_key(key: Any) -> jax.Array:
    """A typed PRNG key from one, from an old-style ``uint32[2]``, or from an integer seed."""
    kind = getattr(key, "dtype", None)
    if kind is not None and jax.numpy.issubdtype(kind, jax.dtypes.prng_key):
        return key
    if kind is not None and key.ndim:
        return jax.random.wrap_key_data(key)
    whole = isinstance(key, int) if kind is None else jax.numpy.issubdtype(kind, jax.numpy.integer)
    if not whole or isinstance(key, bool):
        raise TypeError(f"a process begins from a PRNG key, jax.random.key(0), or an integer seed; got {shown(key)}")
    return jax.random.key(key)
