"""Populations beyond the device's memory: the synchronous schedule, with a cohort's rows fetched from the host.

A round asks the sampler on the device, copies the cohort's rows from the host's arrays (memory maps read them
from disk) into a block of fixed size, and computes on that. Keys, order and arithmetic are those of
:func:`fedjax_lab.synchronous`. While a round computes, a thread fetches the rows of the next, where the choice
of the next cohort doesn't hang on how this round ends.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fedjax_lab import checks, compiling, garbage, hosts, keys, memory
from fedjax_lab.cohort import make_env, run_cohort
from fedjax_lab.data import FederatedData
from fedjax_lab.fetching import (
    CohortData,
    Population,
    capacity,
    check_own,
    fetch,
    pick,
    population_of,
    put_back,
)
from fedjax_lab.process import HostStep, Process, typed_key
from fedjax_lab.round import Env, Round
from fedjax_lab.sampling import Sampler, check_sampler, everyone
from fedjax_lab.simulation import SimulationState, check_room, check_stable, cohort_metrics, serve, strong
from fedjax_lab.states import empty_states

PyTree = Any


class Drawn(NamedTuple):
    """A round's cohort: who, the round's number after it, and the sampler's state."""

    env: Env
    after: jax.Array
    sampler: PyTree


class Ahead(NamedTuple):
    """A round that was begun early, and what it was begun from."""

    begun: list[Any]
    drawn: Drawn
    fetched: Future


@garbage.put_off()
def streamed(round: Round, data: FederatedData, sampler: Sampler | None = None, lanes: int | None = None) -> Process:
    """As :func:`fedjax_lab.synchronous`, for populations that don't fit the device, or memory.

    A cohort's rows go to the device for a round, in a block as large as the largest possible cohort; sizes and
    attributes are kept there. The states of clients lie in the host's memory. Data from
    :meth:`fedjax_lab.FederatedData.open` come here by themselves through ``synchronous``.

    Args:
      round: what a round computes.
      data: the population, its arrays on the host: NumPy arrays or memory maps.
      sampler: who takes part, everyone by default. One with an ``update`` of its own makes rounds wait for
        their rows: the next cohort is known only when a round has ended.
      lanes: how many clients run side by side; by default chosen.

    Returns:
      A :class:`Process` whose step runs on the host: it can't be jitted or vmapped (a sweep needs data in
      memory). A step takes over the clients' states of the state that it is given, and writes into them.

    Raises:
      ValueError: as ``synchronous``, too little memory for a cohort's rows and states included; more rows in a
        cohort than 32 bits count; a sampler that probes losses; client states that hold PRNG keys; several processes.
    """
    sampler = everyone() if sampler is None else sampler
    if not isinstance(round, Round):
        raise ValueError(f"streamed(round, data, sampler) takes a Round first; got {checks.shown(round)}")
    checks.federated(data, "the data of streamed(round, data, sampler)")
    check_sampler(sampler)
    if hosts.several():
        raise ValueError("streamed() works in one process: use synchronous(..., mesh=fl.devices.mesh())")
    host = jax.tree.map(np.asarray, data)
    sampler.init(host)
    jax.eval_shape(lambda key: round.init(key, host), jax.random.key(0))  # checks the data, computes nothing
    check_room(sampler, host, lanes, 1)
    lanes = None if lanes is None else int(lanes)

    start, draw, compute = _programs(round, sampler, lanes, host.sizes)
    shapes = _Shapes(round, start, draw, compute, host)
    shared = jax.local_devices()[0].platform == "cpu"  # its memory is the host's, where all clients' states lie
    states = shapes.clients.table if shared else shapes.members.table
    memory.require(shapes.block, states, shapes.server, shapes.cohort, 1, shared=shared)
    foreseen = sampler.update is Sampler._field_defaults["update"] or not jax.tree.leaves(shapes.drawn.sampler)
    step = _stepper(draw, compute, shapes.cohort, foreseen)

    def init(key, params=None):
        server, drawn, number, key = start(typed_key(key), params, host)
        zeros = lambda s: np.zeros(s.shape, s.dtype)
        return SimulationState(server, jax.tree.map(zeros, shapes.clients), drawn, number, key)

    lens: Any = round.model
    variables: Any = lambda state: lens.get(state.server) if lens else None
    return Process(
        init, HostStep(step, shapes.program), data,
        params=lambda state: variables(state).params if lens else state.server,
        variables=variables, server=lambda state: state.server, clients=lambda state: state.clients, round=round,
    )  # fmt: skip


