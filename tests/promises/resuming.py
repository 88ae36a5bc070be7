"""Runs for the tests that kill them: a federated one and one that compiles at once.

``python -m tests.promises.resuming OUT ROUNDS CHECKPOINT_EVERY CACHE`` is a session of the federated one.
"""

import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import fedjax_lab as fl
from algorithms.fedadam import fedadam
from fedjax_lab.state_leaves import state_digest
from tests.problems import softmax_data, softmax_model


def federated(learning_rate: float = 0.1) -> fl.Process:
    """FedAdam over clients that keep their momentum, some of whom drop out."""
    algorithm = fedadam(
        softmax_model(),
        optax.sgd(learning_rate, momentum=0.9),
        server_learning_rate=0.05,
        batch_size=4,
        keep_optimizer_state=True,
    )
    return fl.synchronous(algorithm, softmax_data(), fl.dropout(fl.uniform(4), 0.3))


class WalkState(NamedTuple):
    w: jax.Array
    momentum: dict[str, jax.Array]
    table: jax.Array
    known: jax.Array
    nothing: jax.Array
    round: jax.Array
    key: jax.Array


def walk(rate: float = 0.1, width: int = 3, data: fl.FederatedData | None = None) -> fl.Process:
    """A noisy walk with a state of many kinds: a process by hand, which compiles in no time."""

    def init(key, params=None):
        w = jnp.ones(width) if params is None else params
        momentum = {"fast": jnp.zeros(width), "half": jnp.zeros((), jnp.bfloat16)}
        known, nothing = jnp.zeros(8, bool), jnp.zeros((0, 2))
        return WalkState(w, momentum, jnp.zeros((8, width)), known, nothing, jnp.int32(0), key)

    def step(state, data):
        noise = jax.random.normal(jax.random.fold_in(state.key, state.round), (width,))
        fast = 0.9 * state.momentum["fast"] + noise
        momentum = {"fast": fast, "half": state.momentum["half"] + 0.5}
        w = state.w - rate * fast * jnp.sin(state.w)
        seat = state.round % 8
        new = WalkState(
            w, momentum, state.table.at[seat].add(w), state.known.at[seat].set(True),
            state.nothing, state.round + 1, state.key,
        )  # fmt: skip
        sent = jnp.stack([jnp.uint32(40_000), jnp.uint32(7)])  # 2,621,440,007 bytes
        metrics = {"loss": jnp.sum(w**2), "uplink_bytes": sent, "downlink_bytes": 0 * sent + jnp.uint32(1)}
        return new, metrics

    data = softmax_data().on_device() if data is None else data
    whole = lambda state: state
    return fl.Process(
        init, step, data, params=lambda s: s.w, variables=lambda s: None, server=whole, clients=whole, round=None
    )


def forked_session(out: str, rounds: int) -> None:
    fl.run(walk(), rounds, out=out, every=2, checkpoint_every=0)


def session(out: str, rounds: int, checkpoint_every: float, cache: str) -> str:
    """Run, or go on, in a folder; returns the digest of the last state."""
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    result = fl.run(federated(), rounds, out=out, every=2, checkpoint_every=checkpoint_every)
    return state_digest(result.state)


if __name__ == "__main__":
    print(session(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]))
