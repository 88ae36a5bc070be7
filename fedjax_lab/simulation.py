"""The synchronous schedule: in every round a cohort trains from the same server state."""

import functools
import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedjax_lab import checks, compiling, devices, garbage, hosts, keys, memory, stored, whole_loops
from fedjax_lab.cohort import Answers, count_bytes, make_env, run_cohort
from fedjax_lab.data import FederatedData
from fedjax_lab.local import mean_loss
from fedjax_lab.process import Process, typed_key
from fedjax_lab.round import Round, nbytes
from fedjax_lab.sampling import Sampler, check_sampler, everyone
from fedjax_lab.sharding import placed
from fedjax_lab.states import ClientStates, empty_states, of_population
from fedjax_lab.turn import select

PyTree = Any


class SimulationState(NamedTuple):
    """Everything a synchronous run needs to go on.

    Attributes:
      server: the Round's ServerState.
      clients: the population's ClientStates.
      sampler: the Sampler's state.
      round: ``int32[]``, rounds done.
      key: the run's PRNG key; a round's keys are folded from it.
    """

    server: PyTree
    clients: ClientStates
    sampler: PyTree
    round: jax.Array
    key: jax.Array


@garbage.put_off()
def synchronous(
    round: Round,
    data: FederatedData,
    sampler: Sampler | None = None,
    lanes: int | None = None,
    mesh: Mesh | None = None,
) -> Process:
    """Run a Round over a population, a cohort at a time.

    Args:
      round: what a round computes.
      data: the population. On one device, data of :meth:`FederatedData.open` stay on disk
        (:func:`fedjax_lab.streamed`).
      sampler: who takes part, everyone by default.
      lanes: how many clients run side by side on each device; by default chosen from the cost of a step, the
        backend and the clients' sizes. The result does not depend on it beyond the order of float additions.
      mesh: devices to share the cohort out among, along an axis ``"clients"`` (:func:`fedjax_lab.devices.mesh`); one
        device by default. Nor does the result depend on that.

    Returns:
      A :class:`Process`. Its step's metrics are ``invited``, ``survivors`` and ``non_finite`` clients,
      ``uplink_bytes`` and ``downlink_bytes`` (counters, see :func:`fedjax_lab.cohort.total_bytes`), the
      server's metrics, and the means of the clients' (NaN in a round that nobody survived).

    Raises:
      ValueError: a cohort larger than the population, labels that the model can't have, a Round whose
        state changes shape or type, arguments of another kind; all before anything is compiled.
    """
    sampler = everyone() if sampler is None else sampler
    if not isinstance(round, Round):
        made = "call it with a model: fedavg(model, optax.sgd(0.1))" if callable(round) else "build one from algorithms"
        raise ValueError(f"synchronous(round, data, sampler) takes a Round first; got {checks.shown(round)}: {made}")
    checks.federated(data, "the data of synchronous(round, data, sampler)")
    check_sampler(sampler)
    sampler.init(data)
    server = jax.eval_shape(lambda key: round.init(key, data), jax.random.key(0))  # checks the data, computes nothing
    mesh, count = devices.checked(mesh), 1
    if mesh is None and stored.mapped(data):
        from fedjax_lab import streaming

        return streaming.streamed(round, data, sampler, lanes)
    _check_alike(data, lanes, mesh)
    if mesh is not None:
        count = mesh.shape[devices.AXIS]
    cohort = check_room(sampler, data, lanes, count)
    lanes = None if lanes is None else int(lanes)  # an array of one would become a traced value in the step
    clients = jax.eval_shape(lambda server, data: empty_states(round, server, data), server, data)
    if not hosts.several():
        shared = jax.local_devices()[0].platform == "cpu"
        memory.require(data.arrays, clients.table, server, cohort, count, shared=shared)
    sizes, (data, specs, apart) = np.asarray(data.sizes), placed(data, mesh)

    def start(key, data, params):
        server_key, run_key = jax.random.split(key)
        server = strong(round.init(server_key, data, params))
        return SimulationState(
            server,
            empty_states(round, server, data, count),
            strong(sampler.init(data)),
            jnp.int32(0),
            run_key,
        )

    def step(state: SimulationState, data: FederatedData, abreast: bool = False):
        public, clients, serving = keys.of_round(state.key, state.round)
        probe = _probe(round, state.server, data, clients, apart)
        ids, present, sampler_state = sampler.sample(state.sampler, public, data, probe)
        env = make_env(state.round, public, ids, present, data.num_clients)
        answers = run_cohort(
            round, state.server, state.clients, data, env, clients, lanes, mesh, sizes, specs, abreast=abreast
        )
        server, server_metrics = serve(round, state.server, answers, env, serving)
        sampler_state = sampler.update(sampler_state, answers.ids, answers.ok, answers.metrics)
        new = SimulationState(server, answers.clients, sampler_state, state.round + 1, state.key)
        return strong(new), cohort_metrics(answers) | server_metrics | probe.cost()

    together = functools.partial(step, abreast=True)
    start, step, state = _compiled(start, step, data, mesh)
    if mesh is None:
        step.abreast = together

    def init(key, params=None):
        return start(typed_key(key), data, params)

    check_stable(compiling.ahead(step, state, data)[0], state)
    lens: Any = round.model
    variables: Any = lambda state: lens.get(state.server) if lens else None
    return Process(
        init, step, data, mesh=mesh, specs=specs,
        params=lambda state: variables(state).params if lens else state.server,
        variables=variables, server=lambda state: state.server,
        clients=lambda state: of_population(state.clients, len(sizes)), round=round,
    )  # fmt: skip


