"""Whether a run fits in memory, judged before anything is moved or compiled."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

PyTree = Any


class TooLittleMemory(ValueError):
    """What was asked for would not fit; the message has the estimate."""


def require_cells(cells: int, state: PyTree, count: int = 1, most: int | None = None) -> None:
    """Refuse a sweep whose cells' states alone are larger than the memory there is.

    A lower bound: all cells' states are kept to the end, on the first device at last, whatever runs at once.

    Args:
      cells: how many runs.
      state: shapes of one run's state.
      count: devices with memories of their own over which each run spreads its state by itself (a process's mesh).
      most: bytes there are; ``None`` asks the system.

    Raises:
      TooLittleMemory: with the estimate, what there is, and what to do.
    """
    most, each = available() if most is None else most, size(state)
    needed = cells * each // count
    if most is not None and needed > most:
        where = " on each device" if count > 1 else ""
        raise TooLittleMemory(
            f"this sweep needs at least {_gigabytes(needed)} of memory{where} and there are {_gigabytes(most)}: "
            f"{cells} cells with a state of {_gigabytes(each)} each. Give it fewer values or seeds (several sweeps, "
            "one after the other), a smaller population, or an algorithm without client states"
        )


def require(
    data: PyTree, clients: PyTree, server: PyTree, cohort: int, count: int, *, shared: bool, most: int | None = None
) -> None:
    """Refuse a run whose arrays alone are larger than the memory there is.

    The estimate is a lower bound: the examples that aren't on the first device yet, the population's client states,
    those of a cohort, the server's state and one copy of it for each device. A CPU's devices read the same examples.
    Activations and gradients come on top.

    Args:
      data: the examples' arrays, or their shapes.
      clients: shapes of the population's client states.
      server: shapes of the server's state.
      cohort: clients in a round.
      count: devices.
      shared: whether the devices share one memory, as a CPU's do; else each has its own and a share of the states.
      most: bytes there are, for each device; ``None`` asks the system.

    Raises:
      TooLittleMemory: with the estimate, what there is, and what to do.
    """
    most = available() if most is None else most
    if most is None:
        return
    examples, states, model = size(data), size(clients), size(server)
    population = max((x.shape[0] for x in jax.tree.leaves(clients)), default=0)
    ours = states * cohort // max(population, 1)
    copies = count if shared else 1
    needed = examples + copies * (2 * model + 2 * ours) + (states if shared else states // count)
    if needed > most:
        parts = {"examples": examples, "client states": states, "a cohort's states": 2 * copies * ours}
        parts["the server's state"] = 2 * copies * model
        told = ", ".join(f"{_gigabytes(n)} {what}" for what, n in parts.items())
        raise TooLittleMemory(
            f"this needs at least {_gigabytes(needed)} of memory and there are {_gigabytes(most)}"
            f"{'' if shared else ' on each device'}: {told}. Keep the examples in a file "
            "and stream them (FederatedData.save, FederatedData.open), take fewer devices, clients a smaller cohort, "
            "or an algorithm without client states"
        )


def size(tree: PyTree) -> int:
    """Bytes that a pytree of arrays or shapes will take; those mapped from a file, or on the device already, none."""
    return sum(math.prod(x.shape) * _width(x) for x in jax.tree.leaves(tree) if not _there(x))


def _there(x: Any) -> bool:
    """Whether nothing more is needed for an array: what there is free was counted without it."""
    if isinstance(x, np.memmap):
        return True
    return isinstance(x, jax.Array) and not isinstance(x, Tracer) and jax.local_devices()[0] in x.devices()


def _width(x: Any) -> int:
    return 8 if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) else np.dtype(x.dtype).itemsize


def available() -> int | None:
    """Bytes that an array can take on the first device; ``None`` where nobody says."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        told = device.memory_stats() or {}
        return told.get("bytes_limit", 0) - told.get("bytes_in_use", 0) if "bytes_limit" in told else None
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    return min([free, *_allowed(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))])


def _allowed(root: Path, memberships: Path) -> list[int]:
    """Bytes that a container's or a batch job's limits leave to this process, one number for each limit found.

    Linux keeps them in control groups, of version 2 (one tree of groups) or 1 (one of memory alone); a limit of a group
    holds for those below it. What a file takes of memory that can be given up is free.
    """
    try:
        lines = [line.split(":", 2) for line in memberships.read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        own = top / path.strip("/")
        for group in (g for g in (own, *own.parents) if g.is_relative_to(top)):
            try:
                found.append(_left(group, *(_FIRST if controllers else _SECOND)))
            except (OSError, ValueError):  # no such group is seen from in here; "max", no limit
                continue
    return found


# A group's limit, what is taken, and which line of memory.stat says what of that are files not read lately.
_FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_SECOND = ("memory.max", "memory.current", "inactive_file")


def _left(group: Path, limit: str, taken: str, files: str) -> int:
    most, used = (int((group / name).read_text()) for name in (limit, taken))
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return max(most - used + int(stat.get(files, 0)), 0)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