def _programs(round: Round, sampler: Sampler, lanes: int | None, sizes: np.ndarray) -> tuple[Any, Any, Any]:
    """What runs on the device, jitted: the start of a run, the draw of a cohort, and a round on its rows."""

    def start(key, params, data):
        server_key, run_key = jax.random.split(key)
        server = strong(round.init(server_key, data, params))
        return server, strong(sampler.init(data)), jnp.int32(0), run_key

    def draw(state, number, key, data) -> Drawn:
        public = keys.of_round(key, number).public
        ids, present, state = sampler.sample(state, public, data, _no_probe)
        env = make_env(number, public, ids, present, data.num_clients)
        return Drawn(env, number + 1, strong(state))

    def compute(server, clients, drawn, key, data):
        _, private, serving = keys.of_round(key, drawn.env.round)
        answers = run_cohort(round, server, clients, data, drawn.env, private, lanes, None, sizes)
        server, server_metrics = serve(round, server, answers, drawn.env, serving)
        after = strong(sampler.update(drawn.sampler, answers.ids, answers.ok, answers.metrics))
        return strong(server), answers.clients, after, cohort_metrics(answers) | server_metrics

    return compiling.once(start), jax.jit(draw), compiling.jit(compute)


def _stepper(draw: Callable, compute: Callable, cohort: int, foreseen: bool) -> Callable:
    """A round on the host; where the next cohort is ``foreseen``, its rows are fetched while this one's compute."""
    pool = ThreadPoolExecutor(1, "fedjax_lab-rows")
    known: list[tuple[FederatedData, Population]] = []
    ahead: list[Ahead] = []

    def population(data) -> Population:
        if not known or known[0][0] is not data:
            known[:] = [(data, population_of(data, cohort))]
        return known[0][1]

    def begin(source: Population, sampler, number, key) -> Ahead:
        drawn = draw(sampler, number, key, source.data)
        return Ahead([source, *jax.tree.leaves((sampler, number, key))], drawn, pool.submit(fetch, source, drawn.env))

    def step(state: SimulationState, data: FederatedData):
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((state, data))):
            raise ValueError(
                "a streamed step reads its data on the host: it can't be traced (jit, vmap, scan, sweep). Give "
                "synchronous() data in memory, data.on_device()"
            )
        check_own(state.clients)
        source = population(data)
        turn = ahead.pop() if ahead else None
        if turn is None or not _same(turn.begun, [source, *jax.tree.leaves((state.sampler, state.round, state.key))]):
            turn = begin(source, state.sampler, state.round, state.key)
        drawn, fetched = turn.drawn, turn.fetched.result()
        clients = pick(state.clients, fetched)
        jax.block_until_ready(state.server)  # one round under way: more would pile up their rows in memory
        if foreseen:
            ahead[:] = [begin(source, drawn.sampler, drawn.after, state.key)]
        server, clients, after, metrics = compute(state.server, clients, drawn, state.key, fetched.data)
        clients = put_back(state.clients, clients, fetched)
        return SimulationState(server, clients, drawn.sampler if foreseen else after, drawn.after, state.key), metrics

    return step


class _Shapes:
    """Shapes of all that a round computes with, found and checked before anything is compiled."""

    def __init__(self, round: Round, start, draw, compute, data: FederatedData):
        server, sampler, number, key = compiling.ahead(start, jax.random.key(0), None, data)
        self.clients = jax.eval_shape(lambda s, d: empty_states(round, s, d), server, data)
        for name, leaf in checks.named_leaves(self.clients.table):
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                raise ValueError(f"the clients' state {name} is a PRNG key, which the host can't hold: keep its data")
        self.drawn: Drawn = jax.eval_shape(draw, sampler, number, key, data)
        self.cohort = self.drawn.env.ids.shape[0]
        of = lambda count: lambda s: jax.ShapeDtypeStruct((count, *s.shape[1:]), s.dtype)
        members = jax.ShapeDtypeStruct((self.cohort,), jnp.int32)
        sizes, attrs = jax.tree.map(of(data.num_clients), (data.sizes, data.attrs))
        self.block = jax.tree.map(of(capacity(np.asarray(data.sizes), self.cohort)), data.arrays)
        cohort = CohortData(self.block, members, sizes, attrs, data.id_table, data.max_size, data.tile, members)
        clients = self.members = jax.tree.map(of(self.cohort), self.clients)._replace(members=members)
        self.server = server
        arguments = (server, clients, self.drawn, key, cohort)
        new = compiling.ahead(compute, *arguments)
        names = ("server", "clients", "sampler")
        check_stable(dict(zip(names, new, strict=False)), dict(zip(names, (server, clients, sampler), strict=True)))
        self.program = lambda: "\n".join(
            [draw.lower(sampler, number, key, data).as_text(), compute.lower(*arguments).as_text()]
        )


def _no_probe(ids):
    raise ValueError("this sampler probes the clients' losses, whose rows are not in memory: give synchronous() data "
                     "in memory, data.on_device()")  # fmt: skip


def _same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
