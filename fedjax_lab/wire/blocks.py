"""Links applied to parts: by parameter, by equal blocks, or another link for each part of the model."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.wire.base import Ctx, Like, Wire, as_opened, float_size, identity, is_float, not_longer, stateless, undo
from fedjax_lab.wire.payload import Reader, length, read, serialize
from fedjax_lab.wire.rotation import in_rows
from fedjax_lab.wire.vectors import ravel, size_of, unravel

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """Payloads of several parts, and what they are parts of."""

    parts: list
    like: Like = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Own:
    """The server state of one part's link, and which of the links that is."""

    state: PyTree
    link: int = dataclasses.field(metadata={"static": True})


def grouped(link: Wire, *, size: int | None = None, count: int | None = None) -> Wire:
    """The link for each parameter by itself, or for equal blocks of all of them in a row.

    Scales, thresholds and shares are then of each part: QSGD's buckets are ``grouped(qsgd(4), size=512)``.

    Args:
      link: what each part goes through.
      size: entries of a block, the last one filled up with zeros.
      count: or how many blocks.

    Raises:
      ValueError: both ``size`` and ``count``, or one that isn't positive.
    """
    _check_link(link, "grouped")
    if size is not None and count is not None:
        raise ValueError("grouped(link) takes size= or count= of the blocks, not both")
    if size is None and count is None:
        return _by_part(f"grouped({link.name})", lambda names: [0] * len(names), (link,))
    checks.positive(size if count is None else count, "size" if count is None else "count", integer=True)
    return _by_block(link, size, count)


def split(routes: Mapping[str, Wire], rest: Wire | None = None) -> Wire:
    """Another link for each part of the model, point to point.

    ``split({"conv": top_k(0.1), "dense": qsgd(4)})`` sends each parameter through the link of the first pattern
    that occurs in its name.

    Args:
      routes: regular expressions, searched in names such as ``params/Dense_0/kernel``, to links.
      rest: for parameters that no pattern names; by default they travel as they are.

    Raises:
      ValueError: no routes, or no links; a pattern that is no regular expression; one that
        names no parameter, when the process is built.
    """
    if not isinstance(routes, Mapping) or not routes:
        raise ValueError('split({"pattern": link, ...}) needs at least one route')
    for link in (*routes.values(), *(() if rest is None else (rest,))):
        _check_link(link, "split")
    for pattern in routes:
        try:
            re.compile(pattern)
        except (TypeError, re.error) as error:
            raise ValueError(f"split's {checks.shown(pattern)} is no regular expression: {error}") from None
    links = (*routes.values(), identity() if rest is None else rest)

    def choose(names: list[str]) -> list[int]:
        for pattern in routes:
            if not any(re.search(pattern, name) for name in names):
                near = checks.nearest(pattern, names)
                raise ValueError(f"no parameter's name has {pattern!r}{near}; there are {names}")
        pick = lambda name: next((i for i, p in enumerate(routes) if re.search(p, name)), len(routes))
        return [pick(name) for name in names]

    name = f"split({', '.join(link.name for link in links)})"
    return _by_part(name, choose, links)


def _check_link(link: Any, what: str) -> None:
    if not isinstance(link, Wire):
        raise ValueError(f"{what} takes links such as wire.top_k(0.05); got {checks.shown(link)}")
    if any(each.bind is not None for each in link.links or (link,)):
        raise ValueError(f"{what}: noise is calibrated to the bound of all parts together: put it behind")


