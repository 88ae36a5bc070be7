"""A cohort's rows and states, from the host's memory or its files to the device and back."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab.client import ClientData
from fedjax_lab.data import FederatedData
from fedjax_lab.round import Env
from fedjax_lab.states import ClientStates


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CohortData(FederatedData):
    """A cohort's rows, its clients at their positions in the population.

    ``arrays`` hold the cohort's rows only and ``starts: int32[cohort]`` belong to ``members: int32[cohort]``, their
    positions, increasing; ``sizes`` and ``attrs`` are the population's.
    """

    members: Any = None

    @property
    def num_clients(self) -> int:
        return self.sizes.shape[0]

    def view(self, index: jax.Array, env: Any = (), present: jax.Array | bool = True) -> ClientData:
        whole = dataclasses.replace(self, starts=self.sizes)  # any array of the population, for the rest of a view
        seat = jnp.minimum(jnp.searchsorted(self.members, index), len(self.members) - 1)
        return dataclasses.replace(FederatedData.view(whole, index, env, present), first_row=self.starts[seat])


class Population(NamedTuple):
    """What a step needs of its data, made once: see :func:`population_of`."""

    data: FederatedData  # arrays on the host, the rest on the device
    starts: np.ndarray
    sizes: np.ndarray
    capacity: int  # rows of the largest possible cohort


class Fetched(NamedTuple):
    """A cohort's rows on the device; ``members`` as in :class:`CohortData`, ``inside`` for those that are clients."""

    data: CohortData
    members: np.ndarray
    inside: np.ndarray


def capacity(sizes: np.ndarray, cohort: int) -> int:
    """Rows of the largest possible cohort, at least one."""
    rows = int(np.partition(sizes, -cohort)[-cohort:].sum(dtype=np.int64))
    if rows >= 2**31:
        raise ValueError(f"a cohort of {cohort} clients may have {rows} rows, which 32 bits don't count: use a smaller")
    return max(rows, 1)


def population_of(data: FederatedData, cohort: int) -> Population:
    starts, sizes = np.asarray(data.starts), np.asarray(data.sizes)
    there = dataclasses.replace(
        data,
        arrays=jax.tree.map(np.asarray, data.arrays),
        starts=jnp.asarray(starts),
        sizes=jnp.asarray(sizes),
        attrs=jax.tree.map(jnp.asarray, data.attrs),
    )
    return Population(there, starts, sizes, capacity(sizes, cohort))


def fetch(source: Population, env: Env) -> Fetched:
    """Copy a cohort's rows to the device, in the order in which they lie on the host."""
    data = source.data
    members = np.sort(np.asarray(env.ids))
    inside = members < data.num_clients
    clients = members[inside]
    starts, sizes = source.starts[clients].astype(np.int64), source.sizes[clients].astype(np.int64)
    first = np.cumsum(sizes) - sizes
    count = int(sizes.sum())
    rows = np.arange(count) + np.repeat(starts - first, sizes)
    together = count > 0 and bool((starts[1:] == starts[:-1] + sizes[:-1]).all())

    def block(leaf):
        # A new one in every round: a device that shares the host's memory may still be reading the last.
        out = np.empty((source.capacity, *leaf.shape[1:]), leaf.dtype)
        if together:
            out[:count] = leaf[starts[0] : starts[0] + count]
        elif count:
            np.take(leaf, rows, axis=0, out=out[:count], mode="clip")
        out[count:] = 0
        return jax.device_put(out)

    seats = np.zeros(len(members), np.int32)
    seats[inside] = first
    cohort = CohortData(
        jax.tree.map(block, data.arrays), jax.device_put(seats), data.sizes, data.attrs,
        data.id_table, data.max_size, data.tile, jax.device_put(members),
    )  # fmt: skip
    return Fetched(cohort, members, inside)


def check_own(clients: ClientStates) -> None:
    for leaf in jax.tree.leaves(clients):
        if not (isinstance(leaf, np.ndarray) and leaf.flags.writeable):
            raise ValueError(
                "this state's clients were handed on to the round after it, which writes into the same arrays: keep "
                "state._replace(clients=jax.tree.map(np.array, state.clients)) of a state to step from twice"
            )


def pick(clients: ClientStates, fetched: Fetched) -> ClientStates:
    """The cohort's states, on the device."""
    rows = np.where(fetched.inside, fetched.members, 0)
    some = jax.tree.map(lambda t: jax.device_put(t[rows]), clients)
    return some._replace(members=fetched.data.members)


def put_back(clients: ClientStates, new: ClientStates, fetched: Fetched) -> ClientStates:
    """The population's states with the cohort's in their places, in the same memory."""
    rows = fetched.members[fetched.inside]

    def put(whole, some):
        mine = whole.view()
        mine[rows] = np.asarray(some)[fetched.inside]
        whole.flags.writeable = False
        return mine

    return jax.tree.map(put, clients, new._replace(members=()))
