"""FederatedData: who has what.

All clients' rows lie in flat arrays, with each client's first row and number of rows beside them, so
that no padding is ever stored. The object is a pytree: arrays, starts, sizes and attributes are its
leaves and may live on the host or on a device; the ids stay outside.
"""

import dataclasses
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab import checks, data_checks, devices
from fedjax_lab.client import ClientData
from fedjax_lab.description import Description, best_tile

PyTree = Any


class Ids:
    """The clients' ids, in order. Compared by identity, so that a million of them cost jit nothing."""

    __slots__ = ("_index", "values")

    def __init__(self, values: Sequence[Hashable]):
        self.values = values
        self._index: dict[Hashable, int] | None = None

    def index(self, client_id: Hashable) -> int:
        """The position of a client in the population. Raises KeyError for an unknown id."""
        if self._index is None:
            self._index = {_plain(v): i for i, v in enumerate(self.values)}
        try:
            return self._index[_plain(client_id)]
        except KeyError:
            alike = [v for v in map(_plain, self.values) if str(v) == str(client_id)]  # 10 for "10"
            near = f"; did you mean {alike[0]!r}?" if alike else checks.nearest(str(client_id), map(str, self.values))
            raise KeyError(f"no client {client_id!r} among {len(self.values)}{near}") from None


def _plain(value):
    return value.item() if isinstance(value, np.generic) else value


