"""Fixed point: real numbers as integers modulo 2^k, whose sums are exact. What secure sums add up."""

import jax.numpy as jnp
import numpy as np

from fedjax_lab import checks
from fedjax_lab.wire import hashing
from fedjax_lab.wire.base import Wire, float_size
from fedjax_lab.wire.packing import Packed, pack
from fedjax_lab.wire.payload import length
from fedjax_lab.wire.quantize import bits_between
from fedjax_lab.wire.vectors import Vector, ravel, unravel


def fixed_point(
    bits: int = 32, *, limit: float, clients: int, step: float | None = None, stochastic: bool = True
) -> Wire:
    """Entries as integers modulo ``2**bits``, in steps small enough for the sum of all clients not to wrap.

    A client with an entry beyond ``limit`` counts as absent: the link's client state becomes NaN for it, which the
    engine doesn't keep. Behind a clip to ``c`` no entry is beyond ``c``.

    Args:
      bits: of each integer on the wire, 2 to 32.
      limit: the largest magnitude of an entry (of its lifted value: a client's weight included).
      clients: the most clients that one sum has.
      step: what one unit stands for; ``None``: as fine as ``bits`` allow.
      stochastic: round up or down at random, which is unbiased, rather than to the nearest.

    Raises:
      ValueError: too few bits for so many clients and such a limit; a cohort larger than ``clients``, when the
        process is built.
    """
    bits_between(bits, 2, 32, "fixed_point")
    checks.positive(limit, "limit")
    checks.positive(clients, "clients", integer=True)
    top = _exact((2 ** (bits - 1) - 1) // clients)  # the largest integer of one client
    if top < 1:
        raise ValueError(f"fixed_point: the sum of {clients} clients overflows {bits} bits: take more bits")
    if step is None:
        step = limit / max(top - 1, 1) if stochastic else limit / top
    checks.positive(step, "step")
    units = limit / step + stochastic  # rounding up adds one at most
    if units > top * (1 + 1e-9):
        need = int(np.ceil(np.log2(np.ceil(units) * clients + 1))) + 1
        raise ValueError(
            f"fixed_point: {clients} clients with entries up to {limit} in steps of {step:g} overflow {bits} bits: "
            f"take {need} bits, larger steps, or clip to less"
        )

    def encode(x, state, ctx):
        cohort = getattr(getattr(ctx.env, "ids", None), "shape", (1,))[0]
        if cohort > clients:
            raise ValueError(f"fixed_point was made for sums of {clients} clients, and the cohort has {cohort}")
        vector, rest, like = ravel(x)
        scaled = vector / step
        level = hashing.rounded(scaled, hashing.seed_of(ctx.private) if stochastic else None)
        fits = jnp.all(jnp.abs(vector) <= limit)  # NaN doesn't
        level = jnp.clip(jnp.nan_to_num(level), -top, top).astype(jnp.int32)
        payload = Vector(pack(level.astype(jnp.uint32) & _mask(bits), bits), rest, like)
        return payload, jnp.where(fits, state, jnp.nan), length(payload)

    def open_(payload, ctx):
        # A link behind this one that adds up the integers gives them unpacked.
        code = payload.code.codes() if isinstance(payload.code, Packed) else payload.code
        return Vector(code.astype(jnp.uint32), payload.rest, payload.like)

    def decode(total, ctx):
        # Modulo 2^bits, the upper half standing for negative numbers; the shifts bring the sign up and down.
        shift = 32 - bits
        level = (total.code << shift).astype(jnp.int32) >> shift
        return unravel(level.astype(jnp.float32) * step, total.rest, total.like), ctx.state

    def bound(norm, like):
        return None if norm is None else norm + step * float_size(like) ** 0.5

    made = Wire(
        encode,
        open_,
        decode,
        init_client=lambda like: jnp.float32(0),
        summable=True,
        must_sum=True,
        coded=True,
        bound=bound,
        name="fixed_point",
    )
    if limit >= 1:
        return made._replace(guard=made)
    # Denominators, which are at most 1 a client.
    return made._replace(guard=fixed_point(bits, limit=1.0, clients=clients, stochastic=stochastic))


def _mask(bits: int):
    return jnp.uint32(2**bits - 1)


def _exact(value: int) -> int:
    """The largest integer up to ``value`` that float32 can hold: rounding must not lead beyond it."""
    spare = max(value.bit_length() - 24, 0)
    return value >> spare << spare
