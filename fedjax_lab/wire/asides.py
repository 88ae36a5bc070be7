"""Single numbers beside a model: a weight, a loss, a learning rate. They travel as they are, whatever the link.

In one vector with the model a few bits would be shared out by the largest of both: FedNova's normaliser of 10 would
leave nothing of updates of 0.01, and a sparsifier might drop it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lab.models.base import Variables
from fedjax_lab.wire.base import Like, Wire, as_opened, stateless
from fedjax_lab.wire.payload import length

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beside:
    """The payload of a tree without its asides, and these."""

    payload: PyTree
    asides: list
    like: Like = dataclasses.field(metadata={"static": True})


def sparing_asides(wire: Wire) -> Wire:
    """The link for trees that may have asides, which it isn't given; for others it is the link itself.

    Links that add noise are given everything: what travels beside it would be seen. So are links that work on sums.
    """
    noisy = any(link.bind is not None for link in wire.links or (wire,))
    if noisy or wire.must_sum or wire.collective or wire.init is not stateless:
        return wire

    def encode(x, state, ctx):
        rest, asides = _apart(x)
        if not asides:
            return wire.encode(x, state, ctx)
        payload, state, _ = wire.encode(rest, state, ctx)
        payload = Beside(payload, [jnp.asarray(a) for a in asides], Like.of(x))
        return payload, state, length(payload)

    def open_(payload, ctx):
        if not isinstance(payload, Beside):
            return wire.open(payload, ctx)
        opened = dataclasses.replace(payload, payload=wire.open(payload.payload, ctx))
        return _together(opened) if wire.decode is as_opened else opened

    def decode(total, ctx):
        if not isinstance(total, Beside):
            return wire.decode(total, ctx)
        rest, state = wire.decode(total.payload, ctx)
        return _together(dataclasses.replace(total, payload=rest)), state

    return wire._replace(
        encode=encode,
        open=open_,
        decode=as_opened if wire.decode is as_opened else decode,
        init_client=stateless if wire.init_client is stateless else lambda like: wire.init_client(_apart(like)[0]),
    )


def _model(x: Any) -> bool:
    return isinstance(x, Variables)


def _is_aside(leaf: Any) -> bool:
    """A float of no axes that isn't within a model's Variables."""
    return not _model(leaf) and jnp.shape(leaf) == () and bool(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact))


def _apart(tree: PyTree) -> tuple[PyTree, list]:
    """The tree with nothing in place of its asides, and these. Where no model is there is nothing beside one."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=_model)
    if not any(map(_model, leaves)):
        return tree, []
    rest = jax.tree.unflatten(structure, [() if _is_aside(leaf) else leaf for leaf in leaves])
    return rest, [leaf for leaf in leaves if _is_aside(leaf)]


def _together(opened: Beside) -> PyTree:
    """The tree again."""
    like, structure = jax.tree.flatten(opened.like.shapes(), is_leaf=_model)
    rest, asides = iter(jax.tree.leaves(opened.payload, is_leaf=_model)), iter(opened.asides)
    return jax.tree.unflatten(structure, [next(asides) if _is_aside(s) else next(rest) for s in like])
