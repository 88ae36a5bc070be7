"""Wire: what travels between clients and the server, as pure functions that chain ("optax for the wire").

A *link* turns a pytree into a *payload*: a pytree of arrays in their true width, so that bytes are counted from
what is there. The server first opens each client's payload, adds up what it opened, and decodes the sum. What a
link loses or adds on the way is its own affair; what it costs is the length of the payload.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lab.wire.payload import length

PyTree = Any
Payload = PyTree


class Ctx(NamedTuple):
    """What a link may know besides what it encodes.

    Attributes:
      public: a PRNG key that server and clients share; another one for each link and round.
      private: a PRNG key of the side that computes, ``None`` where nothing random may happen (``open``).
      state: the link's server state; on a client the part of it that travelled down (``Wire.sends``).
      env: the round's :class:`fedjax_lab.Env`, ``()`` outside a round.
      id: the client's position in the population, ``None`` on the server.
    """

    public: Any
    private: Any = None
    state: Any = ()
    env: Any = ()
    id: Any = None

    def part(self, index: int, state: Any = ()) -> "Ctx":
        """The context of the ``index``-th of several links, with keys of its own."""
        private = None if self.private is None else jax.random.fold_in(self.private, index)
        return self._replace(public=jax.random.fold_in(self.public, index), private=private, state=state)


def stateless(like: PyTree) -> tuple:
    """The state of a link that keeps none."""
    return ()


def as_opened(total: PyTree, ctx: Ctx) -> tuple[PyTree, Any]:
    """The ``decode`` of a link whose ``open`` has undone everything."""
    return total, ctx.state


def unbounded(norm: Any, like: PyTree) -> None:
    """The ``bound`` of a link whose output may be arbitrarily large."""
    return None


def not_longer(norm: Any, like: PyTree) -> Any:
    """The ``bound`` or ``gain`` of a link that never lengthens what it is given."""
    return norm


class Wire(NamedTuple):
    """A link, or a chain of them.

    Attributes:
      encode: ``(x, client state, Ctx) -> (payload, client state, bytes)``, on the sender.
      open: ``(payload, Ctx) -> opened``, for each payload by itself; weighted means of ``opened`` are what is
        decoded.
      decode: ``(mean or sum of opened, Ctx) -> (x, server state)``. Float leaves come back in float32 at least.
      init: ``(like) -> server state``; ``like`` has shapes and types of ``x``.
      init_client: ``(like) -> client state``; full part of the client's state, so that it is saved with it.
      sends: ``(server state) -> `` what of it travels down with the message.
      sends_bytes: ``(what sends gives) -> `` its bytes.
      summable: payloads of equal shape may be added up as they are: ``decode`` of their mean is the mean of
        what they stand for (or what the link is meant to make of the mean, such as a sketch's median).
      must_sum: payloads must be added up, unweighted, before anyone looks at them (integers modulo 2^k, central
        noise). The client then lifts by its weight before it encodes.
      collective: one payload alone means nothing (a vote, a server-side memory).
      varies: the payload's length depends on the data.
      coded: it sends codes in place of floats, which only links ``on_codes`` can work on.
      in_place: the payload's floats are those it was given, one for one, in every round: what ``remembers`` may follow.
      remembers: the client's state belongs to entries of what is encoded (error feedback).
      additive: what is decoded of a sum is the sum of what is decoded of each.
      bound: ``(norm or None, like) -> norm or None``: if ``x`` is no longer than this, how long are the floats of
        the payload; of a ``coded`` one, what it stands for. ``None``: unbounded.
      gain: ``(norm or None, like) -> norm or None``: if the payload's floats arrive no longer than this, how long
        is what ``decode`` makes of them.
      bind: for links that add noise: ``(norm) -> Wire``, calibrated to this norm.
      bounds_own: for links that add noise: whether it stands for what is encoded (a client's noise), rather than
        for what arrives (the server's).
      guard: what denominators go through when they are summed with the values; ``None``: they must be fixed.
      links: of a chain.
      name: for messages.
    """

    encode: Callable[[PyTree, Any, Ctx], tuple[Payload, Any, Any]]
    open: Callable[[Payload, Ctx], PyTree]
    decode: Callable[[PyTree, Ctx], tuple[PyTree, Any]] = as_opened
    init: Callable[[PyTree], Any] = stateless
    init_client: Callable[[PyTree], Any] = stateless
    sends: Callable[[Any], Any] = lambda state: state
    sends_bytes: Callable[[Any], Any] = length
    summable: bool = False
    must_sum: bool = False
    collective: bool = False
    varies: bool = False
    coded: bool = False
    on_codes: bool = False
    in_place: bool = False
    remembers: bool = False
    additive: bool = True
    bound: Callable[[Any, PyTree], Any] = unbounded
    gain: Callable[[Any, PyTree], Any] = not_longer
    bind: Callable[[Any], "Wire"] | None = None
    bounds_own: bool = False
    guard: Any = None
    links: tuple = ()
    name: str = "a link"


def identity() -> Wire:
    """The link that changes nothing: everything travels as it is."""
    return Wire(
        encode=lambda x, state, ctx: (x, state, length(x)),
        open=lambda payload, ctx: payload,
        summable=True,
        in_place=True,
        bound=not_longer,
        name="identity",
    )


def undo(wire: Wire, payload: Payload, ctx: Ctx) -> PyTree:
    """What one payload stands for, opened and decoded by itself."""
    return wire.decode(wire.open(payload, ctx), ctx)[0]


def context(key: Any, wire: Wire | None = None, like: PyTree = None) -> Ctx:
    """A context outside any round, for looking at a link by itself.

    Args:
      key: a PRNG key, or an integer seed.
      wire, like: a link with a server state and what it will encode; the state is its first one.
    """
    key = jax.random.key(key) if isinstance(key, int) else key
    public, private = jax.random.split(key)
    state = () if wire is None else wire.init(shapes(like))
    return Ctx(public, private, state, (), jnp.int32(0))


def round_trip(wire: Wire, x: PyTree, key: Any = 0) -> tuple[PyTree, Any]:
    """What arrives of one client's ``x``, sent once by a fresh client; and the bytes that it took."""
    x = jax.tree.map(jnp.asarray, x)
    ctx = context(key, wire, x)
    sent = ctx._replace(state=wire.sends(ctx.state))
    payload, _, size = wire.encode(x, wire.init_client(shapes(x)), sent)
    return undo(wire, payload, ctx), size


# ---- shapes and float leaves ----


def shapes(tree: PyTree) -> PyTree:
    """``jax.ShapeDtypeStruct`` for every leaf."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


@dataclasses.dataclass(frozen=True)
class Like:
    """Structure, shapes and types of a pytree as one hashable value: static data of a payload.

    The server needs it to build the upload of a client that it has never seen.
    """

    structure: Hashable
    leaves: tuple[tuple[tuple[int, ...], str], ...]

    @staticmethod
    def of(tree: PyTree) -> "Like":
        leaves, structure = jax.tree.flatten(tree)
        return Like(structure, tuple((jnp.shape(x), jnp.result_type(x).name) for x in leaves))

    def shapes(self) -> PyTree:
        """The pytree again, with a ``jax.ShapeDtypeStruct`` for every leaf."""
        structure: Any = self.structure
        return jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(s, jnp.dtype(t)) for s, t in self.leaves])


def is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def wide(dtype: Any) -> Any:
    """The type in which something of ``dtype`` is added up: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)


def map_floats(function: Callable, tree: PyTree, *others: PyTree) -> PyTree:
    """``function`` over the float leaves; other leaves stay ``tree``'s."""
    return jax.tree.map(lambda x, *y: function(x, *y) if is_float(x) else x, tree, *others)


def zeros_of(like: PyTree) -> PyTree:
    """Zeros in place of the float leaves, in float32 at least; empty arrays in place of others.

    The memory of links that keep a copy of what they encode.
    """
    return jax.tree.map(lambda s: jnp.zeros(s.shape, wide(s.dtype)) if is_float(s) else jnp.zeros(0, s.dtype), like)


def float_size(like: PyTree) -> int:
    """The number of float entries."""
    return sum(x.size for x in jax.tree.leaves(like) if is_float(x))


def float_norm(tree: PyTree) -> jax.Array:
    """The l2 norm over all float leaves, computed in float32 at least, ``float[]``."""
    floats = [jnp.abs(x.astype(wide(x.dtype))) for x in jax.tree.leaves(tree) if is_float(x)]
    kind = jnp.result_type(jnp.float32, *floats)
    floats = [x.astype(kind) for x in floats if x.size]
    if not floats:
        return jnp.zeros((), kind)
    unit = magnitude(jnp.stack([jnp.max(x) for x in floats]))[0]
    return _root(sum(jnp.sum(jnp.square(x / unit)) for x in floats)) * unit


def l2_norm(x: jax.Array) -> jax.Array:
    """The l2 norm over the last axis, also of entries whose squares are too small or too large for their type."""
    x = jnp.abs(x)
    unit = magnitude(x)
    return _root(jnp.sum(jnp.square(x / unit), axis=-1)) * unit[..., 0]


def _root(square: Any) -> jax.Array:
    """The square root, with a gradient of zero at zero, where an update that is nothing else has NaN."""
    nothing = square == 0
    return jnp.where(nothing, 0, jnp.sqrt(jnp.where(nothing, 1, square)))


def magnitude(x: jax.Array) -> jax.Array:
    """A power of two near the largest entry along the last axis, ``float[..., 1]``; dividing by it rounds nothing."""
    exponent = jnp.frexp(jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0))[1]
    most = jnp.finfo(x.dtype).maxexp * 3 // 4  # beyond it squares of what is left are within the type's range as well
    return jax.lax.stop_gradient(jnp.ldexp(jnp.ones((), x.dtype), jnp.clip(exponent, -most, most)))
