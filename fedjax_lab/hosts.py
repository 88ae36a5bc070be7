"""Several processes, on one computer or many, that run one program together.

Every process makes the same calls with the same settings. Each puts the rows of its own share of the clients on
its devices; the process with index 0 leads: it alone writes the run's folder, and what depends on a clock or on a
key press is its decision.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_lab import checks

PyTree = Any
PATIENCE = 20  # seconds without a sign of life, after which the runtime ends the other processes with an error


class LostProcess(RuntimeError):
    """Another process of the run has died or can't be reached."""


def connect(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Join the other processes; call it before anything else of JAX runs.

    Args:
      coordinator: ``"host:port"`` of the process with index 0, which must be free there.
      num_processes: how many there are.
      process_id: which of them this is, from 0. All three ``None``: as the cluster's environment says (Slurm, Open
        MPI, Cloud TPU, Kubernetes).

    Raises:
      ValueError: some but not all of them, or a process index that can't be; none, outside of a cluster.
      RuntimeError: JAX runs already, or the others don't answer.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"several processes need all of {', '.join(given)}; {', '.join(missing)} is missing")
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":") if isinstance(coordinator, str) else ("", "", "")
        if not host or not (port.isdecimal() and 0 < int(port) < 2**16):
            raise ValueError(f"coordinator must be host:port; got {coordinator!r}")
        checks.positive(num_processes, "num_processes", integer=True)
        count = int(num_processes or 0)
        if not 0 <= checks.integer(process_id, "process_id", 0) < count:
            raise ValueError(f"process_id must lie in 0..{count - 1}; got {process_id}")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=PATIENCE)
    except (RuntimeError, ValueError) as error:
        if coordinator is None and "coordinator_address" in str(error):
            raise ValueError(
                "no cluster's environment was found (Slurm, Open MPI, Cloud TPU, Kubernetes) that says how many "
                "processes there are: give coordinator, num_processes and process_id"
            ) from None
        raise RuntimeError(
            f"the processes could not be joined ({error}). Call this before anything else of JAX runs, in every one of "
            f"the {num_processes or ''} processes, with the same coordinator"
        ) from error


def several() -> bool:
    """Whether this process is one of several."""
    return jax.process_count() > 1


def leads() -> bool:
    """Whether this process writes the run's folder and decides for all."""
    return jax.process_index() == 0


def decided(question: Callable[[], bool]) -> Callable[[], bool]:
    """The question, answered by the leading process for all; every process must ask at the same points."""
    if not several():
        return question
    return lambda: bool(multihost_utils.broadcast_one_to_all(np.bool_(question())))


def from_leader(tree: PyTree) -> PyTree:
    """The leading process's pytree of arrays (the same shapes everywhere), as NumPy arrays on all."""
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree)) if several() else tree


def text_from_leader(text: str) -> str:
    """The leading process's text, on all."""
    if not several():
        return text
    mine = np.frombuffer(text.encode(), np.uint8)
    length = int(from_leader(np.int32(len(mine))))
    return from_leader(np.resize(mine, length) if len(mine) else np.zeros(length, np.uint8)).tobytes().decode()


def agree(what: dict[str, Any]) -> None:
    """Check that all processes were started alike.

    Args:
      what: names of settings and their values, compared by a digest of their ``repr``.

    Raises:
      ValueError: naming the settings in which processes differ.
    """
    if not several():
        return
    digest = lambda value: np.frombuffer(hashlib.sha256(repr(value).encode()).digest()[:8], np.int32)
    mine = np.stack([digest(value) for value in what.values()])
    every = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, *mine.shape)
    differ = [name for i, name in enumerate(what) if (every[:, i] != every[0, i]).any()]
    if differ:
        raise ValueError(
            f"the {len(every)} processes of this run differ in {', '.join(differ)}: start all of them with the same "
            f"settings and the same data (here, process {jax.process_index()}: "
            + ", ".join(f"{name} {checks.shown(what[name])}" for name in differ)
            + ")"
        )


@contextlib.contextmanager
def lost_ones_named(folder: Any) -> Iterator[None]:
    """Say what happened, and what to do, when a sum over the processes can't be had any more.

    Raises:
      LostProcess: in place of the runtime's own error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not several():
            raise
        again = f"start all processes again with the same call: the run goes on from its last checkpoint in {folder}"
        raise LostProcess(
            f"process {jax.process_index()} of {jax.process_count()} lost another process of this run: it died or "
            "can't be reached; " + (again if folder else "nothing is saved, since the run has no folder (out=...)")
        ) from error


def whole(array: jax.Array) -> np.ndarray:
    """The array on the host, from all processes' devices; every process must ask."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def put(array: np.ndarray, mesh: Mesh, spec: P) -> jax.Array:
    """A host array that every process has, or has its part of, laid out over all devices."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: np.asarray(array[index]))