def _by_part(name: str, choose: Callable[[list[str]], list[int]], links: tuple[Wire, ...]) -> Wire:
    """For every float leaf the link that ``choose(names)`` has the number of; the others travel as they are."""
    known = (*links, identity())

    def numbers(like: PyTree) -> list[int]:
        named = checks.named_leaves(like)
        chosen = choose([n for n, _ in named])
        return [i if is_float(leaf) else len(links) for i, (_, leaf) in zip(chosen, named, strict=True)]

    def each(like: PyTree) -> list[Wire]:
        return [known[i] for i in numbers(like)]

    def part(ctx: Ctx, i: int) -> Ctx:
        return ctx.part(i, ctx.state[i].state if ctx.state else ())

    def encode(x, state, ctx):
        parts, new = [], []
        for i, (link, leaf) in enumerate(zip(each(x), jax.tree.leaves(x), strict=True)):
            payload, own, _ = link.encode(leaf, state[i] if state else (), part(ctx, i))
            parts.append(payload)
            new.append(own)
        payload = Parts(parts, Like.of(x))
        return payload, tuple(new) if state else (), length(payload)

    def opened(payload, ctx, how) -> list:
        links = each(payload.like.shapes())
        return [how(link, p, part(ctx, i)) for i, (link, p) in enumerate(zip(links, payload.parts, strict=True))]

    def open_parts(payload, ctx):
        return Parts(opened(payload, ctx, lambda link, p, here: link.open(p, here)), payload.like)

    def open_whole(payload, ctx):
        return _whole(opened(payload, ctx, undo), payload.like)

    def decode(total, ctx):
        both = opened(total, ctx, lambda link, p, here: link.decode(p, here))
        whole = _whole([x for x, _ in both], total.like)
        if not ctx.state:
            return whole, ctx.state
        return whole, tuple(dataclasses.replace(old, state=s) for old, (_, s) in zip(ctx.state, both, strict=True))

    def init(like):
        numbered = zip(numbers(like), jax.tree.leaves(like), strict=True)
        return tuple(Own(known[i].init(s), i) for i, s in numbered)

    def init_client(like):
        return tuple(link.init_client(s) for link, s in zip(each(like), jax.tree.leaves(like), strict=True))

    def sends(state):
        return tuple(dataclasses.replace(own, state=known[own.link].sends(own.state)) for own in state)

    def all_parts(of: str) -> Callable:
        """Any part may be as long as all together."""

        def bound(norm, like):
            parts = zip(each(like), jax.tree.leaves(like), strict=True)
            bounds = [getattr(link, of)(norm, s) for link, s in parts if is_float(s)]
            return None if any(b is None for b in bounds) else sum(b * b for b in bounds) ** 0.5

        return not_longer if every(of, not_longer) else bound

    every = lambda trait, value: all(getattr(link, trait) is value for link in known)
    some = lambda trait: any(getattr(link, trait) for link in known)
    alone = every("decode", as_opened)
    return Wire(
        encode,
        open_whole if alone else open_parts,
        as_opened if alone else decode,
        init=stateless if every("init", stateless) else init,
        init_client=stateless if every("init_client", stateless) else init_client,
        sends=sends,
        sends_bytes=lambda told: sum(known[own.link].sends_bytes(own.state) for own in told),
        summable=every("summable", True),
        must_sum=some("must_sum"),
        collective=some("collective"),
        varies=some("varies"),
        coded=some("coded"),
        in_place=every("in_place", True),
        remembers=some("remembers"),
        additive=every("additive", True),
        bound=all_parts("bound"),
        gain=all_parts("gain"),
        guard=next((link.guard for link in known if link.must_sum), None),
        name=name,
    )


def _whole(leaves: list, like: Like) -> PyTree:
    structure: Any = like.structure
    return jax.tree.unflatten(structure, leaves)


