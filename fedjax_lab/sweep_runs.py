"""A sweep's cells on their devices: side by side in blocks, all blocks through one compiled program."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_lab import checks, compiling
from fedjax_lab.cell_program import CellProgram, Traced
from fedjax_lab.devices import cores, warn_of_few_threads
from fedjax_lab.grids import Cells
from fedjax_lab.process import Process
from fedjax_lab.session import rounds_of

PyTree = Any
Device = Any
AXIS = "cells"
# Parameters side by side on one CPU device. 16 cells of 10 ragged clients took .7 of the time of one after the other
# with 600 and 2,000 parameters, .96 with 7,840 and .98 with 48,608 (two devices).
SMALL = 20_000


def devices_for(process: Process, count: int | None) -> list[Device]:
    """The devices that share a sweep's cells out: ``count`` of this computer's, all by default.

    A process with a mesh, or with data on several devices, has decided for itself: then no device is given.

    Raises:
      ValueError: more than there are, or a process that has a mesh.
    """
    leaves = [leaf for leaf in jax.tree.leaves(process.data) if isinstance(leaf, jax.Array)]
    taken = getattr(process, "mesh", None) is not None or any(len(leaf.devices()) > 1 for leaf in leaves)
    there = jax.local_devices()
    if count is None:
        return [] if taken else there
    checks.positive(count, "devices", integer=True)
    if taken:
        raise ValueError("make_process shares clients out over devices (mesh=...): leave out devices=, or the mesh")
    if count > len(there):
        raise ValueError(f"devices={count}, but JAX sees {len(there)} here ({there[0].platform})")
    return there[:count]


def side_by_side(program: CellProgram, cells: Cells, devices: int) -> int:
    """How many cells to run at once where nobody says: all, on a CPU as many as it takes to keep it busy."""
    if jax.default_backend() != "cpu":
        return cells.count
    return max(1, SMALL // max(program.size, 1)) * max(devices, 1)


def threads_for(program: CellProgram, at_once: int, devices: Sequence[Device]) -> int:
    """How many of the host's threads send off blocks of cells: where a CPU's cores are one device, one for each.

    A small model's round keeps one core busy. XLA runs what one thread sends off one after the other, and what several
    do at the same time: eight cells of W1 took half as long in two blocks (two cores).
    """
    alone = len(devices) == 1 and devices[0].platform == "cpu" and program.step.small
    return min(cores(), at_once) if alone else 1


class Block(NamedTuple):
    """Cells that run side by side: each one's hyper-parameters, and its state, ``[width, ...]``."""

    values: tuple[np.ndarray, ...]
    state: PyTree


