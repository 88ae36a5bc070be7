"""What clients upload goes through a wire: compressed, sketched, clipped, noised, summed in integers."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.client import ClientData
from fedjax_lab.nesting import first_turn
from fedjax_lab.round import Aggregator, Env, Round, Transform, Verbatim, identity, marked, through, unmarked
from fedjax_lab.wire.asides import sparing_asides
from fedjax_lab.wire.base import Ctx, Like, Wire, as_opened, float_norm, shapes, stateless, undo
from fedjax_lab.wire.chaining import chain
from fedjax_lab.wire.sometimes import by_occasion

PyTree = Any
_TAG = 0x1174  # folded into keys that others fold from too
_SERVER = 0x5E12
_SINGLE, _PARTS = "this Round's looks at each client's upload", "this Round's treats parts of an upload differently"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UplinkServer:
    """The inner server's state, and the wire's; ``like`` is what is encoded, where the wire must know."""

    inner: Any
    wire: Any
    like: Like | None = dataclasses.field(default=None, metadata={"static": True})


class Uplinked(NamedTuple):
    """The inner message and what of the wire's state travels down; or the inner client's state and the wire's."""

    inner: Any
    wire: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Protected:
    """An upload of which only the sum may be looked at, or that sum, opened.

    ``values`` and ``denominators`` are payloads of what the inner aggregator lifted; ``like`` is what the latter
    look like, where they are fixed and don't travel.
    """

    values: Any
    denominators: Any
    like: Like = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Opened:
    """Opened payloads, which are decoded after the sum. Opaque to aggregators but for ``jax.tree.map``."""

    content: PyTree


def uplink(*links: Wire, max_weight: Any = None, denominators: Any = None) -> Transform:
    """Send uploads through links: ``uplink(error_feedback(top_k(0.05)), qsgd(8))``.

    The longest summable prefix of the links is undone once, after the sum, if the inner aggregator is a mean of the
    whole upload; what is behind it, and everything otherwise, is undone for each client. A client whose upload is
    not finite counts as absent, whatever the links would make of it; one that sends nothing keeps its memories.

    Single numbers that an algorithm sends beside a model's update (FedNova's normaliser, a loss) travel as they are, so
    that the links don't mix them up with the update; noise and links that work on sums are given them, too.

    Links that must be summed (fixed point, central noise) are given lifted values, weight times upload, so that
    nothing but a sum is ever looked at.

    Args:
      *links: see :mod:`fedjax_lab.wire`; none of them is the inner round itself.
      max_weight: where payloads must be summed: the largest weight of a client. Larger ones are cut to it, and
        lifting is by ``weight / max_weight``, at most 1 (McMahan et al., ICLR 2018, algorithm 1).
      denominators: what the mean divides by in that case: the expected sum of these weights, fixed, as central
        noise needs it; ``None``: the denominators are summed under the same protection.

    Raises:
      ValueError: links that don't make sense together; links that must be summed and no ``max_weight``, or noise
        and no fixed ``denominators``; an aggregator that needs every client's own upload, or isn't a mean of the
        whole upload, with links that work on sums. All when the round or the process is built.
    """
    wire = chain(*links)
    _check(wire, max_weight, denominators)

    def transform(round: Round) -> Round:
        if wire.name == "identity":
            return round
        if "moving_units" in round.traits and wire.init_client is not stateless:
            raise ValueError(f"{wire.name} remembers entries, but federated_dropout() sends others each round")
        return _protected(round, wire, max_weight, denominators) if wire.must_sum else _plain(round, wire)

    return transform


def _check(wire: Wire, max_weight: Any, denominators: Any) -> None:
    if not wire.must_sum:
        given = [n for n, v in (("max_weight", max_weight), ("denominators", denominators)) if v is not None]
        if given:
            raise ValueError(f"{given[0]} is for links that must be summed (fixed point, noise), and {wire.name} isn't")
        return
    if max_weight is None:
        raise ValueError(
            f"{wire.name} must be summed, so clients lift their uploads by their weights before encoding: say how "
            'large a weight can be, uplink(..., max_weight=1) for weighting="uniform", or a number of examples'
        )
    checks.positive(max_weight, "max_weight")
    if denominators is not None:
        checks.positive(denominators, "denominators")
    elif wire.guard is None:
        raise ValueError(
            f"{wire.name} hides uploads behind noise, which exact denominators would look past: give the expected sum "
            "of weight / max_weight, uplink(..., denominators=cohort_size) for equal weights"
        )


