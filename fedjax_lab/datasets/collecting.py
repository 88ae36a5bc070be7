"""From readers of published files to FederatedData: which clients, in what order, what checked."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_lab import checks
from fedjax_lab.data import FederatedData
from fedjax_lab.datasets import download, fedjax_sqlite, published, sqlite_reading, tff_sqlite
from fedjax_lab.datasets.tf_example import Field

Clients = Any  # None | int | Sequence[str] | Callable[[Sequence[str]], Sequence[str]] | mapping
_DTYPES = {"float": np.float32, "int": np.int64}


class Task(NamedTuple):
    """What is read of a client, and what becomes of it.

    Attributes:
      fields: the fields in the file.
      decode: ``{field: values [rows, ...]} -> {name: array [rows, ...]}``; raises ValueError for
        values that can't be right.
      limit: at most so many examples of each client, the first ones.
    """

    fields: Mapping[str, Field]
    decode: Callable[[dict[str, Any]], dict[str, np.ndarray]]
    limit: int | None = None


def random_clients(count: int, seed: int = 0) -> Callable[[Sequence[str]], list[str]]:
    """``clients=random_clients(1000, seed=0)``: so many clients, drawn uniformly, ordered by id."""

    def choose(ids: Sequence[str]) -> list[str]:
        if not 0 < count <= len(ids):
            raise ValueError(f"random_clients({count}): there are {len(ids)} clients")
        drawn = checks.generator(seed).choice(len(ids), count, replace=False)
        return [ids[int(k)] for k in np.sort(drawn)]

    return choose


def same_clients(
    data: published.Published,
    task: Task,
    data_dir: str | os.PathLike | None,
    clients: Clients,
    source: str | None,
) -> dict[str, FederatedData]:
    """Every split over the same ids in the same order; a client absent from one is empty there."""
    with _readers(data, task, data_dir, source) as readers:
        everyone = sorted(set().union(*(reader.ids for reader in readers.values())))
        chosen = choose(clients, everyone, data.title)
        return {split: _collect(reader, chosen, task) for split, reader in readers.items()}


def own_clients(
    data: published.Published,
    task: Task,
    data_dir: str | os.PathLike | None,
    clients: Clients,
    source: str | None,
) -> dict[str, FederatedData]:
    """Every split over its own clients; a list of ids goes to the splits that know them."""
    with _readers(data, task, data_dir, source) as readers:
        if isinstance(clients, Mapping):
            _same_names(clients, readers)
            chosen = {s: choose(clients[s], r.ids, f"{data.title}, {s}") for s, r in readers.items()}
        elif isinstance(clients, Sequence):
            everyone = sorted(set().union(*(reader.ids for reader in readers.values())))
            listed = choose(clients, everyone, data.title)
            known = {split: set(reader.ids) for split, reader in readers.items()}
            chosen = {split: [c for c in listed if c in known[split]] for split in readers}
            empty = [split for split, ids in chosen.items() if not ids]
            if empty:
                raise ValueError(
                    f"{data.title}: none of these clients is in {', '.join(empty)}, which has "
                    f"others; give clients={{{', '.join(repr(s) + ': ...' for s in readers)}}}"
                )
        else:
            chosen = {s: choose(clients, r.ids, f"{data.title}, {s}") for s, r in readers.items()}
        return {split: _collect(reader, chosen[split], task) for split, reader in readers.items()}


def _same_names(clients: Mapping, readers: Mapping) -> None:
    for name in clients:
        if name not in readers:
            raise ValueError(f"clients: no split {name!r}{checks.nearest(str(name), readers)}")
    for split in readers:
        if split not in clients:
            raise ValueError(f"clients: split {split!r} is missing (None means all of its clients)")


def choose(clients: Clients, ids: Sequence[str], where: str) -> list[str]:
    """The ids meant by ``clients``: all, the first so many, a list, or a function of all ids.

    Raises:
      ValueError: more than there are, an unknown id (with the nearest known one), or one twice.
    """
    if clients is None:
        return list(ids)
    if isinstance(clients, int | np.integer) and not isinstance(clients, bool):
        if not 0 < clients <= len(ids):
            raise ValueError(f"{where}: clients={clients}, but there are {len(ids)} clients")
        return list(ids)[: int(clients)]
    listed = clients(ids) if callable(clients) else clients
    if isinstance(listed, str) or not isinstance(listed, Sequence | np.ndarray):
        raise ValueError(f"clients must be None, a number, a list of ids or a function of ids; got {listed!r}")
    listed = [c.item() if isinstance(c, np.generic) else c for c in listed]
    if not listed:
        raise ValueError(f"{where}: clients is empty")
    checks.unique_ids(listed)
    known = set(ids)
    for client in listed:
        if client not in known:
            raise ValueError(f"{where}: no client {client!r}{checks.nearest(str(client), ids)}")
    return listed


@contextlib.contextmanager
def _readers(
    data: published.Published, task: Task, data_dir: str | os.PathLike | None, source: str | None
) -> Iterator[dict[str, sqlite_reading.Reader]]:
    """A reader for each split; the tables in a file tell which of the two formats it has."""
    paths = published.locate(data, data_dir, source)
    with contextlib.ExitStack() as stack:
        readers = {}
        for split, path in paths.items():
            with sqlite_reading.connect(path) as connection, sqlite_reading.naming(path):
                fedjax = "federated_data" in sqlite_reading.tables(connection)
            opened = (
                fedjax_sqlite.open_file(path, task.fields)
                if fedjax
                else tff_sqlite.open_split(path, data.splits[split], task.fields)
            )
            readers[split] = stack.enter_context(opened)
        yield readers


def _collect(reader: sqlite_reading.Reader, ids: Sequence[str], task: Task) -> FederatedData:
    """The clients ``ids`` of one split, in this order; one that the split doesn't have is empty."""
    nothing = {
        name: [] if f.kind == "bytes" else np.empty((0, *f.shape), _DTYPES[f.kind]) for name, f in task.fields.items()
    }
    known, pairs, held = set(reader.ids), [], 0
    with download.bar(f"Reading {reader.path.name} {reader.split}", unit="clients") as advance:
        for number, client in enumerate(ids, 1):
            raw = reader.read(client, task.limit) if client in known else nothing
            where = f"{reader.path}, split {reader.split!r}, client {client!r}"
            with sqlite_reading.naming(where):
                arrays = task.decode(raw)
            held += sum(array.nbytes for array in arrays.values())
            _refuse_beyond_memory(held, number, len(ids))
            pairs.append((client, arrays))
            advance(number, len(ids))
    with sqlite_reading.naming(f"{reader.path}, split {reader.split!r}"):
        return FederatedData.from_clients(pairs)


def _refuse_beyond_memory(held: int, number: int, count: int) -> None:
    """Better an error than a machine that swaps: joining the clients takes their size once more."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not told on this system
        return
    if 2 * held > memory:
        raise ValueError(
            f"{number} of {count} clients already take {held / 1e9:.1f} GB, and twice that while "
            f"they are joined; this machine has {memory / 1e9:.1f} GB. Ask for fewer: clients=..., "
            "and for Stack Overflow max_examples=..."
        )


def within(field: str, values: np.ndarray, low: float, high: float) -> np.ndarray:
    """``values``, all in ``low..high``; otherwise a ValueError names field, example and value."""
    inside = (values >= low) & (values <= high)  # false for NaN
    if not inside.all():
        row = int(np.flatnonzero(~inside.reshape(len(values), -1).all(1))[0])
        bad = values[row][~inside[row]].flat[0] if values.ndim > 1 else values[row]
        raise ValueError(f"example {row}, field {field!r}: {bad} is outside {low}..{high}")
    return values