class Runs:
    """All cells' states, in blocks of equal width; the last cell is repeated where a block has too few."""

    def __init__(
        self,
        program: CellProgram,
        data: PyTree,
        cells: Cells,
        batch: int,
        devices: Sequence[Device],
        params: PyTree,
    ):
        begin = time.monotonic()
        self.program, self.cells, self.many = program, cells, None
        at_once = min(batch, cells.count)
        count, threads = min(len(devices), at_once) or 1, threads_for(program, at_once, devices)
        waves = -(-cells.count // at_once)
        self.abreast = -(-cells.count // (waves * threads * count))  # in one block on one device
        self.width = self.abreast * count
        blocks = -(-cells.count // self.width)
        self.senders = [ThreadPoolExecutor(1, "fedjax_lab-cells") for _ in range(threads if threads > 1 else 0)]
        warn_of_few_threads(devices[:count])
        self.home = devices[0] if count > 1 else None
        self.mesh = Mesh(np.array(devices[:count]), (AXIS,)) if count > 1 else None
        self.data = data if self.mesh is None else jax.device_put(data, NamedSharding(self.mesh, P()))
        numbers = np.minimum(np.arange(blocks * self.width), cells.count - 1).reshape(blocks, self.width)
        values, seeds = cells.flat()
        keys = [jax.random.key(seed) for seed in cells.seeds]

        def start(values, keys, consts, params):
            return self._by_cell(lambda v, k: program.start.call(consts, v, k, params))(values, keys)

        self.blocks, begun = [], None
        for own in numbers:
            own_values = tuple(column[own] for column in values)
            given = (own_values, jnp.stack([keys[s] for s in seeds[own]]), program.start.consts, params)
            begun = begun or self._compiled(start, given, 2, P(AXIS), once=True)
            self.blocks.append(Block(own_values, begun(*given)))
        self.pick = jax.jit(lambda state, slot: jax.tree.map(lambda leaf: leaf[slot], state))
        self.compile_seconds = time.monotonic() - begin

    def _compiled(
        self, function: Callable, given: tuple, by_cell: int, out: Any, once: bool = False, **options: Any
    ) -> Callable:
        """The function compiled for arguments, of which the first ``by_cell`` have an axis of cells.

        Several devices run their cells by themselves: a loop that one cell needs longer keeps no other device busy.
        """
        if self.mesh is None:
            return compiling.now(function, given, runs_once=once, **options)
        specs = tuple(P(AXIS) if place < by_cell else P() for place in range(len(given)))
        function = jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)
        places = tuple(NamedSharding(self.mesh, spec) for spec in specs)
        put = lambda given: tuple(map(jax.device_put, given, places))  # an array without entries loses its place
        compiled = compiling.now(function, put(given), self.mesh, once, in_shardings=places, **options)
        return lambda *given: compiled(*put(given))

    def _by_cell(self, function: Callable) -> Callable:
        """The function over a device's cells. One alone isn't batched: its convolutions would become grouped ones."""
        if self.abreast > 1:
            return jax.vmap(function)
        first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
        return lambda *trees: jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], function(*map(first, trees)))

    def advance(self, count: int, length: int) -> list[PyTree]:
        """Enqueue ``count`` rounds, of at most ``length``; gives each block's metrics, ``[length, width, ...]``."""
        sent: list[Any] = []
        for i, block in enumerate(self.blocks):
            given = (block.state, block.values, self.data, self.program.step.consts, np.int32(count))
            if self.many is None:
                begin = time.monotonic()
                out = (P(AXIS), P(None, AXIS))
                self.many = self._compiled(self._rounds(length), given, 2, out, donate_argnums=0)
                self.compile_seconds += time.monotonic() - begin
            send = self.senders[i % len(self.senders)].submit if self.senders else lambda call, *given: call(*given)
            sent.append(send(self.many, *given))
        done = [each.result() for each in sent] if self.senders else sent
        self.blocks = [block._replace(state=state) for block, (state, _) in zip(self.blocks, done, strict=True)]
        return [log for _, log in done]

    def _rounds(self, length: int) -> Callable:
        call = self.program.step.call

        def many(state, values, data, consts, count):
            step = self._by_cell(lambda values, state: call(consts, values, state, data))
            return rounds_of(lambda state: step(values, state), length, state, count)

        return many

    def each(self) -> Iterator[PyTree]:
        """Every cell's own state, a copy, in the cells' order."""
        for cell in range(self.cells.count):
            yield self._at_home(self.pick(self.blocks[cell // self.width].state, cell % self.width))

    def reading(self, look: Traced) -> Callable[[], Iterator[PyTree]]:
        """A function that computes ``look`` of every cell's present state, and gives the results on the host."""

        def look_at_all(state, values, data, consts):
            return self._by_cell(lambda v, s: look.call(consts, v, s, data))(values, state)

        given = lambda block: (block.state, block.values, self.data, look.consts)
        compiled = self._compiled(look_at_all, given(self.blocks[0]), 2, P(AXIS))

        def read() -> Iterator[PyTree]:
            for first, found in enumerate([compiled(*given(block)) for block in self.blocks]):
                found = jax.device_get(found)
                for slot in range(min(self.width, self.cells.count - first * self.width)):
                    yield jax.tree.map(lambda leaf, slot=slot: leaf[slot], found)

        return read

    def finish(self) -> tuple[PyTree, PyTree]:
        """All cells' parameters and states, leaves ``[*grids, seeds, ...]``."""
        begin, read = time.monotonic(), self.program.read

        def params(state, values, consts):
            return self._by_cell(lambda v, s: read.call(consts, v, s))(values, state)

        given = [(block.state, block.values, read.consts) for block in self.blocks]
        compiled = self._compiled(params, given[0], 2, P(AXIS))
        self.compile_seconds += time.monotonic() - begin
        return self._joined([compiled(*g) for g in given]), self._joined([g[0] for g in given])

    def _joined(self, parts: list[PyTree]) -> PyTree:
        count, shape = self.cells.count, self.cells.shape

        def join(*leaves):
            leaves = [self._at_home(leaf) for leaf in leaves]
            whole = jnp.concatenate(leaves)[:count] if len(leaves) > 1 else leaves[0][:count]
            return whole.reshape(*shape, *whole.shape[1:])

        return jax.tree.map(join, *parts)

    def _at_home(self, tree: PyTree) -> PyTree:
        """On one device, where everything else of the user's is."""
        return tree if self.home is None else jax.device_put(tree, self.home)
