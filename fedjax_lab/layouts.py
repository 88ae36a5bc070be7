"""Convolutions' operands with the channels last, images as NHWC and kernels as HWIO; results as they were asked for.

Equations of gradients have operands in other roles. A kernel's is a convolution of the images, whose channels stand in
a batch's place, with the outputs' cotangent as kernel; the images' one of the cotangent, with the kernel turned around.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax import lax

Names = lax.ConvDimensionNumbers


def last_channels(lhs: jax.Array, rhs: jax.Array, names: Names) -> tuple[jax.Array, jax.Array]:
    """Images and a kernel."""
    features, channels, *window = names.rhs_spec
    return lax.transpose(lhs, _last(names.lhs_spec)), lax.transpose(rhs, (*window, channels, features))


def from_last_channels(images: jax.Array, names: Names) -> jax.Array:
    """The equation's result, of images."""
    return lax.transpose(images, inverse(_last(names.out_spec)))


def images_and_cotangent(lhs: jax.Array, rhs: jax.Array, names: Names) -> tuple[jax.Array, jax.Array]:
    """Of a kernel's gradient."""
    first, kernel = names.lhs_spec, names.rhs_spec  # each (batch, feature, *space)
    images = lax.transpose(lhs, (first[1], *first[2:], first[0]))
    return images, lax.transpose(rhs, (kernel[1], *kernel[2:], kernel[0]))


def as_kernel(gradient: jax.Array, names: Names) -> jax.Array:
    """The equation's result, of a kernel's gradient."""
    out = names.out_spec
    return lax.transpose(gradient, inverse((*out[2:], out[0], out[1])))


def cotangent_and_kernel(lhs: jax.Array, rhs: jax.Array, names: Names) -> tuple[jax.Array, jax.Array]:
    """Of the images' gradient. The kernel is turned around once more: XLA sees it, and drops both."""
    features, channels, *window = names.rhs_spec
    kernel = lax.transpose(lax.rev(rhs, window), (*window, features, channels))
    return lax.transpose(lhs, _last(names.lhs_spec)), kernel


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes another."""
    return tuple(int(i) for i in np.argsort(order))


def _last(spec: Sequence[int]) -> tuple[int, ...]:
    """Of ``(batch, feature, *space)``: the feature last."""
    return (spec[0], *spec[2:], spec[1])
