"""The devices of a run: a mesh along which the clients of a cohort are shared out."""

import os
import re
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from fedjax_lab import checks

AXIS = "clients"
THREADS = "PJRT_NPROC"  # the environment variable that XLA reads the number of its CPU threads from


def _enough_threads(devices: int) -> None:
    """Threads for several CPU devices, if JAX doesn't run yet: more than the devices themselves hold.

    XLA's own choice is one thread for each. Then a device that waits for the others' sums, and the next program, have
    none: devices stood still within a hundred rounds. And helpers that a parallel loop asks for and no longer needs
    stay in the queues of busy threads; with a thousand in a queue the next task runs at once inside the one that asks
    for it, and Eigen's convolution packs its second slice of inputs over the first (a comment of its own names that
    danger). On two devices W3's first layer got wrong gradients after some fifty steps of a round (jax 0.10.2, where
    the gradient of the second layer's inputs is XLA's convolution). A thread that no device holds empties the queues.
    """
    if devices > 1 and not runs_already():
        os.environ.setdefault(THREADS, str(max(_with_spare(devices), os.cpu_count() or 1)))


def _with_spare(devices: int) -> int:
    return devices + 1 + devices // 8


def runs_already() -> bool:
    """Has JAX started its devices? Then their number can't be changed."""
    was = getattr(jax.config, "jax_num_cpu_devices", -1)
    try:
        jax.config.update("jax_num_cpu_devices", was + 2)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", was)
    return False


def _asked_for() -> int:
    """How many CPU devices the environment or the configuration asks for."""
    flag = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return max(int(flag.group(1)) if flag else 1, getattr(jax.config, "jax_num_cpu_devices", -1) or 1)


# Twice as many for devices that the environment asked for: other programs than ours may run on them.
_enough_threads(2 * _asked_for() if _asked_for() > 1 else 1)


def cores() -> int:
    """How many of the computer's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cores(count: int | None = None) -> int:
    """Make the CPU's cores devices of their own, so that :func:`mesh` can share clients out among them.

    JAX sees a CPU as one device, whose second core only large matrix products use. Call this before anything
    else of JAX runs.

    Args:
      count: how many devices; by default as many as this process has cores.

    Returns:
      The number of CPU devices.

    Raises:
      RuntimeError: JAX runs already.
    """
    count = cores() if count is None else count
    checks.positive(count, "count", integer=True)
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise RuntimeError(
            "call use_cores() before anything else of JAX runs: its devices are chosen already"
        ) from error
    _enough_threads(count)
    if count > 1:  # a dispatch that waits for another's results may hold a thread too
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    return count


def at_work(mesh: Mesh | None) -> int:
    """How many devices of this process a mesh has; one without a mesh."""
    return 1 if mesh is None else len(set(mesh.devices.flat).intersection(jax.local_devices()))


def mesh(count: int | None = None) -> Mesh:
    """A mesh of this computer's devices along the axis ``"clients"``, for ``fl.synchronous(..., mesh=...)``.

    Args:
      count: how many of them; all by default.

    Raises:
      ValueError: more than there are.
    """
    _enough_threads(_asked_for())
    there = jax.devices()
    count = len(there) if count is None else count
    checks.positive(count, "count", integer=True)
    if count > len(there):
        raise ValueError(
            f"a mesh of {count} devices was asked for, but JAX sees {len(there)} ({there[0].platform}); on a CPU, "
            f"call fl.devices.use_cores({count}) before anything else of JAX runs"
        )
    return Mesh(np.array(there[:count]), (AXIS,))


def checked(given: Mesh | None) -> Mesh | None:
    """A mesh that clients can be shared out over; axes beside ``"clients"`` are left to the compiler.

    Raises:
      ValueError: no mesh, or one without that axis.
    """
    if given is None:
        return None
    if not isinstance(given, Mesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh such as fl.devices.mesh() makes; got {checks.shown(given)}")
    if AXIS not in given.axis_names:
        raise ValueError(
            f'the mesh has the axes {given.axis_names} and lacks "{AXIS}", which clients are shared out along'
        )
    warn_of_few_threads(given.devices.flat)
    return Mesh(given.devices, given.axis_names, axis_types=(AxisType.Auto,) * len(given.axis_names))


def warn_of_few_threads(used: Iterable[Any]) -> None:
    """Several CPU devices that hold all of XLA's threads: a RuntimeWarning. See ``_enough_threads``."""
    there = jax.local_devices()
    count = len(set(used).intersection(there))
    threads = max(int(os.environ.get(THREADS) or cores()), len(there))
    if there[0].platform == "cpu" and count > 1 and threads <= count:
        warnings.warn(
            f"{count} CPU devices hold all of XLA's {threads} threads: long rounds may stand still or get wrong "
            f"convolutions. Call fl.devices.use_cores({count}) before anything else of JAX runs, or set "
            f"{THREADS}={_with_spare(count)} in the environment",
            RuntimeWarning,
            stacklevel=4,
        )


def put(leaf: Any, sharding: Sharding | None = None) -> jax.Array:
    """An array of data as a JAX array, on the default device or as ``sharding`` says.

    A CPU's devices can read the same memory: NumPy's arrays are copied once for all of them, to where JAX takes them
    over as they are. NumPy asks the system for large pages, on which rows from here and there are found faster. Never
    the caller's own memory.
    """
    here = jax.default_backend() == "cpu"
    if isinstance(leaf, jax.Array):
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        if sharding is not None and here and not isinstance(leaf, Tracer) and not key:
            leaf = np.asarray(leaf)
    else:
        leaf = _aligned(leaf) if here and isinstance(leaf, np.ndarray) else jnp.asarray(leaf)
    return leaf if sharding is None and isinstance(leaf, jax.Array) else jax.device_put(leaf, sharding)


def _aligned(leaf: np.ndarray) -> np.ndarray:
    """A copy in JAX's own type that begins at a multiple of 64 bytes."""
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    memory = np.empty(leaf.size * dtype.itemsize + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    out = memory[begin : begin + leaf.size * dtype.itemsize].view(dtype).reshape(leaf.shape)
    out[...] = leaf
    return out


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def by_client(mesh: Mesh) -> NamedSharding:
    """The first axis in blocks along the clients' axis."""
    return NamedSharding(mesh, P(AXIS))
