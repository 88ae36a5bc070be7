"""Clipping and noise: the links that privacy builds on."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.wire.base import Wire, float_norm, is_float, map_floats, not_longer
from fedjax_lab.wire.payload import length

SIDES = ("server", "client")


def clip(max_norm: Any) -> Wire:
    """Scale what is longer than ``max_norm`` down to it (McMahan et al., ICLR 2018, FlatClip).

    Args:
      max_norm: bound of the l2 norm over all float entries together; positive, and ``math.inf`` clips nothing.
        For each leaf by itself: ``grouped(clip(c))``.
    """
    if not (isinstance(max_norm, float) and max_norm == math.inf):
        checks.positive(max_norm, "max_norm")

    def encode(x, state, ctx):
        norm = float_norm(x)
        factor = jnp.minimum(1.0, max_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
        return map_floats(lambda a: (a.astype(norm.dtype) * factor).astype(a.dtype), x), state, length(x)

    def bound(norm, like):
        if norm is None:
            return max_norm
        plain = isinstance(norm, int | float) and isinstance(max_norm, int | float)
        return min(norm, max_norm) if plain else jnp.minimum(norm, max_norm)

    return Wire(encode, open=lambda payload, ctx: payload, summable=True, in_place=True, bound=bound, name="clip")


def gaussian(noise_multiplier: Any, *, by: str = "server", shares: int | None = None) -> Wire:
    """Gaussian noise with a standard deviation of ``noise_multiplier`` times the chain's bound.

    The bound is of what arrives of one client where the noise is added, after every link of the chain; a client's
    noise also covers what it is added to. A chain that bounds nothing is refused. Denominators of the mean must be
    fixed, unless each client's noise covers its own upload.

    Args:
      noise_multiplier: z, at least 0.
      by: ``"server"``: once, on the sum of what the clients sent (central differential privacy). ``"client"``:
        each client adds its own.
      shares: of clients' noise: so many of them add up to what the server would have added, and each adds a
        ``1 / sqrt(shares)`` of it; only a sum may be looked at then. ``None``: every client adds it in full.

    Raises:
      ValueError: a negative multiplier, another side, or shares of the server's noise.
    """
    checks.not_negative(noise_multiplier, "noise_multiplier")
    if by not in SIDES:
        raise ValueError(f"by must be one of {SIDES}{checks.nearest(str(by), SIDES)}; got {checks.shown(by)}")
    if shares is not None:
        checks.positive(shares, "shares", integer=True)
        if by == "server":
            raise ValueError("the server adds its noise once: shares are of noise by='client'")
    return _noise(noise_multiplier, by, shares, None)


def _noise(multiplier: Any, by: str, shares: int | None, norm: Any) -> Wire:
    known = isinstance(norm, float) and isinstance(multiplier, int | float)
    if known and math.isinf(norm) and multiplier > 0:
        raise ValueError("gaussian() would add noise without end to what wire.clip(math.inf) lets through: clip it")

    def noisy(x, key):
        if norm is None:
            raise ValueError("gaussian() takes its scale from a chain: wire.chain(wire.clip(1.0), wire.gaussian(1.0))")
        if key is None:
            raise ValueError("gaussian() needs a private key where it adds its noise")
        # Without noise an infinite bound is fine.
        deviation = jnp.where(jnp.asarray(multiplier) == 0, 0, multiplier * norm / math.sqrt(shares or 1))
        leaves, structure = jax.tree.flatten(x)
        for i, leaf in enumerate(leaves):
            if is_float(leaf):
                draw = jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
                leaves[i] = leaf + deviation.astype(leaf.dtype) * draw
        return jax.tree.unflatten(structure, leaves)

    def encode(x, state, ctx):
        x = noisy(x, ctx.private) if by == "client" else x
        return x, state, length(x)

    traits: dict[str, Any] = {
        "summable": True,
        "in_place": True,
        "must_sum": by == "server" or shares is not None,
        "bound": not_longer,
        "bounds_own": by == "client",
        "bind": lambda norm: _noise(multiplier, by, shares, norm),
        "name": "gaussian",
    }
    if by == "server":
        traits["decode"] = lambda total, ctx: (noisy(total, ctx.private), ctx.state)
    return Wire(encode, open=lambda payload, ctx: payload, **traits)
