"""Where a population lies: whole on one device or on each, or every device its own clients."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedjax_lab import devices, hosts
from fedjax_lab.data import FederatedData
from fedjax_lab.devices import AXIS

PyTree = Any


class Placed(NamedTuple):
    """A population on devices.

    Attributes:
      data: its arrays; where every device has its own clients, ``starts`` count from the device's first row.
      specs: how it is laid out over the mesh, for ``shard_map``.
      apart: whether every device has the rows of its own clients only: of ``n`` clients on ``d`` devices, the first
        ``ceil(n / d)`` lie on the first, and so on.
    """

    data: FederatedData
    specs: PyTree
    apart: bool


def placed(data: FederatedData, mesh: Mesh | None) -> Placed:
    """Bring a population to its devices: apart where there are several processes, else whole."""
    if mesh is None:
        return Placed(data.on_device(), P(), False)
    if not hosts.several():
        whole = devices.replicated(mesh)
        return Placed(jax.tree.map(lambda leaf: devices.put(leaf, whole), data), P(), False)
    return _apart(data, mesh)


def _apart(data: FederatedData, mesh: Mesh) -> Placed:
    """Every device its own clients' rows; a process reads only those of its own devices."""
    count, clients = mesh.shape[AXIS], data.num_clients
    each = clients_each(clients, count)
    sizes = np.asarray(data.sizes)
    blocks = [np.arange(d * each, min((d + 1) * each, clients)) for d in range(count)]
    rows = max(max((int(sizes[b].sum()) for b in blocks), default=1), 1)
    starts = np.concatenate([np.cumsum(sizes[b]) - sizes[b] for b in blocks]).astype(np.int32)

    def spread(leaf):
        def of_device(index):
            block = blocks[(index[0].start or 0) // rows]
            own = np.asarray(leaf[_slice_or_rows(data, block)])
            return np.concatenate([own, np.zeros((rows - len(own), *leaf.shape[1:]), leaf.dtype)])

        shape = (count * rows, *leaf.shape[1:])
        return jax.make_array_from_callback(shape, devices.by_client(mesh), of_device)

    everywhere = lambda leaf: hosts.put(np.asarray(leaf), mesh, P())
    there = dataclasses.replace(
        data,
        arrays=jax.tree.map(spread, data.arrays),
        starts=everywhere(starts),
        sizes=everywhere(sizes),
        attrs=jax.tree.map(everywhere, data.attrs),
    )
    specs = dataclasses.replace(
        jax.tree.map(lambda _: P(), there), arrays=jax.tree.map(lambda _: P(AXIS), there.arrays)
    )
    return Placed(there, specs, True)


def clients_each(clients: int, count: int) -> int:
    """How many clients, and rows of their states, each of ``count`` devices has."""
    return -(-clients // count)


def _slice_or_rows(data: FederatedData, clients: np.ndarray) -> Any:
    """The clients' rows: as a slice where they lie together, so that a file is read where it is."""
    rows = data.rows_of(clients)
    together = len(rows) and bool((np.diff(rows) == 1).all())
    return slice(int(rows[0]), int(rows[-1]) + 1) if together else rows
