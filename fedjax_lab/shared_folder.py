"""A run's folder for several processes: the leading one reads and writes, all of them know what it read."""

import contextlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab import hosts, run_folder
from fedjax_lab.process import Process
from fedjax_lab.run_folder import NO_FOLDER, Disk, Start
from fedjax_lab.state_leaves import host_leaves

PyTree = Any


def open_folder(
    stack: contextlib.ExitStack,
    folder: Path,
    process: Process,
    state: PyTree,
    setup: dict[str, Any],
    resume: bool | str,
    every: int,
    checkpoint_every: float,
) -> tuple[Disk, Start]:
    """As :func:`fedjax_lab.run_folder.open_folder`, with the folder locked until ``stack`` closes."""
    program = run_folder.program_digest(process.step, state, process.data)
    settings = (folder, setup, resume, every, checkpoint_every, program)
    if not hosts.several():
        stack.enter_context(run_folder.locked(folder))
        return _opened(state, *settings)
    disk, start = NO_FOLDER, Start(_template(state))
    if hosts.leads():
        stack.enter_context(run_folder.locked(folder))
        disk, start = _opened(start.state, *settings)
    found, done, kept = json.loads(hosts.text_from_leader(json.dumps([start.kept != {}, start.done, dict(start.kept)])))
    restored = _spread(hosts.from_leader(_bits(start.state)), state) if found else state
    return _for_all(disk, done if found else None), start._replace(state=restored, done=done, kept=kept)


def _opened(state, folder, setup, resume, every, checkpoint_every, program):
    return run_folder.open_folder(folder, state, setup, resume, every, checkpoint_every, program)


def _for_all(disk: Disk, saved: int | None) -> Disk:
    """The leading process's disk; the others take part where a state has to be collected from all devices."""

    def save(round: int, state: PyTree, kept: dict[str, Any]) -> None:
        nonlocal saved
        if round == saved:
            return
        saved = round
        if hosts.leads():
            disk.save(round, state, kept)
        else:
            host_leaves(state)

    return Disk(disk.append, hosts.decided(disk.due), save)


def _template(state: PyTree) -> PyTree:
    """A state of the same shapes on this process's own device."""

    def local(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            words = jax.eval_shape(jax.random.key_data, x)
            return jax.random.wrap_key_data(jnp.zeros(words.shape, words.dtype), impl=jax.random.key_impl(x))
        return jnp.zeros(x.shape, x.dtype)

    return jax.tree.map(local, state)


def _bits(state: PyTree) -> PyTree:
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), state)


def _spread(values: PyTree, like: PyTree) -> PyTree:
    """Host arrays that all processes have, laid out as the leaves of ``like`` are."""

    def one(value, x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            impl = jax.random.key_impl(x)
            whole = jax.make_array_from_callback(value.shape, x.sharding, lambda index: value[index])
            return jax.jit(lambda words: jax.random.wrap_key_data(words, impl=impl), out_shardings=x.sharding)(whole)
        return jax.make_array_from_callback(value.shape, x.sharding, lambda index: value[index])

    return jax.tree.map(one, values, like)
