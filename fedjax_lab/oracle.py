"""The slow twin of :func:`fedjax_lab.synchronous`: plain Python loops that tests trust.

One client after the other, batches of their true size, no masks, lanes, chunks, scans or scatters. It
shares with the engine only the Round, the sampler, the PRNG keys and the order of the examples.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab import shuffle
from fedjax_lab.data import FederatedData
from fedjax_lab.process import typed_key
from fedjax_lab.round import Env, Round, upload_bytes
from fedjax_lab.sampling import Sampler, everyone

PyTree = Any


class PlainClient(NamedTuple):
    """ClientData's interface over one client's own arrays; ``fold`` is a Python loop."""

    arrays: PyTree
    size: int
    id: int
    attrs: dict[str, Any]
    env: Any
    max_size: int
    tile: int
    order: tuple[int, ...] | None = None  # of a split's part: which of the arrays' rows, in which order
    own: tuple = ()
    for_use: bool = False

    def take(self, positions) -> PyTree:
        rows = np.clip(np.asarray(positions), 0, max(self.size - 1, 0))
        if self.order is not None:
            rows = np.asarray(self.order)[rows] if self.size else rows * 0
        if self.size == 0:  # masked anyway
            return jax.tree.map(lambda a: jnp.zeros((len(rows), *a.shape[1:]), a.dtype), self.arrays)
        return jax.tree.map(lambda a: jnp.asarray(a[rows]), self.arrays)

    def full(self):
        return self.take(range(max(self.size, 1))), jnp.arange(max(self.size, 1)) < self.size

    def _shuffled(self) -> list[int]:
        if self.order is not None:
            return list(self.order)
        seed = shuffle.derive(jnp.uint32(0x5EED), self.id)
        return np.asarray(shuffle.permute(jnp.arange(max(self.size, 1)), self.size, seed))[: self.size].tolist()

    def split(self, fraction: float):
        count = int(np.floor(np.float32(fraction) * np.float32(self.size) + 0.5))
        count = min(max(count, min(self.size, 1)), max(self.size - 1, min(self.size, 1)))
        order = self._shuffled()
        return self._part(order[:count]), self._part(order[count:])

    def part(self, p: int, of: int):
        order = self._shuffled()
        return self._part(order[p * self.size // of : (p + 1) * self.size // of])

    def _part(self, order):
        return self._replace(
            order=tuple(order),
            size=len(order),
            max_size=max(len(order), 1),
            tile=max(len(order), 1),
        )

    def fold(self, step, carry, *, epochs=1, steps=None, batch_size=None, key=None, static=False):
        size = max(self.size, 1) if batch_size is None else batch_size
        batches = -(-self.size // size)
        trips = int(epochs) * batches if steps is None else (int(steps) if self.size else 0)
        for t in range(trips):
            positions = jnp.arange(t % batches * size, min((t % batches + 1) * size, self.size))
            if key is not None:
                seed = shuffle.derive(shuffle.seed_of(key), t // batches)
                positions = shuffle.permute(positions, self.size, seed)
            step_key = None if key is None else jax.random.fold_in(key, t)
            carry = step(carry, self.take(positions), jnp.ones(len(positions), bool), positions, step_key)
        return carry


class OracleResult(NamedTuple):
    """``server`` state, ``clients``: {position: state}, ``metrics``: a dict for each round."""

    server: PyTree
    clients: dict[int, PyTree]
    metrics: list[dict[str, Any]]
    params: PyTree


def oracle_run(
    round: Round,
    data: FederatedData,
    sampler: Sampler | None = None,
    *,
    num_rounds: int = 1,
    seed: Any = 0,
    params: PyTree = None,
) -> OracleResult:
    """What ``synchronous`` and ``run`` compute, in plain Python.

    Args:
      round, data, sampler: as for :func:`fedjax_lab.synchronous`.
      num_rounds: rounds from the start.
      seed: an integer seed or a PRNG key.
      params: initial parameters instead of the model's own.
    """
    sampler = everyone() if sampler is None else sampler
    server_key, run_key = jax.random.split(typed_key(seed))
    server = round.init(server_key, data, params)
    sampling, clients, metrics = sampler.init(data), {}, []
    for r in range(num_rounds):
        key = jax.random.fold_in(run_key, r)
        public, clients_key, serving = (jax.random.fold_in(key, i) for i in range(3))
        ids, present, sampling = sampler.sample(sampling, public, data, _no_probe)
        env = Env(
            jnp.int32(r),
            public,
            ids,
            ids < data.num_clients,
            present,
            jnp.int32(data.num_clients),
            jnp.sum(present),
        )
        server, record, ok = _one_round(round, server, clients, data, env, clients_key, serving)
        metrics.append(record)
        sampling = sampler.update(sampling, ids, jnp.asarray(ok), {})
    return OracleResult(server, clients, metrics, round.model.get(server).params if round.model else server)


def _no_probe(ids):
    raise ValueError("oracle_run has no probe; use a sampler that doesn't ask for losses")


def _one_round(round: Round, server, clients: dict, data, env: Env, clients_key, serving):
    sums: Any = None
    quiet: Any = None  # zeros, once somebody has answered, if only by keeping its upload to itself
    kept: list[Any] = []  # of each slot, for aggregators that see all uploads
    ok: list[bool] = []
    uplink, total_weight, weighted = 0, 0.0, {}
    for k, present in zip(np.asarray(env.ids).tolist(), np.asarray(env.present).tolist(), strict=True):
        counted, slot = False, None
        if present:
            output, message = _turn(round, server, clients, data, env, clients_key, k)
            lifted = round.aggregate.lift(output.upload, jnp.float32(output.weight), message, env)
            alive = _finite((lifted, output.weight, output.state, output.metrics))
            if alive and "moves_alone" in round.traits:
                quiet = jax.tree.map(jnp.zeros_like, lifted)
            counted = alive and bool(output.sent) and float(output.weight) > 0
            if alive:
                clients[k] = output.state
            if bool(output.sent):
                uplink += int(upload_bytes(output))
            if counted:
                sums = lifted if sums is None else jax.tree.map(lambda a, b: a + b, sums, lifted)
                slot = (output.upload, jnp.float32(output.weight), jnp.bool_(True), message)
                total_weight += float(output.weight)
                for name, value in output.metrics.items():
                    weighted[name] = weighted.get(name, 0.0) + float(output.weight) * float(value)
        ok.append(counted)
        kept.append(slot)
    record: dict[str, Any] = {"survivors": sum(ok), "uplink_bytes": uplink}
    record |= {name: value / total_weight for name, value in weighted.items()}
    if not any(ok):
        if quiet is None or round.aggregate.reduce is not None:
            return server, record, ok
        sums = quiet
    env = env._replace(survivors=jnp.int32(sum(ok)))
    reduce = round.aggregate.reduce
    if reduce is None:
        aggregate = round.aggregate.finish(sums, env)
    else:
        uploads, weights, counted, messages = _stacked(kept)
        aggregate = reduce(uploads, weights, counted, messages, env)
    server, more = round.server_update(server, aggregate, serving)
    return server, record | more, ok


def _stacked(kept: list) -> tuple:
    """Uploads, weights, whether they count, and messages of all slots; zeros for those that don't."""
    nothing = jax.tree.map(jnp.zeros_like, next(slot for slot in kept if slot is not None))
    return jax.tree.map(lambda *x: jnp.stack(x), *[nothing if slot is None else slot for slot in kept])


def _turn(round: Round, server, clients: dict, data: FederatedData, env: Env, clients_key, k: int):
    start, size = int(data.starts[k]), int(data.sizes[k])
    client: Any = PlainClient(
        jax.tree.map(lambda a: np.asarray(a[start : start + size]), data.arrays),
        size, k, {n: v[k] for n, v in data.attrs.items()}, env, max(size, 1), max(size, 1),
    )  # fmt: skip
    state = clients[k] if k in clients else round.init_client(server, client)
    key = jax.random.fold_in(clients_key, k)
    message = round.broadcast(server, state, client, jax.random.fold_in(key, 0))
    return round.client_update(message, state, client, jax.random.fold_in(key, 1)), message


def _finite(tree) -> bool:
    return all(bool(np.isfinite(np.asarray(x, np.float64)).all()) for x in jax.tree.leaves(tree)
               if jnp.issubdtype(jnp.asarray(x).dtype, jnp.inexact))  # fmt: skip
