"""Memories: what a link loses is sent later."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.wire.base import Wire, is_float, map_floats, unbounded, undo, zeros_of

PyTree = Any
FORMS = ("ef14", "ef21")


class Memory(NamedTuple):
    """A client's ``memory``, shaped as what it encodes, and the state of the link inside."""

    memory: PyTree
    inner: Any


def error_feedback(link: Wire, form: str = "ef14") -> Wire:
    """What the link loses of an upload is added to the client's next one.

    Put around everything that loses: ``error_feedback(chain(top_k(0.01), qsgd(8)))`` also feeds back what the
    quantizer lost.

    Args:
      link: should shorten the error of what it sends (top-k, scaled signs, ``random_k(unbiased=False)``); the
        memory grows without end around one whose error may be longer than the vector.
      form: ``"ef14"``: the memory is what was lost so far (Seide et al. 2014; Karimireddy et al., ICML 2019,
        algorithm 2). ``"ef21"``: it is the last estimate that the server has of the client, and changes of it are
        sent (Richtárik et al., NeurIPS 2021, algorithm 2). The server keeps the mean estimate over the
        population, for which clients should have equal weights; with part of them present it moves by their share.

    Raises:
      ValueError: another form; a link whose single payload means nothing; for EF21, one that must be summed.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}{checks.nearest(str(form), FORMS)}; got {checks.shown(form)}")
    _undoable(link, "error_feedback")
    if form == "ef21":
        return _ef21(link)
    _sums(link, "error_feedback")
    return _ef14(link)


def _undoable(link: Any, what: str) -> None:
    if not isinstance(link, Wire):
        raise ValueError(f"{what} goes around a link such as wire.top_k(0.05); got {checks.shown(link)}")
    if link.collective:
        raise ValueError(
            f"{what} needs to know what became of a client's own payload, but {link.name} makes sense of sums only"
        )
    if any(each.bind is not None for each in link.links or (link,)):
        raise ValueError(f"{what} would take the noise of {link.name} back in the next round: put the noise behind it")


def _sums(link: Wire, what: str) -> None:
    each = link.links or (link,)
    if any(not one.additive for one in each) and link.summable:
        raise ValueError(
            f"{what} remembers what became of a client's own payload, but {link.name} is read once, after the sum, "
            "which isn't the sum of what is read of each: use fetch_sgd, whose memory is the server's"
        )


def _ef14(link: Wire) -> Wire:
    def encode(x, state, ctx):
        whole = map_floats(lambda a, m: a.astype(m.dtype) + m, x, state.memory)
        payload, inner, size = link.encode(whole, state.inner, ctx)
        left = _minus(whole, undo(link, payload, ctx), state.memory)
        return payload, Memory(left, inner), size

    return link._replace(
        encode=encode,
        init_client=lambda like: Memory(zeros_of(like), link.init_client(_wide(like))),
        # Whatever the memory adds, what is opened is as long as the link allows.
        bound=lambda norm, like: link.bound(None, like),
        remembers=True,
        links=(),
        name=f"error_feedback({link.name})",
    )


def _ef21(link: Wire) -> Wire:
    if link.must_sum:
        raise ValueError(f"EF21 keeps a mean, and {link.name} makes sums: use form='ef14'")

    def encode(x, state, ctx):
        change = map_floats(lambda a, g: a.astype(g.dtype) - g, x, state.memory)
        payload, inner, size = link.encode(change, state.inner, ctx)
        known = map_floats(lambda g, c: g + c, state.memory, undo(link, payload, ctx))
        return payload, Memory(known, inner), size

    def decode(change, ctx):
        share = ctx.env.survivors / ctx.env.population if ctx.env else 1.0
        known = jax.tree.map(lambda g, c: g + share * c if is_float(g) and g.size else g, ctx.state, change)
        # Leaves that aren't floats are not remembered.
        return jax.tree.map(lambda g, c: g if is_float(g) and g.size else c, known, change), known

    return Wire(
        encode,
        open=lambda payload, ctx: undo(link, payload, ctx),
        decode=decode,
        init=zeros_of,
        init_client=lambda like: Memory(zeros_of(like), link.init_client(_wide(like))),
        sends=lambda state: (),
        collective=True,
        remembers=True,
        varies=link.varies,
        coded=link.coded,
        bound=unbounded,
        gain=unbounded,
        name=f"error_feedback({link.name}, 'ef21')",
    )


class Momentum(NamedTuple):
    """A client's ``velocity`` and ``unsent`` sum of velocities, and the state of the link inside."""

    velocity: PyTree
    unsent: PyTree
    inner: Any


def momentum_correction(link: Wire, momentum: Any = 0.9) -> Wire:
    """Error feedback of a momentum instead of the plain update (Lin et al., "Deep Gradient Compression", ICLR 2018).

    Section 3.1, with the factor masking of section 3.2: entries that were sent lose their momentum. The server
    should have none of its own.

    Args:
      link: a sparsifier.
      momentum: at least 0 and below 1; 0 is :func:`error_feedback`.

    Raises:
      ValueError: a momentum outside of that, or a link whose single payload means nothing.
    """
    checks.momentum(momentum)
    _undoable(link, "momentum_correction")
    _sums(link, "momentum_correction")

    def encode(x, state, ctx):
        velocity = map_floats(lambda a, u: momentum * u + a.astype(u.dtype), x, state.velocity)
        whole = map_floats(lambda u, v: u + v, velocity, state.unsent)
        payload, inner, size = link.encode(whole, state.inner, ctx)
        sent = undo(link, payload, ctx)
        masked = jax.tree.map(
            lambda u, s, old: jnp.where(s != 0, 0, u) if is_float(u) else old, velocity, sent, state.velocity
        )
        return payload, Momentum(masked, _minus(whole, sent, state.unsent), inner), size

    def init_client(like):
        return Momentum(zeros_of(like), zeros_of(like), link.init_client(_wide(like)))

    return link._replace(
        encode=encode,
        init_client=init_client,
        bound=lambda norm, like: link.bound(None, like),
        remembers=True,
        links=(),
        name=f"momentum_correction({link.name})",
    )


def _minus(whole: PyTree, sent: PyTree, memory: PyTree) -> PyTree:
    """``whole - sent`` where a memory is kept."""
    return jax.tree.map(lambda w, s, m: w - s if is_float(w) else m, whole, sent, memory)


def _wide(like: PyTree) -> PyTree:
    """What the link inside is given: floats in the memory's type."""
    return jax.tree.map(
        lambda s, z: jax.ShapeDtypeStruct(s.shape, z.dtype), like, jax.eval_shape(lambda: zeros_of(like))
    )
