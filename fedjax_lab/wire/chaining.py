"""chain: links one behind the other, and what must hold for them to make sense together."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.wire.base import (
    Ctx,
    Like,
    Wire,
    as_opened,
    identity,
    shapes,
    stateless,
    undo,
)

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Calibrated:
    """A payload of a chain with noise, and what it was made of: the server calibrates by the same."""

    payload: PyTree
    like: Like = dataclasses.field(metadata={"static": True})


def chain(*links: Wire) -> Wire:
    """Links in reading order: ``chain(a, b)`` encodes with ``a``, then with ``b`` what ``a`` made.

    It is undone from right to left: the longest summable prefix after the sum, what is behind it for each client
    before. Noise is calibrated to what the whole chain lets through.

    Args:
      *links: none of them is :func:`identity`; nested chains are taken apart.

    Raises:
      ValueError: a link that must be summed, or works on sums, behind one whose payloads can't be; noise in a
        chain that bounds nothing; a link behind one whose payload is already of varying length.
    """
    flat = _flattened(links)
    if not flat:
        return identity()
    if len(flat) == 1 and flat[0].bind is None:
        return flat[0]
    _check(flat)
    made = _Chain(flat)
    guards = [link.guard for link in flat if link.must_sum]
    every = lambda name, nothing: all(getattr(link, name) is nothing for link in flat)
    return Wire(
        made.encode,
        made.open,
        as_opened if made.opened_whole else made.decode,
        init=stateless if every("init", stateless) else made.init,
        init_client=stateless if every("init_client", stateless) else made.init_client,
        sends=lambda state: tuple(link.sends(s) for link, s in zip(flat, state, strict=True)) if state else (),
        sends_bytes=lambda told: sum(link.sends_bytes(t) for link, t in zip(flat, told, strict=True)) if told else 0,
        summable=all(link.summable for link in flat),
        must_sum=any(link.must_sum for link in flat),
        collective=any(link.collective for link in flat),
        varies=flat[-1].varies,
        coded=any(link.coded for link in flat),
        in_place=all(link.in_place for link in flat),
        remembers=any(link.remembers for link in flat),
        additive=all(link.additive for link in flat),
        bound=made.bound,
        gain=made.gain,
        guard=None if not guards or any(g is None for g in guards) else chain(*guards),
        links=flat,
        name=f"chain({', '.join(link.name for link in flat)})",
    )


@dataclasses.dataclass(frozen=True, eq=False)  # a link is told apart by its functions: they are this chain's alone
class _Chain:
    """What a chain of these ``links`` computes; its public functions are those of a :class:`Wire`."""

    links: tuple[Wire, ...]

    @property
    def last(self) -> int:
        """``links[:last]`` are decoded after the sum."""
        return _summed(self.links)

    @property
    def noisy_sum(self) -> bool:
        """Whether noise is added after the sum."""
        return any(link.bind is not None and link.decode is not as_opened for link in self.links)

    @property
    def opened_whole(self) -> bool:
        """Whether nothing is left to decode after the sum."""
        return not self.noisy_sum and all(link.decode is as_opened for link in self.links[: self.last])

    def encode(self, x: PyTree, state: Any, ctx: Ctx) -> tuple[PyTree, Any, Any]:
        """In reading order, each what the one before it made."""
        new, like = [], Like.of(x)
        for i, link in enumerate(self._ready(shapes(x))):
            x, own, size = link.encode(x, state[i] if state else (), _part(ctx, i))
            new.append(own)
        x = Calibrated(x, like) if self.noisy_sum else x
        return x, tuple(new) if state else (), size

    def open(self, payload: PyTree, ctx: Ctx) -> PyTree:
        """Undone for one client as far as it must be before the sum."""
        last = self.last
        for i in reversed(range(last, len(self.links))):
            payload = _inside(lambda p, i=i: undo(self.links[i], p, _part(ctx, i)), payload)
        return _inside(lambda p: self.links[last - 1].open(p, _part(ctx, last - 1)), payload)

    def decode(self, total: PyTree, ctx: Ctx) -> tuple[PyTree, Any]:
        """The rest of it, for the sum."""
        links, last = self.links, self.last
        own = list(ctx.state) if ctx.state else [()] * len(links)
        if self.noisy_sum:
            links, total = self._ready(total.like.shapes()), total.payload
        x, own[last - 1] = links[last - 1].decode(total, _part(ctx, last - 1))
        for i in reversed(range(last - 1)):
            here = _part(ctx, i)
            x, own[i] = links[i].decode(links[i].open(x, here), here)
        return x, tuple(own) if ctx.state else ctx.state

    def init(self, like: PyTree) -> tuple:
        """The links' server states."""
        return tuple(link.init(s) for link, s in self._staged(like))

    def init_client(self, like: PyTree) -> tuple:
        """The links' client states."""
        return tuple(link.init_client(s) for link, s in self._staged(like))

    def bound(self, norm: Any, like: PyTree) -> Any:
        """How long the last payload may be."""
        for link, stage in self._staged(like):
            norm = link.bound(norm, stage)
        return norm

    def gain(self, norm: Any, like: PyTree) -> Any:
        """How long may be what is made of a payload of this length."""
        for link, stage in reversed(self._staged(like)):
            norm = link.gain(norm, stage)
        return norm

    def _staged(self, like: PyTree) -> list[tuple[Wire, PyTree]]:
        """The links, each with the shapes of what it is given."""
        return list(zip(self.links, _stages(self.links, like), strict=True))

    def _ready(self, like: PyTree) -> tuple[Wire, ...]:
        """The links, their noise calibrated to what arrives of such an input."""
        noisy = any(link.bind is not None for link in self.links)
        return _calibrated(self.links, _stages(self.links, like)) if noisy else self.links


