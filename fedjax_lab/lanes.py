"""Who runs when: how many lanes, which clients share a chunk, which device takes it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Cost(NamedTuple):
    """Seconds of one step of ``n`` clients side by side, ``once + n * (each + flops / rate)``; roughly.

    ``most``: no more lanes than this.
    """

    once: float
    each: float
    rate: float
    most: int


# Measured with a logistic regression of 36,000 operations a step on a CPU: 17, 25, 45 and 60 us for 1, 2, 5, 10 lanes.
CPU = Cost(once=12e-6, each=3e-6, rate=20e9, most=16)
# Not measured: a step is some dozens of kernels that take microseconds to launch, whatever their width.
ACCELERATOR = Cost(once=200e-6, each=1e-6, rate=2e12, most=256)
DRAWS = 4  # of a cohort, to judge a number of lanes by
# More lanes must promise this much: they cost memory, and convolutions side by side are slower than one after the other
# (W3, 50 equal clients on a CPU: 17 ms a step with one lane, 24 with two).
ENOUGH = 0.05
# A device may work so much longer than by Graham's rule if states stay where they lie for it: to move a client's state
# of 4.8 MB there and back takes some 7 ms, on a machine where its turn takes some 360 (W2).
UNEVEN = 0.02


class Plan(NamedTuple):
    """A cohort's schedule.

    Attributes:
      slots: ``int32[chunks, lanes]``, places in the cohort; its size where a lane stays empty.
      device: ``int32[chunks]``, which device runs the chunk.
    """

    slots: jax.Array
    device: jax.Array


def plan(work: jax.Array, lanes: int, devices: int = 1, home: jax.Array | None = None) -> Plan:
    """Chunks of clients with about the same work, shared out among devices.

    Args:
      work: ``int32[cohort]``, what each client's turn costs; negative for empty slots.
      lanes: clients in a chunk.
      devices: each chunk goes, in order of falling work, to the device that has least so far (Graham's
        longest processing time first), which is within a third of the best.
      home: ``int32[cohort]``, the device on which a client's state lies: a chunk stays there, by its first client,
        if no device then takes more than ``UNEVEN`` longer than by that rule.
    """
    cohort = work.shape[0]
    chunks = -(-cohort // lanes)
    order = jnp.argsort(-work, stable=True) if chunks > 1 else jnp.arange(cohort)
    pad = jnp.full(chunks * lanes - cohort, cohort)
    slots = jnp.concatenate([order, pad]).astype(jnp.int32).reshape(chunks, lanes)
    if devices == 1:
        return Plan(slots, jnp.zeros(chunks, jnp.int32))
    longest = jnp.max(
        work.at[slots].get(mode="fill", fill_value=-1, wrap_negative_indices=False), axis=1
    )  # a chunk takes as long as this one
    load, device = _shared_out(longest, devices)
    if home is not None:
        most = jnp.max(load) * (1 + UNEVEN)
        tried, at_home = _shared_out(longest, devices, home[slots[:, 0]], most)
        device = jnp.where(jnp.max(tried) <= most, at_home, device)
    return Plan(slots, device)


def _shared_out(
    costs: jax.Array, devices: int, home: jax.Array | None = None, most: Any = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Loads ``[devices]`` and each chunk's device: its home up to a load of ``most``, else that with least so far."""

    def give(load, chunk):
        cost, own = chunk
        cost = jnp.maximum(cost, 0) + 1
        least = jnp.argmin(load).astype(jnp.int32)
        device = least if home is None else jnp.where(load[own] + cost <= most, own, least)
        return load.at[device].add(cost, wrap_negative_indices=False), device

    own = jnp.zeros(len(costs), jnp.int32) if home is None else home.astype(jnp.int32)
    return jax.lax.scan(give, jnp.zeros(devices, costs.dtype), (costs, own))


def plan_own(work: jax.Array, mine: jax.Array, lanes: int, device: jax.Array) -> Plan:
    """As :func:`plan`, where a device may run its own clients only, ``mine: bool[cohort]``."""
    cohort = work.shape[0]
    chunks = -(-cohort // lanes)
    order = jnp.argsort(jnp.where(mine, -work, jnp.iinfo(work.dtype).max), stable=True)
    slots = jnp.where(mine[order], order, cohort)
    slots = jnp.concatenate([slots, jnp.full(chunks * lanes - cohort, cohort)]).astype(jnp.int32).reshape(chunks, lanes)
    return Plan(slots, jnp.where(slots[:, 0] < cohort, device, -1))


def side_by_side(function: Callable, lanes: int) -> Callable:
    """``vmap``, but for one lane the function itself: a batch of one would turn convolutions into grouped ones."""
    if lanes > 1:
        return jax.vmap(function)

    def alone(*arguments):
        out = function(*jax.tree.map(lambda x: x[0], arguments))
        return jax.tree.map(lambda x: jnp.asarray(x)[None], out)

    return alone


def choose(flops: float, sizes: np.ndarray | None, cohort: int, devices: int = 1, packed: bool = False) -> int:
    """The number of lanes that a round should take the least time with.

    A chunk takes as many steps as its largest client and each step costs more the more lanes there are: small
    models gain from many, large ones and cohorts with a dominating client from few.

    Args:
      flops: operations of one client's step.
      sizes: the population's sizes, of which cohorts are drawn; ``None`` takes them all for equal.
      cohort: clients in a round.
      devices: that share the cohort out.
      packed: a lane takes up the next client when it has finished one (:mod:`fedjax_lab.packing`).
    """
    cost = CPU if jax.default_backend() == "cpu" else ACCELERATOR
    rng = np.random.default_rng(0)
    if sizes is None or len(sizes) == 0:
        draws = [np.ones(cohort)]
    else:
        draws = [np.sort(np.asarray(sizes)[rng.integers(0, len(sizes), cohort)])[::-1] for _ in range(DRAWS)]

    def time(lanes: int) -> float:
        step = cost.once + lanes * (cost.each + flops / cost.rate)
        steps = lambda draw: sum(draw) / lanes if packed else sum(draw[::lanes])
        return step * sum(max(steps(draw) / devices, draw[0]) for draw in draws)

    # Powers of two and what fills the cohort's chunks evenly.
    widest = max(min(cost.most, -(-cohort // devices)), 1)
    even = {-(-cohort // chunks) for chunks in range(devices, cohort + 1, devices)}
    candidates = {n for n in even | {2**i for i in range(9)} | {1} if n <= widest}
    times = {lanes: time(lanes) for lanes in candidates}
    return min(lanes for lanes, t in times.items() if t <= (1 + ENOUGH) * min(times.values()))