# ---- payloads that may be looked at one by one ----


def _plain(round: Round, wire: Wire) -> Round:
    inner, wire = round.aggregate, by_occasion(sparing_asides(wire))

    def client_update(message, state, client, key, tilt=identity):
        out = round.client_update(message.inner, state.inner, client, key, tilt=tilt)
        upload = marked(out.upload, out.parts)
        payload, kept, size = wire.encode(upload, state.wire, _on_client(client, key, message))
        return _output(out, payload, kept, size, state.wire)

    def decode(opened, ctx):
        return unmarked(wire.decode(opened, ctx)[0])

    def lift(payload, weight, message, env):
        ctx = _ctx(env, _told(message))
        opened = wire.open(payload, ctx)
        if wire.decode is as_opened:
            return inner.lift(unmarked(opened), weight, message.inner, env)
        if is_mean_of_everything(inner, opened, weight, message.inner, env):
            return inner.lift(Opened(opened), weight, message.inner, env)
        _refuse_sums(wire, _PARTS if inner.reduce is None else _SINGLE)
        return inner.lift(decode(opened, ctx), weight, message.inner, env)

    def finish(sums, env):
        mean = inner.finish(sums, env)
        return Opened((mean.content, env)) if isinstance(mean, Opened) else mean

    def reduce(payloads, weights, ok, messages, env):
        _refuse_sums(wire, _SINGLE)
        one = lambda payload, message: unmarked(undo(wire, payload, _ctx(env, _told(message))))
        uploads = jax.vmap(one)(payloads, messages)
        # What an absent client's zeros decode to is nobody's upload.
        uploads = jax.tree.map(lambda u: jnp.where(ok.reshape(-1, *[1] * (u.ndim - 1)), u, 0), uploads)
        return inner.reduce(uploads, weights, ok, messages.inner, env)

    def server_update(server, aggregate, key):
        own = server.wire
        if isinstance(aggregate, Opened):
            mean, env = aggregate.content
            aggregate, own = wire.decode(mean, _ctx(env, own, jax.random.fold_in(key, _SERVER)))
            aggregate = unmarked(aggregate)
        updated, metrics = round.server_update(server.inner, aggregate, key)
        return dataclasses.replace(server, inner=updated, wire=own), metrics

    aggregate = Aggregator(lift, finish, None if inner.reduce is None else reduce)
    encoded = lambda out, message, env: marked(out.upload, out.parts)
    return _wrapped(round, wire, client_update, aggregate, server_update, encoded)


def is_mean_of_everything(aggregator: Aggregator, opened: PyTree, weight, message, env: Env) -> bool:
    """Whether an aggregator treats an upload as one thing, so that it can as well average encoded ones.

    It is asked to lift and finish an upload that it can do nothing with but map over the leaves.
    """
    if aggregator.reduce is not None:
        return False
    probe = Opened(opened)

    def both(upload, weight, message, env):
        value, denominators = aggregator.lift(upload, weight, message, env)
        return value, aggregator.finish((value, denominators), env)

    try:
        found = jax.eval_shape(both, probe, weight, message, env)
    except Exception:  # whatever an aggregator raises that takes the upload apart
        return False
    return all(jax.tree.structure(part) == jax.tree.structure(probe) for part in found)


def _refuse_sums(wire: Wire, why: str) -> None:
    if wire.collective or wire.init is not stateless:
        raise ValueError(f"{wire.name} needs an aggregator that is a mean of whole uploads, but {why}")


# ---- payloads of which only the sum may be looked at ----