def _check_alike(data: FederatedData, lanes: int | None, mesh: Mesh | None) -> None:
    """Refuse processes of one run that were given different populations."""
    if not hosts.several():
        return
    if mesh is None or mesh.size != jax.device_count():
        raise ValueError("several processes need a mesh over all of their devices: mesh=fl.devices.mesh()")
    fields = [(n, str(a.dtype), a.shape) for n, a in checks.named_leaves(data.arrays)]
    sizes = hashlib.sha256(np.asarray(data.sizes).tobytes()).hexdigest()[:16]
    facts = {"lanes": lanes, "clients": data.num_clients, "the data's fields": fields, "the clients' sizes": sizes}
    hosts.agree({**facts, "small loops as one kernel (XLA_FLAGS)": whole_loops.there_are()})


def check_room(sampler: Sampler, data: FederatedData, lanes: int | None, count: int) -> int:
    """Refuse lanes or devices that a cohort can't fill; returns how many clients it has."""
    if lanes is not None:
        checks.positive(lanes, "lanes", integer=True)
    probe: Any = lambda ids: jnp.zeros(ids.shape)
    key, state = jax.random.key(0), jax.eval_shape(sampler.init, data)
    ids, _, _ = jax.eval_shape(lambda s, d: sampler.sample(s, key, d, probe), state, data)
    cohort = ids.shape[0]
    if count > cohort:
        raise ValueError(
            f"a cohort of {cohort} clients can't be shared out among {count} devices: use a larger cohort, or "
            f"mesh=fl.devices.mesh({cohort})"
        )
    if lanes is not None and lanes * count > cohort:
        each = max(cohort // count, 1)
        raise ValueError(
            f"lanes={lanes} on {count} device{'s' * (count > 1)} are more than a cohort's {cohort} clients: use at "
            f"most lanes={each}, or leave lanes to the engine"
        )
    return cohort


def _compiled(start, step, data: FederatedData, mesh: Mesh | None) -> tuple[Any, Any, Any]:
    """Both jitted, and the state's shapes; over a mesh with the same places for what comes out as for what goes in."""
    state = jax.eval_shape(start, jax.random.key(0), data, None)
    if mesh is None:
        start = compiling.once(start)
        compiling.ahead(start, jax.random.key(0), data, None)
        return start, compiling.jit(step), state
    whole = devices.replicated(mesh)
    places = jax.tree.map(lambda _: whole, state)
    places = places._replace(clients=jax.tree.map(lambda _: devices.by_client(mesh), state.clients))
    # With places, as the first round's state has them: else that round would be traced anew.
    state = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places)
    start = compiling.once(start, mesh, out_shardings=places)
    compiling.ahead(start, jax.random.key(0), data, None)
    return start, compiling.jit(step, mesh, out_shardings=(places, whole)), state


