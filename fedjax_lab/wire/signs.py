"""One bit an entry: signs, with and without a vote, and 1-bit SGD."""

import math
from typing import Any

import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.wire.base import Wire, float_size, not_longer
from fedjax_lab.wire.packing import pack
from fedjax_lab.wire.vectors import Vector, on_vector, size_of, unravel


def sign(scale: Any = "mean") -> Wire:
    """The sign of each entry, zero counting as positive.

    Args:
      scale: what the signs are multiplied by. ``"mean"``: the mean magnitude, which travels (4 bytes) and makes
        it a contraction (Karimireddy et al., ICML 2019, section 4); wrap it in :func:`error_feedback`. A number:
        always that, as in signSGD (Bernstein et al., ICML 2018).

    Raises:
      ValueError: another word, or a number that isn't positive.
    """
    mean = _check_scale(scale)

    def encode(vector, ctx):
        code = {"signs": pack((vector >= 0).astype(jnp.uint8), 1)}
        # The scale also carries what is not a number, which a sign alone would hide.
        return code | ({"scale": jnp.mean(jnp.abs(vector))} if mean else {})

    def decode(code, ctx, size):
        return _signs(code["signs"]) * (code["scale"] if mean else scale)

    def bound(norm, like):
        return norm if mean else scale * math.sqrt(float_size(like))

    return on_vector("sign", encode, decode, coded=True, bound=bound)


def majority_vote(scale: Any) -> Wire:
    """Signs up, and the sign of their weighted sum times ``scale`` for all (Bernstein et al., ICML 2018, algorithm 3).

    Args:
      scale: the step of every entry, in the units of the upload; positive.
    """
    checks.positive(scale, "scale")
    inner = sign(1.0)

    def open_(payload: Vector, ctx):
        signs = _signs(payload.code["signs"]) if payload.code else jnp.zeros(0)
        return Vector(signs, payload.rest, payload.like)

    def decode(total: Vector, ctx):
        size = size_of(total.like)
        # Nobody present, or a tie: no step.
        return unravel(jnp.sign(total.code[:size]) * scale, total.rest, total.like), ctx.state

    step = lambda norm, like: scale * math.sqrt(float_size(like))
    return Wire(inner.encode, open_, decode, collective=True, coded=True, bound=step, name="majority_vote")


def one_bit() -> Wire:
    """The sign of each entry, and the means of both kinds (1-bit SGD, Seide et al., Interspeech 2014, section 3).

    It is biased: use it within :func:`error_feedback`, as the paper does.
    """

    def encode(vector, ctx):
        up = vector >= 0
        count = jnp.sum(up)
        above = jnp.sum(jnp.where(up, vector, 0)) / jnp.maximum(count, 1)
        below = jnp.sum(jnp.where(up, 0, vector)) / jnp.maximum(vector.shape[0] - count, 1)
        return {"signs": pack(up.astype(jnp.uint8), 1), "means": jnp.stack([below, above])}

    def decode(code, ctx, size):
        return jnp.where(code["signs"].codes() == 1, code["means"][1], code["means"][0])

    # Replacing entries by their mean shortens a vector.
    return on_vector("one_bit", encode, decode, coded=True, bound=not_longer)


def _signs(packed):
    return packed.codes().astype(jnp.float32) * 2 - 1


def _check_scale(scale: Any) -> bool:
    if isinstance(scale, str):
        if scale != "mean":
            raise ValueError(f"scale must be 'mean' or a positive number; got {scale!r}")
        return True
    checks.positive(scale, "scale")
    return False
