"""Links for what travels in some rounds only: each such part by itself, charged and remembered only then."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lab.round import Sometimes
from fedjax_lab.wire.base import Like, Wire, as_opened, stateless
from fedjax_lab.wire.payload import Reader, length, read, serialize

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Occasional:
    """Payloads of parts, and ``there``: whether each travels, which both sides know."""

    parts: list
    there: list
    like: Like = dataclasses.field(metadata={"static": True})

    def wire_bytes(self) -> Any:
        sizes = [jnp.where(there, length(part), 0) for part, there in zip(self.parts, self.there, strict=True)]
        return jnp.uint32(sum(sizes))

    def dump(self) -> bytes:
        return b"".join(serialize(p) for p, there in zip(self.parts, self.there, strict=True) if there)

    def load(self, reader: Reader) -> "Occasional":
        both = zip(self.parts, self.there, strict=True)
        return dataclasses.replace(self, parts=[read(p, reader) if there else p for p, there in both])


def by_occasion(wire: Wire) -> Wire:
    """The link for trees in which there may be :class:`fedjax_lab.round.Sometimes`; for others it is the link itself.

    Every such part, and what always travels, is encoded by itself. What isn't there takes no bytes, changes no
    memory, and arrives as zeros.

    Raises:
      ValueError: such a tree for a link that makes sense of sums only; when the process is built.
    """

    def encode(x, state, ctx):
        if not _some(x):
            return wire.encode(x, state, ctx)
        _refuse_sums(wire)
        parts, there = _apart(x)
        payloads, new = [], []
        for i, (part, t) in enumerate(zip(parts, there, strict=True)):
            before = state[i] if state else ()
            payload, after, _ = wire.encode(part, before, ctx.part(i))
            payloads.append(payload)
            new.append(jax.tree.map(lambda a, b, t=t: jnp.where(t, a, b), after, before))
        payload = Occasional(payloads, [jnp.asarray(t) for t in there], Like.of(x))
        return payload, tuple(new) if state else (), length(payload)

    def open_(payload, ctx):
        if not isinstance(payload, Occasional):
            return wire.open(payload, ctx)
        parts = [wire.open(part, ctx.part(i)) for i, part in enumerate(payload.parts)]
        opened = dataclasses.replace(payload, parts=parts)
        return _together(opened) if wire.decode is as_opened else opened

    def decode(total, ctx):
        if not isinstance(total, Occasional):
            return wire.decode(total, ctx)
        parts = [wire.decode(part, ctx.part(i))[0] for i, part in enumerate(total.parts)]
        return _together(dataclasses.replace(total, parts=parts)), ctx.state

    def init_client(like):
        if not _some(like):
            return wire.init_client(like)
        return tuple(wire.init_client(part) for part in _apart(like)[0])

    return wire._replace(
        encode=encode,
        open=open_,
        decode=as_opened if wire.decode is as_opened else decode,
        init_client=stateless if wire.init_client is stateless else init_client,
    )


def _is_part(x: Any) -> bool:
    return isinstance(x, Sometimes)


def _some(tree: PyTree) -> bool:
    return any(map(_is_part, jax.tree.leaves(tree, is_leaf=_is_part)))


def _apart(tree: PyTree) -> tuple[list, list]:
    """What always travels, if it is anything, and the other parts; whether each is there.

    The former keeps its structure, with nothing in place of these, so that links find a model and numbers beside it.
    """
    parts = [x for x in jax.tree.leaves(tree, is_leaf=_is_part) if _is_part(x)]
    always = jax.tree.map(lambda x: () if _is_part(x) else x, tree, is_leaf=_is_part)
    contents, there = [x.content for x in parts], [x.there for x in parts]
    return ([always, *contents], [True, *there]) if jax.tree.leaves(always) else (contents, there)


def _together(payload: Occasional) -> PyTree:
    """The tree again, with zeros in what isn't there."""
    whole: Any = payload.like.shapes()
    leaves, structure = jax.tree.flatten(whole, is_leaf=_is_part)
    both = list(zip(payload.parts, payload.there, strict=True))
    always = jax.tree.leaves(both.pop(0)[0]) if len(both) > sum(map(_is_part, leaves)) else []
    out = []
    for leaf in leaves:
        if not _is_part(leaf):
            out.append(always.pop(0))
            continue
        part, there = both.pop(0)
        out.append(Sometimes(jax.tree.map(lambda x, t=there: jnp.where(t, x, jnp.zeros_like(x)), part), there))
    return jax.tree.unflatten(structure, out)


def _refuse_sums(wire: Wire) -> None:
    if wire.collective or wire.must_sum or wire.init is not stateless:
        raise ValueError(
            f"{wire.name} works on sums of whole uploads, but of this Round's some parts travel in some rounds only"
        )