def _part(ctx: Ctx, i: int) -> Ctx:
    """The context of the ``i``-th link."""
    return ctx.part(i, ctx.state[i] if ctx.state else ())


def _flattened(links: tuple) -> tuple[Wire, ...]:
    flat: list[Wire] = []
    for link in links:
        if not isinstance(link, Wire):
            hint = ": call it, wire.top_k(0.05)" if callable(link) else ""
            hint = ": give its links one by one, chain(*links)" if isinstance(link, list | tuple) else hint
            raise ValueError(f"a chain is made of links such as wire.top_k(0.05); got {checks.shown(link)}{hint}")
        flat.extend(link.links or (() if link.name == "identity" else (link,)))
    return tuple(flat)


def _summed(links: tuple[Wire, ...]) -> int:
    """How many links are decoded after the sum: the longest summable prefix, and the link behind it."""
    summable = 0
    while summable < len(links) and links[summable].summable:
        summable += 1
    return min(summable + 1, len(links))


def _check(links: tuple[Wire, ...]) -> None:
    last = _summed(links)
    for i, link in enumerate(links):
        before = [earlier for earlier in links[:i] if not earlier.summable]
        if before and link.must_sum:
            raise ValueError(
                f"{link.name} must be summed before anyone opens it, but {before[0].name} in front of it can't be: "
                "what it sends can only be undone client by client. Use links whose payloads add up "
                "(wire.random_k, wire.hadamard, wire.count_sketch)"
            )
        if i >= last and (link.collective or link.init is not stateless):
            raise ValueError(
                f"{link.name} works on the sum of all clients' payloads, but {before[0].name} in front of it makes "
                "payloads that can't be summed: put it first"
            )
        moving = [earlier for earlier in links[:i] if not earlier.in_place]
        if moving and link.remembers:
            raise ValueError(
                f"{link.name} remembers entries from round to round, and {moving[0].name} in front of it hands on "
                f"others each time: put the memory around both, wire.error_feedback(wire.chain({moving[0].name}, ...))"
            )
        coded = [earlier for earlier in links[:i] if earlier.coded]
        if coded and not link.on_codes:
            raise ValueError(
                f"{link.name} works on floats, and {coded[0].name} in front of it leaves codes and scales: put it first"
            )
        if before and link.bind is not None:
            raise ValueError(
                f"{link.name} behind {before[0].name} would cover its values and leave positions and seeds as they "
                "are: put the noise in front, or use links whose payloads add up"
            )
        if link.varies and i + 1 < len(links):
            raise ValueError(
                f"{link.name} makes payloads whose length depends on the data, which {links[i + 1].name} behind it "
                "can't work on: put it last"
            )
    # Whether a bound is there does not depend on shapes.
    _calibrated(links, [jax.ShapeDtypeStruct((1,), jnp.float32)] * len(links))


def _calibrated(links: tuple[Wire, ...], stages: list[PyTree]) -> tuple[Wire, ...]:
    """The links, noise bound to the norm that it must cover. Raises ValueError if there is none."""
    norm, broken, ready = None, None, []
    for i, (link, stage) in enumerate(zip(links, stages, strict=True)):
        if link.bind is not None:
            covered = _covered(links, stages, i, norm)
            if covered is None:
                behind = [] if norm is None else [k.name for k in links[i + 1 :]]
                _refuse_unbounded(link, broken if norm is None else " or ".join(behind))
            ready.append(link.bind(covered))
        else:
            ready.append(link)
        before, norm = norm, link.bound(norm, stage)
        broken = link.name if before is not None and norm is None else broken
    return tuple(ready)


def _covered(links: tuple[Wire, ...], stages: list[PyTree], i: int, norm: Any) -> Any:
    """How long what the ``i``-th link's noise covers may be, if what it is given is no longer than ``norm``."""
    arrives, behind = norm, list(zip(links, stages, strict=True))[i + 1 :]
    for link, stage in behind:
        arrives = link.bound(arrives, stage)
    for link, stage in reversed(behind):
        arrives = link.gain(arrives, stage)
    if not links[i].bounds_own:
        return arrives
    # What follows a client's noise can't undo it: it need not be bounded, nor make the noise smaller.
    return norm if norm is None or arrives is None else _larger(norm, arrives)


def _larger(a: Any, b: Any) -> Any:
    plain = isinstance(a, int | float) and isinstance(b, int | float)
    return max(a, b) if plain else jnp.maximum(a, b)


def _refuse_unbounded(noise: Wire, broken: str | None) -> None:
    if broken:
        raise ValueError(f"{noise.name} is calibrated to a bound, which {broken} breaks: put wire.clip(norm) behind it")
    raise ValueError(f"{noise.name} is calibrated to a bound, and this chain has none: put wire.clip(norm) in front")


def _stages(links: tuple[Wire, ...], like: PyTree) -> list[PyTree]:
    """Shapes and types of what each link is given, without computing anything."""
    stages = [like]
    key = jax.random.key(0)

    def encoded(x, link, like):
        ctx = Ctx(key, key, link.sends(link.init(like)), (), jnp.int32(0))
        return link.encode(x, link.init_client(like), ctx)[0]

    for link in links[:-1]:
        link = link if link.bind is None else link.bind(1.0)
        like = jax.eval_shape(lambda x, link=link, like=like: encoded(x, link, like), like)
        stages.append(like)
    return stages


def _inside(function, payload: PyTree) -> PyTree:
    if isinstance(payload, Calibrated):
        return Calibrated(function(payload.payload), payload.like)
    return function(payload)
