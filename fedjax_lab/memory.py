"""Whether a run fits in memory, judged before anything is moved or compiled."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

PyTree = Any


class TooLittleMemory(ValueError):
    """What was asked for would not fit; the message has the estimate."""


def require(
    data: PyTree, clients: PyTree, server: PyTree, cohort: int, count: int, *, shared: bool, most: int | None = None
) -> None:
    """Refuse a run whose arrays alone are larger than the memory there is.

    The estimate is a lower bound: the examples, the population's client states, those of a cohort, the server's
    state and one copy of it for each device. A CPU's devices read the same examples. Activations and gradients come on
    top.

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
    """Bytes of a pytree of arrays or shapes; those mapped from a file take none."""
    return sum(math.prod(x.shape) * _width(x) for x in jax.tree.leaves(tree) if not isinstance(x, np.memmap))


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
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
