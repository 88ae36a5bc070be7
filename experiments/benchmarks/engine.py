"""Our side of every comparison: FedAvg by ``fl.synchronous`` on as many devices as are asked for."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_lab as fl
from fedjax_lab import compiling
from fedjax_lab import devices as fl_devices
from fedjax_lab.session import rounds_of


def use_all_cores() -> None:
    """A CPU device for each core, unless JAX runs already (in the tests, or in a caller's own session)."""
    with contextlib.suppress(RuntimeError):
        fl_devices.use_cores()


def process(
    algorithm: fl.Round, data: fl.FederatedData, sampler: fl.Sampler | None = None, devices: int | None = None
) -> fl.Process:
    """``fl.synchronous`` over ``devices`` devices, by default all there are."""
    devices = len(jax.devices()) if devices is None else devices
    return fl.synchronous(algorithm, data, sampler, mesh=None if devices == 1 else fl_devices.mesh(devices))


def rounds(process: fl.Process, state: Any) -> Callable[[], Any]:
    """A function that runs the next round each time it is called, and gives what the round gave."""
    held = [state]

    def call():
        held[0], metrics = process.step(held[0], process.data)
        return held[0], metrics

    return call


def dispatches(process: fl.Process, state: Any, count: int) -> Callable[[], Any]:
    """As :func:`rounds`, ``count`` rounds at each call: one program, which takes the state over, as a run's does."""

    def many(state, data):
        return rounds_of(lambda state: process.step(state, data), count, state, jnp.int32(count))

    many = compiling.jit(many, process.mesh, donate_argnums=0)
    held = [jax.tree.map(jnp.copy, state)]

    def call():
        held[0], metrics = many(held[0], process.data)
        return metrics

    return call


def in_turn(cohorts: Sequence[Sequence[int]] | np.ndarray) -> fl.Sampler:
    """The given cohorts, ``int[rounds, cohort]``, one after the other, and again from the first."""
    table = np.asarray(cohorts, np.int32)
    fixed = fl.fixed(np.unique(table))

    def init(data):
        fixed.init(data)
        return jnp.int32(0)

    def sample(state, key, data, probe):
        return jnp.asarray(table)[state % len(table)], jnp.ones(table.shape[1], bool), state + 1

    return fl.Sampler(init, sample)
