"""Cold start: what a method gives to clients that never took part."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fedjax_lab import checks, compiling
from fedjax_lab.cohort import make_env, run_cohort
from fedjax_lab.data import FederatedData, Ids
from fedjax_lab.devices import AXIS
from fedjax_lab.evaluation import (
    Evaluate,
    Evaluation,
    beside,
    client_metrics,
    combined,
    merged,
    per_client,
    shares_model,
    summarise,
)
from fedjax_lab.process import Process
from fedjax_lab.round import Round
from fedjax_lab.simulation import serve, strong
from fedjax_lab.states import empty_states

PyTree = Any


class Newcomers(NamedTuple):
    """A process over the newcomers instead of the population, whose state is ``(server, clients)``.

    ``join``: ``(server, round, support) -> (server, clients)``; ``None`` if rounds would teach them nothing.
    """

    process: Process
    join: Any


def cold_start(
    test: FederatedData,
    support: FederatedData,
    participants: FederatedData | None = None,
    *,
    rounds: int = 10,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> Evaluate:
    """Metrics of clients that never took part, beside those of the participants.

    For each metric ``m``, summarised as by :func:`fedjax_lab.per_client`:

    - ``unseen_m``: of the model that the server would send them, as they receive it (if it sends one whole model);
    - ``unseen_personal_m``: of what they would use at first contact, made from their support examples
      (``Round.personalize``): fine-tuned, adapted, reconstructed, with neighbours looked up. Where a method
      trains personal models during the rounds only (Ditto, APFL, FedPer), that is where these begin;
    - ``unseen_joined_m``: of what they would use after ``rounds`` rounds of their own on the support examples,
      while the server stays as it is: personal models, heads and sites are trained, and a hypernetwork's embeddings
      found, with everything that is shared frozen. What the server keeps for single clients starts anew and moves;
    - ``m`` and ``personal_m``: the participants', on their own test examples.

    The personal ones only for Rounds that personalise.

    Args:
      test: the newcomers' examples to evaluate on; ``data.split_clients`` sets clients apart.
      support: those that they personalise on, over the same ids.
      participants: test examples of clients that took part; ``None`` leaves their figures out.
      rounds: of the newcomers' own, all of them in each; 0: none.
      names: only these metrics.
      seed: of what is drawn in those rounds.

    Raises:
      ValueError: other ids in ``support`` than in ``test``, a negative number of rounds; when it is evaluated, a
        newcomer that is part of the population, several processes of one run, or a Round that takes one
        population only (weights or relations given for each client).
    """
    checks.federated(test, "test", empty=True)
    checks.federated(support, "support", empty=True)
    rounds = checks.integer(rounds, "rounds", 0)
    received, first = client_metrics(test, support), client_metrics(test, support, personal=True)
    later = client_metrics(test, personal=True)
    prepared: dict[int, Newcomers] = {}

    def joined(process: Process, state: PyTree) -> Any:
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(state)):
            made = _prepare(process, test, support, rounds, seed)  # its Round may hold traced values
        elif (made := prepared.get(id(process.round))) is None:
            made = prepared[id(process.round)] = _prepare(process, test, support, rounds, seed)
        if made.join is None:
            return first.arrays(process, state)
        number = jnp.asarray(getattr(state, "round", 0), jnp.int32)
        return later.arrays(made.process, made.join(process.server(state), number, made.process.data))

    def arrays(process: Process, state: PyTree) -> dict[str, Any]:
        _apart(process, test)
        found = {}
        if shares_model(process.round) or "personal" not in process.round.traits:
            found["unseen_"] = received.arrays(process, state)
        if "personal" in process.round.traits:
            found["unseen_personal_"] = first.arrays(process, state)
            found["unseen_joined_"] = joined(process, state)
        return found

    newcomers = Evaluation(arrays, lambda found: merged(summarise(m, names, n) for n, m in found.items()))
    return newcomers if participants is None else combined(per_client(participants, names=names), newcomers)


def _apart(process: Process, test: FederatedData) -> None:
    """Refuse newcomers that took part."""
    if test.id_table is process.data.id_table:
        raise ValueError("these clients are the population itself: set some apart with data.split_clients(0.8)")
    known = set(process.data.ids)
    for client in test.ids:
        if client in known:
            raise ValueError(f"client {client!r} is part of the population: cold_start() is of clients that never were")


def _prepare(process: Process, test: FederatedData, support: FederatedData, rounds: int, seed: int) -> Newcomers:
    round, mesh = process.round, process.mesh
    with jax.ensure_compile_time_eval():
        there, specs = beside(support, process)
    server = jax.eval_shape(lambda key: round.init(key, process.data), jax.random.key(0))
    own = _of_single_clients(round, support, server)
    states = jax.eval_shape(lambda server: empty_states(round, server, there), server)
    within = process._replace(data=there, specs=specs, server=lambda s: s[0], clients=lambda s: s[1])
    if not rounds or not (any(jax.tree.leaves(own)) or jax.tree.leaves(states.table)):
        return Newcomers(within, None)
    sizes, count = np.asarray(support.sizes), support.num_clients
    devices = 1 if mesh is None else mesh.shape[AXIS]
    mixed = lambda new, old: jax.tree.map(lambda mine, n, o: n if mine else o, own, new, old)

    def join(server, number, support):
        key = jax.random.key(seed)
        server = strong(mixed(round.init(jax.random.fold_in(key, 0), support), server))

        def one(i, carry):
            server, clients = carry
            turn = jax.random.fold_in(key, i + 1)
            public, private, serving = (jax.random.fold_in(turn, j) for j in range(3))
            env = make_env(number + i, public, jnp.arange(count), jnp.ones(count, bool), count)
            answers = run_cohort(round, server, clients, support, env, private, None, mesh, sizes, specs)
            updated, _ = serve(round, server, answers, env, serving)
            return strong(mixed(updated, server)), answers.clients

        return jax.lax.fori_loop(0, rounds, one, (server, empty_states(round, server, support, devices)))

    return Newcomers(within, compiling.jit(join, mesh))


def _of_single_clients(round: Round, support: FederatedData, trained: PyTree) -> PyTree:
    """Which leaves of the server's state are kept for single clients: those that grow with the population."""
    two = lambda x: np.concatenate([np.asarray(x)] * 2)
    twice = dataclasses.replace(
        support,
        starts=two(support.starts),
        sizes=two(support.sizes),
        attrs={name: two(value) for name, value in support.attrs.items()},
        id_table=Ids(range(2 * support.num_clients)),
    )
    made = [jax.eval_shape(lambda key, d=d: round.init(key, d), jax.random.key(0)) for d in (support, twice)]
    return jax.tree.map(lambda a, b, c: a.shape != b.shape or a.shape != c.shape, *made, trained)
