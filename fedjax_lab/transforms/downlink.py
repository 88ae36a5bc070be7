"""What the server broadcasts goes through a wire, as changes of what each client last saw."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lab.aggregators import within
from fedjax_lab.nesting import first_message
from fedjax_lab.round import Round, Sent, Sometimes, Transform, Verbatim, identity, nbytes, through
from fedjax_lab.wire.asides import sparing_asides
from fedjax_lab.wire.base import Ctx, Wire, map_floats, stateless, undo, zeros_of
from fedjax_lab.wire.chaining import chain
from fedjax_lab.wire.sometimes import by_occasion

PyTree = Any
_TAG = 0xD011


class Seen(NamedTuple):
    """A client's ``reference``, the message that it last acted on; whether there is one; and the inner state."""

    reference: PyTree
    met: Any
    inner: Any


def downlink(*links: Wire, deltas: bool = True) -> Transform:
    """Send messages through links: ``downlink(top_k(0.1), qsgd(8))``.

    The server sends a client how the message differs from what this client last saw, and keeps in step with what
    the client makes of it: a reference for each client, as large as a message. At first contact, and until a
    client has answered once, the message travels whole. What a lossy link loses is thus part of the next difference:
    memories such as error feedback are neither needed nor taken. Single numbers beside the model (a learning rate)
    travel as they are.

    Args:
      *links: see :mod:`fedjax_lab.wire`; none of them is the inner round itself.
      deltas: ``False``: encode the message itself, and keep nothing (a quantized broadcast).

    Raises:
      ValueError: links that keep a memory or work on sums, of which there are none on the way down.
    """
    wire = chain(*links)
    if wire.must_sum or wire.collective or wire.init is not stateless:
        raise ValueError(f"{wire.name} works on sums, and a broadcast has none: use it for fl.uplink")
    if wire.init_client is not stateless:
        raise ValueError(
            f"{wire.name} remembers what it lost, which downlink() does already: each client's reference is what it "
            "really has. Give the link alone"
        )
    if any(link.bind is not None for link in wire.links):
        raise ValueError("noise on a broadcast protects nobody's upload: put it into fl.uplink")

    def transform(round: Round) -> Round:
        if wire.name == "identity":
            return round
        if deltas and "moving_units" in round.traits:
            raise ValueError(
                "downlink() sends changes of what a client last saw, where federated_dropout() sends other units each "
                "round: use downlink(..., deltas=False)"
            )
        own = by_occasion(sparing_asides(wire))
        return _with_references(round, own) if deltas else _plain(round, own)

    return transform


def _encoded(wire: Wire, x: PyTree, like: PyTree, client: Any, key: jax.Array) -> tuple[PyTree, Any]:
    """What arrives of ``x``, in the types of ``like``, and the bytes it takes."""
    public, private = jax.random.fold_in(client.env.key, _TAG), jax.random.fold_in(key, _TAG)
    ctx = Ctx(public, private, (), client.env, client.id)
    payload, _, size = wire.encode(x, (), ctx)
    got = undo(wire, payload, ctx._replace(private=None))
    return map_floats(lambda g, m: g.astype(m.dtype), got, like), size


def _verbatim(x: Any) -> bool:
    return isinstance(x, Verbatim)


def _without(message: PyTree) -> tuple[PyTree, list[Verbatim]]:
    """The message without what must arrive as it is, and that."""
    exact = [x for x in jax.tree.leaves(message, is_leaf=_verbatim) if _verbatim(x)]
    return jax.tree.map(lambda x: () if _verbatim(x) else x, message, is_leaf=_verbatim), exact


def _with(message: PyTree, rest: PyTree) -> PyTree:
    """The message with all but that replaced by ``rest``."""
    leaves, structure = jax.tree.flatten(message, is_leaf=_verbatim)
    arrived = iter(jax.tree.leaves(rest))
    return jax.tree.unflatten(structure, [x if _verbatim(x) else next(arrived) for x in leaves])


def _plain(round: Round, wire: Wire) -> Round:
    def broadcast(server, state, client, key):
        message = round.broadcast(server, state, client, key)
        rest, exact = _without(message)
        got, size = _encoded(wire, rest, rest, client, key)
        return Sent(_with(message, got), size + nbytes(exact))

    def client_update(message, state, client, key, tilt=identity):
        return round.client_update(message.content, state, client, key, tilt=tilt)

    personal = round.personalize
    return _opening(round)._replace(
        broadcast=broadcast,
        client_update=client_update,
        personalize=personal and (lambda m, s, client, key: personal(m.content, s, client, key)),
    )


def _with_references(round: Round, wire: Wire) -> Round:
    def init_client(server, client):
        inner = round.init_client(server, client)
        like = jax.eval_shape(lambda s, i: first_message(round, s, i, client), server, inner)
        return Seen(zeros_of(_without(like)[0]), jnp.bool_(False), inner)

    def broadcast(server, state, client, key):
        message = round.broadcast(server, state.inner, client, key)
        rest, exact = _without(message)
        rest = _as_seen(rest, state.reference)
        change = map_floats(lambda m, r: m.astype(r.dtype) - r, rest, state.reference)
        got, size = _encoded(wire, change, change, client, key)
        known = map_floats(lambda m, r, g: (r + g).astype(m.dtype), rest, state.reference, got)
        content = map_floats(lambda k, m: jnp.where(state.met, k, m), known, rest)
        length = jnp.where(state.met, jnp.uint32(size + nbytes(exact)), jnp.uint32(nbytes(message)))
        return Sent(_with(message, content), length)

    def client_update(message, state, client, key, tilt=identity):
        out = round.client_update(message.content, state.inner, client, key, tilt=tilt)
        # Kept by the engine if the client answers: the server then knows that the message arrived.
        reference = map_floats(lambda r, m: m.astype(r.dtype), state.reference, _without(message.content)[0])
        return out._replace(state=Seen(reference, jnp.bool_(True), out.state))

    personal = round.personalize
    return _opening(round)._replace(
        init_client=init_client,
        broadcast=broadcast,
        client_update=client_update,
        personalize=personal and (lambda m, s, client, key: personal(m.content, s.inner, client, key)),
        traits=round.traits | {"in_step"},
    )


def _as_seen(message: PyTree, reference: PyTree) -> PyTree:
    """The message, what doesn't travel this time as the client last saw it."""
    is_part = lambda x: isinstance(x, Sometimes)

    def one(x, seen):
        if not is_part(x):
            return x
        return Sometimes(
            map_floats(lambda c, s: jnp.where(x.there, c, s.astype(c.dtype)), x.content, seen.content), x.there
        )

    return jax.tree.map(one, message, reference, is_leaf=is_part)


def _opening(round: Round) -> Round:
    """The round whose message travels inside a :class:`fedjax_lab.round.Sent`."""
    inside, put = lambda m: m.content, lambda m, part: Sent(part, m.length)
    return round._replace(
        aggregate=within(round.aggregate, inside),
        view=round.view and through(inside, put, round.view),
    )