class Split(NamedTuple):
    """Two data sets over the same clients: ``train, test = data.split(0.8, seed=0)``."""

    train: "FederatedData"
    test: "FederatedData"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FederatedData:
    """All clients' examples. Build one with the ``from_...`` class methods.

    Attributes:
      arrays: pytree of arrays ``[rows, ...]``; client ``k`` owns rows
        ``starts[k] : starts[k] + sizes[k]``.
      starts: ``int32[clients]``.
      sizes: ``int32[clients]``, examples of each client; zero is allowed.
      attrs: dict of arrays ``[clients, ...]``, what is known of each client besides its examples.
    """

    arrays: PyTree
    starts: Any
    sizes: Any
    attrs: dict[str, Any]
    id_table: Ids = dataclasses.field(metadata={"static": True})
    max_size: int = dataclasses.field(metadata={"static": True})
    tile: int = dataclasses.field(metadata={"static": True})

    # ---- building ----

    @classmethod
    def from_clients(
        cls,
        clients: Mapping[Hashable, PyTree] | Iterable[tuple[Hashable, PyTree]],
        attrs: Mapping[str, Any] | None = None,
        *,
        validate: bool = True,
    ) -> "FederatedData":
        """From one pytree of arrays for each client, for instance ``{"ann": {"x": x, "y": y}}``.

        Args:
          clients: a mapping of ids to pytrees, or pairs. A client's arrays share their first axis,
            its examples; a client may have none.
          attrs: arrays ``[clients, ...]`` in the clients' order.
          validate: refuse NaN and infinite values. Without it, such a client is found during a round:
            it counts as absent and is counted in the metrics.

        Raises:
          ValueError: naming the client and the field: no clients, no examples at all, arrays of
            different lengths, shapes or fields that differ between clients, a duplicate id, non-finite
            values.
        """
        pairs = data_checks.client_pairs(clients)
        if not pairs:
            raise ValueError("a federated data set needs at least one client; got none")
        ids = [k for k, _ in pairs]
        checks.unique_ids(ids)
        for client, tree in pairs:
            data_checks.no_frame(tree, f"client {client!r}")
        trees = [jax.tree.map(np.asarray, tree) for _, tree in pairs]
        sizes = np.array([data_checks.client_rows(i, t) for i, t in zip(ids, trees, strict=True)])
        data_checks.same_structure(ids, trees)
        # Without the empty ones: np.array([]) has a type of its own, float64, which nobody meant.
        full = lambda leaves: [leaf for leaf in leaves if len(leaf)] or leaves
        arrays = jax.tree.map(lambda *leaves: np.concatenate(full(leaves)), *trees)
        return cls._build(arrays, sizes, ids, attrs, validate)

    @classmethod
    def from_arrays(
        cls,
        arrays: PyTree,
        client_ids: Any,
        attrs: Mapping[str, Any] | None = None,
        *,
        validate: bool = True,
    ) -> "FederatedData":
        """From flat arrays ``[rows, ...]`` and the id of each row's owner, ``[rows]``.

        Clients are ordered by id; the rows of a client keep their order. Raises as
        :meth:`from_clients` does.
        """
        data_checks.no_frame(arrays, "from_arrays")
        owners = np.asarray(client_ids)
        arrays = jax.tree.map(np.asarray, arrays)
        if owners.ndim != 1:
            raise ValueError(f"client_ids must be one id per row, shape [rows]; got {owners.shape}")
        if (owners.dtype == object and len({type(i) for i in owners}) > 1) or (owners != owners).any():
            raise ValueError("client_ids must be integers or strings, all of one kind, and none may be missing")
        data_checks.same_rows(arrays, len(owners))
        ids, inverse, sizes = np.unique(owners, return_inverse=True, return_counts=True)
        order = np.argsort(inverse, kind="stable")
        arrays = jax.tree.map(lambda a: a[order], arrays)
        return cls._build(arrays, sizes, [_plain(i) for i in ids], attrs, validate)

    @classmethod
    def from_assignment(cls, arrays: PyTree, assignment: np.ndarray, num_clients: int | None = None) -> "FederatedData":
        """From flat arrays and a client number for each row, as the partitioners give it.

        Args:
          arrays: pytree of arrays ``[rows, ...]``.
          assignment: ``int[rows]``; ``-1`` leaves a row out. Ids are ``0..num_clients-1``.
          num_clients: clients without a row exist too, and are empty; by default up to the largest.
        """
        assignment = np.asarray(assignment)
        data_checks.assignment(assignment, arrays, num_clients)
        count = int(assignment.max(initial=-1)) + 1 if num_clients is None else num_clients
        order = np.argsort(assignment, kind="stable")
        order = order[np.searchsorted(assignment[order], 0) :]
        sizes = np.bincount(assignment[order], minlength=count)
        arrays = jax.tree.map(lambda a: np.asarray(a)[order], arrays)
        return cls._build(arrays, sizes, range(count), None, True)

    @classmethod
    def from_table(cls, table: Any, client: str, features: Any, label: str) -> "FederatedData":
        """From a CSV or Parquet file, or a data frame, with a column that names each row's client.

        See :func:`fedjax_lab.tables.read_table`.
        """
        from fedjax_lab import tables

        if features is None:
            raise ValueError("features= names the columns that a model gets: a list of names, or one name")
        return tables.read_table(table, client=client, features=features, label=label)

    @classmethod
    def open(cls, folder: str | os.PathLike, *, verify: bool = False) -> "FederatedData":
        """A data set that :meth:`save` wrote, its rows read from disk when they are needed.

        :func:`fedjax_lab.synchronous` streams such a data set: only a cohort's rows are ever in memory.

        Args:
          folder: what ``save`` was given.
          verify: compare every byte with its SHA-256. Otherwise only files of up to 16 MiB are read through;
            of larger ones the length is compared.

        Raises:
          ValueError: a folder without a data set; a file that is missing, altered, cut short or of another
            format, with its name and its field's.
        """
        from fedjax_lab import stored

        return stored.open_folder(folder, verify)

    def save(self, folder: str | os.PathLike) -> Path:
        """Write the data set to a new folder, a ``.npy`` file for each field; returns the folder.

        Raises:
          ValueError: the folder holds something; ids that are neither integers nor strings; fields that lie in
            anything but dicts, lists and tuples.
        """
        from fedjax_lab import stored

        return stored.save(self, folder)

    @classmethod
    def _build(cls, arrays, sizes, ids, attrs, validate) -> "FederatedData":
        sizes = np.asarray(sizes, np.int64)
        if sizes.sum() == 0:
            raise ValueError(f"none of the {len(sizes)} clients has an example")
        if sizes.sum() >= 2**31:
            raise ValueError(f"{sizes.sum()} rows do not fit 32-bit row numbers; split the data set")
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        if attrs is not None and not isinstance(attrs, Mapping):
            raise ValueError(f"attrs must be a dict of arrays [clients, ...]; got {checks.shown(attrs)}")
        attrs = {name: np.asarray(value) for name, value in (attrs or {}).items()}
        for name, value in attrs.items():
            if value.ndim == 0 or len(value) != len(sizes):
                raise ValueError(f"attribute {name!r} must have one entry for each of {len(sizes)} clients")
            if data_checks.not_numeric(value):
                raise ValueError(f"attribute {name!r} has dtype {value.dtype}; attributes must be numeric or boolean")
        arrays = jax.tree_util.tree_map_with_path(
            lambda path, a: data_checks.device_dtype(a, checks.path_name(path)), arrays
        )
        data = cls(
            arrays, starts.astype(np.int32), sizes.astype(np.int32), attrs,
            Ids(ids), int(sizes.max()), best_tile(sizes),
        )  # fmt: skip
        if validate:
            data_checks.finite(data)
        return data

    # ---- reading ----

    @property
    def num_clients(self) -> int:
        return self.starts.shape[0]

    @property
    def num_examples(self) -> int:
        return int(np.sum(np.asarray(self.sizes)))

    @property
    def ids(self) -> Sequence[Hashable]:
        """The clients' ids, in the order of ``sizes``."""
        return self.id_table.values

    def client(self, client_id: Hashable) -> ClientData:
        """One client's data by its id, outside a round. Raises KeyError for an unknown id."""
        k = self.id_table.index(client_id)
        start, size = int(self.starts[k]), int(self.sizes[k])
        arrays = jax.tree.map(lambda a: a[start : start + size], self.arrays)
        attrs = {name: value[k] for name, value in self.attrs.items()}
        zero, count = jnp.int32(0), jnp.int32(size)
        return ClientData(
            arrays,
            zero,
            count,
            zero,
            count,
            jnp.int32(k),
            attrs,
            (),
            max_size=size,
            tile=max(size, 1),
        )

    def view(self, index: jax.Array, env: Any = (), present: jax.Array | bool = True) -> ClientData:
        """The data of the client at a (traced) position; empty if not ``present`` or out of range."""
        inside = (index >= 0) & (index < self.num_clients) & present
        k = jnp.clip(index, 0, self.num_clients - 1)
        at_k = lambda x: jax.lax.dynamic_index_in_dim(jnp.asarray(x), k, keepdims=False, allow_negative_indices=False)
        size = jnp.where(inside, at_k(self.sizes), 0)
        attrs = {name: at_k(value) for name, value in self.attrs.items()}
        start = at_k(self.starts)
        return ClientData(
            self.arrays, start, size, jnp.int32(0), size, index, attrs, env,
            max_size=self.max_size, tile=self.tile, population=self.num_clients,
        )  # fmt: skip

    def describe(self) -> Description:
        """Counts, sizes, fields and labels; ``print`` it for a table."""
        return Description.of(self)

    def __repr__(self) -> str:
        fields = ", ".join(
            f"{name}: {np.dtype(leaf.dtype)}{list(leaf.shape[1:])}" for name, leaf in checks.named_leaves(self.arrays)
        )
        return f"FederatedData({self.num_clients} clients, {self.num_examples} examples, {fields})"

    # ---- splitting ----

    def split(self, fraction: float | Sequence[float] = 0.8, seed: int = 0) -> tuple["FederatedData", ...]:
        """Divide each client's own examples at random, the clients staying the same.

        Args:
          fraction: the share of the first part, strictly between 0 and 1; or the shares of all parts,
            for instance ``(0.6, 0.2, 0.2)`` for train, validation and test.
          seed: which random division.

        Returns:
          ``Split(train, test)``, or a tuple with a data set for each share. A client of two or more
          examples has at least one in the first part and in the last; one of a single example keeps it
          in the first.
        """
        shares = checks.shares(fraction)
        sizes = np.asarray(self.sizes)
        owner = np.repeat(np.arange(self.num_clients), sizes)
        order = np.lexsort((checks.generator(seed).random(len(owner)), owner))
        rank = np.arange(len(owner)) - np.repeat(self._compact_starts(), sizes)
        bounds = np.floor(np.cumsum(shares)[:-1, None] * sizes + 0.5).astype(np.int64)
        bounds = np.clip(bounds, np.minimum(sizes, 1), np.maximum(sizes - 1, np.minimum(sizes, 1)))
        part = sum((rank >= np.repeat(b, sizes)).astype(np.int64) for b in bounds)
        rows = self.rows_of()
        parts = tuple(
            self._take(rows[np.sort(order[part == p])], np.bincount(owner[part == p], minlength=len(sizes)))
            for p in range(len(shares))
        )
        return Split(*parts) if len(parts) == 2 else parts

    def split_clients(self, fraction: float = 0.8, seed: int = 0) -> Split:
        """Divide the clients at random: those that take part and those never seen in training.

        Args:
          fraction: the share of clients in the first part, strictly between 0 and 1.
          seed: which random division.
        """
        if len(checks.shares(fraction)) > 2 or np.ndim(fraction):
            raise ValueError(f"split_clients takes the share of the first part alone; got {fraction}")
        if self.num_clients < 2:
            raise ValueError("split_clients needs at least two clients; this data set has one")
        order = checks.generator(seed).permutation(self.num_clients)
        cut = min(max(int(fraction * self.num_clients + 0.5), 1), self.num_clients - 1)
        return Split(self.select(np.sort(order[:cut])), self.select(np.sort(order[cut:])))

    def select(self, indices: Sequence[int] | np.ndarray) -> "FederatedData":
        """The clients at these positions, in this order, as a data set of their own.

        Raises:
          ValueError: what isn't a position, or a client twice.
        """
        indices = data_checks.positions(indices, self.num_clients)
        sizes = np.asarray(self.sizes)[indices]
        return self._take(self.rows_of(indices), sizes, indices)

    def on_device(self) -> "FederatedData":
        """The same data with every leaf a JAX array."""
        return jax.tree.map(devices.put, self)

    def _compact_starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)[:-1]])

    def rows_of(self, clients: np.ndarray | None = None) -> np.ndarray:
        """The row numbers of the given clients (all by default), client after client."""
        clients = np.arange(self.num_clients) if clients is None else clients
        starts, sizes = np.asarray(self.starts)[clients], np.asarray(self.sizes)[clients]
        before = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)[:-1]])
        return np.arange(int(sizes.sum())) + np.repeat(starts - before, sizes)

    def _take(self, rows: np.ndarray, sizes: np.ndarray, clients: np.ndarray | None = None) -> "FederatedData":
        """A data set of some rows of some clients (by default all), which keeps ids and attributes."""
        arrays = jax.tree.map(lambda a: np.asarray(a)[rows], self.arrays)
        starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)[:-1]]).astype(np.int32)
        attrs, ids = self.attrs, self.id_table
        if clients is not None:
            attrs = {name: np.asarray(value)[clients] for name, value in attrs.items()}
            ids = Ids([self.ids[k] for k in clients])
        sizes = np.asarray(sizes, np.int32)
        return FederatedData(arrays, starts, sizes, attrs, ids, int(sizes.max(initial=0)), best_tile(sizes))