def _protected(round: Round, wire: Wire, max_weight: Any, fixed: Any) -> Round:
    inner = round.aggregate
    if inner.reduce is not None:
        raise ValueError(f"{wire.name} gives sums only, but {_SINGLE}")

    def lifted(out, message, env):
        weight = jnp.minimum(jnp.asarray(out.weight, jnp.float32), max_weight) / max_weight
        return inner.lift(out.upload, weight, message.inner, env)

    def client_update(message, state, client, key, tilt=identity):
        out = round.client_update(message.inner, state.inner, client, key, tilt=tilt)
        ctx = _on_client(client, key, message)
        value, below = lifted(out, message, client.env)
        payload, kept, size = wire.encode(value, state.wire, ctx)
        guarded: Any = ()
        if fixed is None:
            fits = wire.guard.init_client(shapes(below))
            guarded, fits, more = wire.guard.encode(below, fits, ctx.part(_SERVER))
            size = size + more
            # A denominator that doesn't fit makes the client absent, as a value does.
            out = out._replace(weight=jnp.where(jnp.isfinite(float_norm(fits)), out.weight, jnp.nan))
        return _output(out, Protected(payload, guarded, Like.of(below)), kept, size, state.wire)

    def lift(payload, weight, message, env):
        ctx = _ctx(env, _told(message))
        values, below = wire.open(payload.values, ctx), payload.denominators
        if fixed is None:
            below = wire.guard.open(below, ctx.part(_SERVER))
        return Protected(values, below, payload.like), ()

    def server_update(server, aggregate, key):
        total, env = aggregate.content
        ctx = _ctx(env, server.wire, jax.random.fold_in(key, _SERVER))
        value, own = wire.decode(total.values, ctx)
        if fixed is None:
            below = wire.guard.decode(total.denominators, ctx.part(_SERVER))[0]
        else:
            below = jax.tree.map(lambda s: jnp.full(s.shape, fixed, s.dtype), total.like.shapes())
        updated, metrics = round.server_update(server.inner, inner.finish((value, below), env), key)
        return dataclasses.replace(server, inner=updated, wire=own), metrics

    aggregate = Aggregator(lift, lambda sums, env: Opened((sums[0], env)))
    value = lambda out, message, env: lifted(out, message, env)[0]
    made = _wrapped(round, wire, client_update, aggregate, server_update, value)
    return made._replace(traits=made.traits | {"summed"})


# ---- shared ----


def _wrapped(round: Round, wire: Wire, client_update, aggregate, server_update, encoded) -> Round:
    """The inner round with its states nested; ``encoded(out, message, env)`` is what the wire is given."""

    def init(key, data, params=None):
        server = round.init(key, data, params)
        if wire.init is stateless and wire.init_client is stateless:
            return UplinkServer(server, ())

        def example(server, data):
            output, message, env = first_turn(round, server, data)
            return encoded(output, Uplinked(message, ()), env)

        # The data as an argument: their shapes are enough, and no array of them is looked at.
        like = jax.eval_shape(example, server, data)
        return UplinkServer(server, wire.init(like), Like.of(like))

    def init_client(server, client):
        own = () if wire.init_client is stateless else wire.init_client(server.like.shapes())
        return Uplinked(round.init_client(server.inner, client), own)

    def broadcast(server, state, client, key):
        told = wire.sends(server.wire)
        told = Verbatim(told, wire.sends_bytes(told)) if jax.tree.leaves(told) else told
        return Uplinked(round.broadcast(server.inner, state.inner, client, key), told)

    inside, put = lambda nest: nest.inner, lambda nest, part: nest._replace(inner=part)
    within_server = lambda server, part: dataclasses.replace(server, inner=part)
    personal = round.personalize
    return round._replace(
        init=init,
        init_client=init_client,
        broadcast=broadcast,
        client_update=client_update,
        aggregate=aggregate,
        server_update=server_update,
        personalize=personal and (lambda m, s, client, key: personal(m.inner, s.inner, client, key)),
        model=round.model and through(inside, within_server, round.model),
        view=round.view and through(inside, put, round.view),
        traits=round.traits | {"encoded"},
    )


def _output(out, payload: PyTree, kept: PyTree, size: Any, before: PyTree):
    """A client's output with its upload encoded."""
    finite = jnp.isfinite(jnp.square(float_norm(out.upload)))
    weight = jnp.where(finite, jnp.asarray(out.weight, jnp.float32), jnp.nan)  # which the engine takes as absent
    # Memories move only with an upload that counts; others would lose what they hold.
    counts = jnp.asarray(out.sent, bool) & ~(weight <= 0)
    kept = jax.tree.map(lambda new, old: jnp.where(counts, new, old), kept, before)
    return out._replace(upload=payload, weight=weight, state=Uplinked(out.state, kept), bytes_up=size, parts=None)


def _on_client(client: ClientData, key: jax.Array, message: Uplinked) -> Ctx:
    ctx = _ctx(client.env, _told(message), jax.random.fold_in(key, _TAG))
    return ctx._replace(id=client.id)


def _told(message: Uplinked) -> PyTree:
    """What the server's side of the link tells the clients, who must know it exactly to undo what they send."""
    return message.wire.content if isinstance(message.wire, Verbatim) else message.wire


def _ctx(env: Env, state: PyTree, private: Any = None) -> Ctx:
    return Ctx(jax.random.fold_in(env.key, _TAG), private, state, env)