def serve(round: Round, server: PyTree, answers: Answers, env, key) -> tuple[PyTree, dict]:
    """Aggregate and update the server; nothing at all changes in a round that nobody survived.

    The trait ``"moves_alone"``: it changes if somebody was there, even if nobody sent anything.
    """
    env = env._replace(survivors=answers.counts["survivors"])
    if round.aggregate.reduce is None:
        aggregate = round.aggregate.finish(answers.sums, env)
    else:
        uploads, weights, ok, messages = answers.sums
        aggregate = round.aggregate.reduce(uploads, weights, ok, messages, env)
    updated, metrics = round.server_update(server, aggregate, key)
    heard = answers.counts["survivors"] > 0
    if "moves_alone" in round.traits:  # keeping one's upload to oneself is an answer, too
        heard = jnp.sum(env.present) > answers.counts["non_finite"]
    return select(heard, updated, server), metrics


def cohort_metrics(answers: Answers) -> dict[str, jax.Array]:
    """A round's counts and bytes, and the means of the clients' metrics over survivors, by weight."""
    total = jnp.sum(answers.weights)
    means = {
        name: jnp.sum(jnp.where(answers.ok, answers.weights * values, 0)) / total
        for name, values in answers.metrics.items()
    }
    bytes_ = {"uplink_bytes": answers.uplink_bytes, "downlink_bytes": answers.downlink_bytes}
    return {**answers.counts, **bytes_, **means}


def _probe(round: Round, server: PyTree, data: FederatedData, key: jax.Array, apart: bool):
    """``probe(ids)``: candidates' losses under the model they would be sent, and what asking them cost."""
    asked: list[int] = []

    def probe(ids):
        if round.loss is None or round.model is None:
            raise ValueError("this sampler probes the clients' losses, but the Round has no loss")
        if apart:
            raise ValueError(
                "a sampler that probes losses needs one process: here every device has its own clients only"
            )
        variables, loss = round.model.get(server), round.loss
        asked.append(ids.shape[0])
        one = lambda i: mean_loss(loss, variables, data.view(i), jax.random.fold_in(key, i))
        return jax.lax.map(one, ids, batch_size=min(ids.shape[0], 16))

    def cost():
        if not asked:
            return {}
        each = jnp.ones(sum(asked), bool)
        size = nbytes(round.model.get(server))
        return {
            "probe_downlink_bytes": count_bytes(jnp.full(len(each), size, jnp.uint32), each),
            "probe_uplink_bytes": count_bytes(jnp.full(len(each), 4, jnp.uint32), each),
        }

    probe.cost = cost
    return probe


def strong(tree: PyTree) -> PyTree:
    """The same arrays without weak types, which a step would lose and be compiled twice for."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), tree)


def check_stable(new: PyTree, old: PyTree) -> None:
    """Refuse a Round whose state would change type or shape from one round to the next."""
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise ValueError(
            f"a round changes the structure of its state: {jax.tree.structure(old)} became {jax.tree.structure(new)}"
        )
    for (name, a), (_, b) in zip(checks.named_leaves(new), checks.named_leaves(old), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ValueError(
                f"a round changes its state's leaf {name} from {b.dtype}{list(b.shape)} to {a.dtype}{list(a.shape)}"
            )
