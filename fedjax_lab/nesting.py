"""Rounds around a Round: state and messages that hold the inner ones, and what follows from that."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lab.aggregators import within
from fedjax_lab.round import ClientOutput, Env, Message, Round, identity, through


def nested(round: Round, *, message: bool = True, client: bool = False, **parts: Any) -> Round:
    """A Round whose server state has the inner round's as its field ``inner``.

    Lenses, ``personalize``, ``init_client``, ``broadcast`` and the aggregator look inside by themselves; what the
    outer round does differently is given, as for ``round._replace``.

    Args:
      round: the inner Round.
      message: whether messages hold the inner ones in the same way; ``broadcast`` must be given then.
      client: whether client states do; ``init_client`` must be given then.
      **parts: fields of :class:`fedjax_lab.Round`.
    """
    inside: Any = lambda nest: nest.inner
    put: Any = lambda nest, part: nest._replace(inner=part)
    sent, kept = inside if message else identity, inside if client else identity
    own: dict[str, Any] = {
        "init_client": lambda server, client: round.init_client(server.inner, client),
        "broadcast": lambda server, state, client, key: round.broadcast(server.inner, kept(state), client, key),
    }
    if round.personalize is not None:
        own["personalize"] = lambda m, s, client, key: round.personalize(sent(m), kept(s), client, key)
    if round.model is not None:
        own["model"] = through(inside, put, round.model)
    if message:
        own["aggregate"] = within(round.aggregate, inside)
        if round.view is not None:
            own["view"] = through(inside, put, round.view)
    return round._replace(**own | parts)


def first_message(round: Round, server: Any, state: Any, client: Any) -> Message:
    """What a client would be sent now; outside of rounds, as if it were alone in round 0."""
    if not client.env:
        one, here = jnp.zeros(1, jnp.int32), jnp.ones(1, bool)
        env = Env(jnp.int32(0), jax.random.key(0), one, here, here, jnp.int32(1), jnp.int32(1))
        plain = hasattr(client, "_replace")  # the oracle's
        client = client._replace(env=env) if plain else dataclasses.replace(client, env=env)
    return round.broadcast(server, state, client, jax.random.key(0))


def first_turn(round: Round, server: Any, data: Any) -> tuple[ClientOutput, Message, Env]:
    """What client 0 answers in round 0 if it is alone there, for the shapes: to be traced, not run."""
    one, here = jnp.zeros(1, jnp.int32), jnp.ones(1, bool)
    key = jax.random.key(0)
    env = Env(jnp.int32(0), key, one, here, here, jnp.int32(data.num_clients), jnp.int32(1))
    client = data.view(jnp.int32(0), env)
    state = round.init_client(server, client)
    message = round.broadcast(server, state, client, key)
    return round.client_update(message, state, client, key), message, env