# ---- equal blocks ----


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Payloads of equal blocks, their arrays stacked along a first axis of ``count``."""

    parts: PyTree
    sizes: jax.Array | None  # bytes of each block, where they depend on the data; never sent
    rest: tuple
    like: Like = dataclasses.field(metadata={"static": True})
    count: int = dataclasses.field(metadata={"static": True})

    def _one(self, i: int) -> PyTree:
        return jax.tree.map(lambda a: a[i], self.parts)

    def wire_bytes(self) -> Any:
        if not self.count:
            return length(self.rest)
        each = length(jax.eval_shape(self._one, 0)) * self.count if self.sizes is None else jnp.sum(self.sizes)
        return each + length(self.rest)

    def dump(self) -> bytes:
        return b"".join(serialize(self._one(i)) for i in range(self.count)) + serialize(self.rest)

    def load(self, reader: Reader) -> "Blocks":
        parts = [read(self._one(i), reader) for i in range(self.count)]
        rest = read(self.rest, reader)
        if not self.count:
            return dataclasses.replace(self, rest=rest)
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *parts)
        sizes = None if self.sizes is None else jnp.stack([jnp.asarray(length(p)) for p in parts])
        return Blocks(stacked, sizes, rest, self.like, self.count)


def _by_block(link: Wire, size: int | None, count: int | None) -> Wire:
    def shape(total: int) -> tuple[int, int]:
        width = min(size, max(total, 1)) if size is not None else max(-(-total // (count or 1)), 1)
        return -(-total // width), width

    def contexts(ctx: Ctx, blocks: int, state: Any):
        return jax.vmap(lambda i: ctx.part(i)._replace(env=(), id=()))(jnp.arange(blocks))._replace(state=state)

    def with_env(inner: Ctx, ctx: Ctx) -> Ctx:
        return inner._replace(env=ctx.env, id=ctx.id)

    def encode(x, state, ctx):
        vector, rest, like = ravel(x)
        rows = in_rows(vector, shape(vector.shape[0])[1])

        def one(row, state, inner):
            payload, state, bytes_ = link.encode(row, state, with_env(inner, ctx))
            return payload, state, jnp.asarray(bytes_, jnp.uint32)

        parts, state, sizes = jax.vmap(one)(rows, state, contexts(ctx, rows.shape[0], ctx.state))
        payload = Blocks(parts, sizes if link.varies else None, rest, like, rows.shape[0])
        return payload, state, length(payload)

    def open_(payload, ctx):
        one = lambda p, inner: link.open(p, with_env(inner, ctx))
        parts = jax.vmap(one)(payload.parts, contexts(ctx, payload.count, ctx.state))
        return dataclasses.replace(payload, parts=parts, sizes=None)

    def decode(total, ctx):
        one = lambda p, inner: link.decode(p, with_env(inner, ctx))
        rows, state = jax.vmap(one)(total.parts, contexts(ctx, total.count, ctx.state))
        return unravel(rows.reshape(-1)[: size_of(total.like)], total.rest, total.like), state

    def open_whole(payload, ctx):
        one = lambda p, inner: undo(link, p, with_env(inner, ctx))
        rows = jax.vmap(one)(payload.parts, contexts(ctx, payload.count, ctx.state))
        return unravel(rows.reshape(-1)[: size_of(payload.like)], payload.rest, payload.like)

    def states(make: Callable) -> Callable:
        def init(like):
            blocks, width = shape(float_size(like))
            made = make(jax.ShapeDtypeStruct((width,), jnp.float32))
            return jax.tree.map(lambda a: jnp.broadcast_to(a, (blocks, *a.shape)), made)

        return init

    def all_blocks(one: Callable) -> Callable:
        def bound(norm, like):
            blocks, width = shape(float_size(like))
            norm = one(norm, jax.ShapeDtypeStruct((width,), jnp.float32))
            return None if norm is None else norm * math.sqrt(blocks)

        return not_longer if one is not_longer else bound

    return link._replace(
        encode=encode,
        open=open_whole if link.decode is as_opened else open_,
        decode=as_opened if link.decode is as_opened else decode,
        init=stateless if link.init is stateless else states(link.init),
        init_client=stateless if link.init_client is stateless else states(link.init_client),
        sends=lambda state: jax.vmap(link.sends)(state) if jax.tree.leaves(state) else state,
        sends_bytes=lambda told: jnp.sum(jax.vmap(lambda t: jnp.uint32(link.sends_bytes(t)))(told)),
        bound=all_blocks(link.bound),
        gain=all_blocks(link.gain),
        links=(),
        name=f"grouped({link.name})",
    )
