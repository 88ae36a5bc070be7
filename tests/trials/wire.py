"""Trials of the wire: links that encode uploads, some of which may be summed before they are decoded."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import fedjax_lab as fl


class Ctx(NamedTuple):
    """What a link may know: public and private keys, its state that travels down, the round's facts."""

    public: Any
    private: Any
    env: Any


class Link(NamedTuple):
    """The part of design.md's Wire that these trials need; vectors stand for pytrees."""

    init_client: Any  # (vector) -> client state
    encode: Any  # (vector, client state, Ctx) -> (payload, client state)
    decode: Any  # (payload, or a mean of payloads if summable; Ctx; length) -> vector
    summable: bool


def top_k(k):
    """The k entries of largest magnitude, with their indices; can't be summed undecoded."""

    def encode(x, state, ctx):
        indices = jax.lax.top_k(jnp.abs(x), k)[1].astype(jnp.int32)
        return (x[indices], indices), state

    def decode(payload, ctx, length):
        values, indices = payload
        return jnp.zeros(length, values.dtype).at[indices].set(values)

    return Link(lambda x: (), encode, decode, False)


def count_sketch(rows, width):
    """A count sketch with shared hashes (Charikar et al. 2002): linear, so a mean may be taken first."""

    def hashes(key, length):
        where, sign = jax.random.split(key)
        return (
            jax.random.randint(where, (rows, length), 0, width),
            jax.random.rademacher(sign, (rows, length), jnp.float32),
        )

    def encode(x, state, ctx):
        where, sign = hashes(ctx.public, x.size)
        return jax.vmap(lambda w, s: jnp.zeros(width).at[w].add(s * x))(where, sign), state

    def decode(table, ctx, length):
        where, sign = hashes(ctx.public, length)
        return jnp.median(jax.vmap(lambda t, w, s: t[w] * s)(table, where, sign), axis=0)

    return Link(lambda x: (), encode, decode, True)


def error_feedback(link):
    """What a link loses is added to the next upload (Seide et al. 2014; EF14)."""

    def encode(x, state, ctx):
        memory, inner = state
        corrected = x + memory
        payload, inner = link.encode(corrected, inner, ctx)
        return payload, (corrected - link.decode(payload, ctx, x.size), inner)

    return Link(lambda x: (jnp.zeros_like(x), link.init_client(x)), encode, link.decode, link.summable)


def uplink(link):
    """Encode a Round's uploads. Summable payloads are averaged and decoded once; others are decoded first."""

    def transform(inner: fl.Round) -> fl.Round:
        def shape(server, client):
            """The upload's structure, from the message a client would get; nothing is computed."""
            key = jax.random.key(0)
            state = inner.init_client(server, client)
            message = inner.broadcast(server, state, client, key)
            return jax.eval_shape(lambda: inner.client_update(message, state, client, key).upload)

        def init_client(server, client):
            like, _ = ravel_pytree(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape(server, client)))
            return inner.init_client(server, client), link.init_client(like)

        def client_update(message, state, client, key, tilt=fl.identity):
            out = inner.client_update(message, state[0], client, key, tilt=tilt)
            flat, _ = ravel_pytree(out.upload)
            ctx = Ctx(client.env.key, jax.random.fold_in(key, 5), client.env)
            payload, memory = link.encode(flat, state[1], ctx)
            metrics = out.metrics | {"upload_norm": jnp.linalg.norm(flat)}
            return out._replace(upload=payload, state=(out.state, memory), metrics=metrics, bytes_up=None)

        def server_view(message):
            return inner.view.get(message)

        def lift(payload, weight, message, env):
            if link.summable:
                return jax.tree.map(lambda p: p * weight, payload), weight
            flat, back = ravel_pytree(server_view(message))
            return inner.aggregate.lift(
                back(link.decode(payload, Ctx(env.key, None, env), flat.size)), weight, message, env
            )

        def finish(sums, env):
            if not link.summable:
                return inner.aggregate.finish(sums, env)
            return fl.aggregators.divide(*sums), env

        def server_update(server, aggregate, key):
            if link.summable:
                payload, env = aggregate
                flat, back = ravel_pytree(inner.model.get(server))
                aggregate = back(link.decode(payload, Ctx(env.key, None, env), flat.size))
            return inner.server_update(server, aggregate, key)

        return inner._replace(
            init_client=init_client,
            broadcast=lambda server, state, client, key: inner.broadcast(server, state[0], client, key),
            client_update=client_update,
            aggregate=fl.Aggregator(lift, finish),
            server_update=server_update,
            personalize=lambda m, s, client, key: inner.personalize(m, s[0], client, key),
        )

    return transform
