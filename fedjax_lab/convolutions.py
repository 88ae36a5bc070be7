"""Convolutions that are fast on a CPU inside loops.

Outside a loop XLA brings a convolution's operands into the layout that its CPU kernel wants. In the body of a
``scan`` or ``while`` it leaves those of the gradients as they are, and falls back to code that is some 20
times slower (jax 0.10: one training step of a small CNN took 35 ms outside a loop and 800 ms inside). So every
convolution gets its operands as NHWC and HWIO by explicit transposes, and the gradient of a kernel becomes a matrix
product for each example, which takes about half of the convolution's time. The sums are the same, in another order.
Small kernels between many channels take fewer multiplications instead (``winograd.py``), and those between few
become matrix products (``banded.py``).
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from fedjax_lab import banded, layouts, winograd

CONVOLUTION = "conv_general_dilated"
# A gradient as products copies an example once for each place in the kernel, and pays off from some input channels on.
# 3x3 kernels on one core: 13.6 -> 6.3 ms with 32 channels, but .38 -> .74 ms with one.
MOST_PLACES, FEWEST_CHANNELS = 25, 8


def _form(eqn: JaxprEqn) -> Callable:
    form = _chosen(eqn)
    if form in (_convolution, _kernel_gradient, _images_gradient):
        return functools.partial(form, names=eqn.params["dimension_numbers"], layer=_layer(eqn))
    return functools.partial(form, params=eqn.params)


# The equation's name -> a form for it.
FORMS = {CONVOLUTION: _form}


def both_gradients(first: JaxprEqn, second: JaxprEqn) -> Callable | None:
    """``(images, cotangent, kernel turned around)`` -> the results of both, computed together.

    None unless one is the kernel's gradient and the other the images', of the same layer and cotangent.
    """
    if first.invars[1] is not second.invars[0]:
        return None
    if _chosen(first) is not _kernel_gradient or _chosen(second) is not _images_gradient:
        return None
    layer, names = _layer(first), [eqn.params["dimension_numbers"] for eqn in (first, second)]
    return functools.partial(_both_gradients, names=names, layer=layer) if layer == _layer(second) else None


def _chosen(eqn: JaxprEqn) -> Callable:
    lhs, rhs, out = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    gradient = is_kernel_gradient(lhs, rhs, out, eqn.params)
    return (_gradient_form if gradient else _plain_form)(lhs, rhs, out, eqn.params)


def _layer(eqn: JaxprEqn) -> winograd.Layer:
    """The layer that an equation computes, or a gradient of."""
    params: Any = eqn.params
    names, form = params["dimension_numbers"], _chosen(eqn)
    values: list[Any] = [*eqn.invars, *eqn.outvars]
    specs = zip(values, (names.lhs_spec, names.rhs_spec, names.out_spec), strict=True)
    images, taps, outputs = (tuple(v.aval.shape[d] for d in spec[2:]) for v, spec in specs)
    low = tuple(low for low, _ in params["padding"])
    if form is _kernel_gradient:
        taps, outputs = outputs, taps
    if form is _images_gradient:
        images, outputs = outputs, images
        low = tuple(n - 1 - before for n, before in zip(taps, low, strict=True))
    return winograd.Layer(images, outputs, taps, low, params["precision"], winograd.BLOCK)


def _plain_form(lhs: Any, rhs: Any, out: Any, params: dict[str, Any]) -> Callable:
    features, channels, *taps = (rhs.shape[d] for d in params["dimension_numbers"].rhs_spec)
    if not _is_plain(lhs, rhs, out, taps, params):
        return canonical
    work, padding = channels * math.prod(taps) * out.size, params["padding"]
    width = lhs.shape[params["dimension_numbers"].lhs_spec[-1]]
    if work >= winograd.LEAST_WORK and winograd.fits(channels, features, taps, params):
        return _images_gradient if _is_of_images(params["dimension_numbers"]) else _convolution
    if work >= banded.LEAST_WORK and banded.gathers(channels, features):
        return functools.partial(_with_last_channels, banded.gather)
    if work >= banded.LEAST_WORK and banded.spreads(width, channels, features, taps, padding):
        return functools.partial(_with_last_channels, banded.spread)
    return canonical


def _gradient_form(lhs: Any, rhs: Any, out: Any, params: dict[str, Any]) -> Callable:
    names = params["dimension_numbers"]
    # The input channels take the place of a batch, and the kernel's places that of an image.
    channels, features = lhs.shape[names.lhs_spec[0]], rhs.shape[names.rhs_spec[0]]
    taps = [out.shape[d] for d in names.out_spec[2:]]
    plain, work = _is_plain(lhs, rhs, out, taps, params), channels * math.prod(taps) * rhs.size
    if plain and work >= winograd.LEAST_WORK and winograd.fits(channels, features, taps, params):
        return _kernel_gradient
    if plain and work >= banded.LEAST_WORK and channels == 1 and banded.gathers(channels, features):
        return functools.partial(_gradient_with_last_channels, banded.kernel_gradient)
    return as_products if channels >= FEWEST_CHANNELS else canonical


def _is_of_images(names: lax.ConvDimensionNumbers) -> bool:
    """Does it look like the gradient of a convolution's images? There JAX swaps the channels of HWIO or OIHW."""
    features, channels, *_ = names.rhs_spec
    return (features < channels) == (names.lhs_spec[1] > 1)


def _is_plain(lhs: Any, rhs: Any, out: Any, taps: list[int], params: dict[str, Any]) -> bool:
    """Is it of images in single precision, without strides, dilation or groups, with windows that stick out in part?"""
    return (
        len(taps) == 2
        and _is_dense(params)
        and all(v.dtype == jnp.float32 for v in (lhs, rhs, out))
        and all(0 <= low < n and 0 <= high < n for n, (low, high) in zip(taps, params["padding"], strict=True))
        and params["preferred_element_type"] in (None, jnp.float32)
    )


def _is_dense(params: dict[str, Any]) -> bool:
    ones = (*params["window_strides"], *params["lhs_dilation"], *params["rhs_dilation"])
    return all(n == 1 for n in (*ones, params["feature_group_count"], params["batch_group_count"]))


def canonical(lhs: jax.Array, rhs: jax.Array, params: dict[str, Any]) -> jax.Array:
    """``lax.conv_general_dilated`` with these parameters, by way of NHWC, HWIO and NHWC."""
    names = params["dimension_numbers"]
    lhs, rhs = layouts.last_channels(lhs, rhs, names)
    space = "DHW"[-(lhs.ndim - 2) :] if lhs.ndim > 2 else ""
    layout = (f"N{space}C", f"{space}IO", f"N{space}C")
    result = lax.conv_general_dilated(
        lhs,
        rhs,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        lax.conv_dimension_numbers(lhs.shape, rhs.shape, layout),
        params["feature_group_count"],
        params["batch_group_count"],
        params["precision"],
        params["preferred_element_type"],
    )
    return layouts.from_last_channels(result, names)


def _with_last_channels(form: Callable, lhs: jax.Array, rhs: jax.Array, params: dict[str, Any]) -> jax.Array:
    """The same by a form for images as NHWC and a kernel as HWIO."""
    names = params["dimension_numbers"]
    result = form(*layouts.last_channels(lhs, rhs, names), params["padding"], params["precision"])
    return layouts.from_last_channels(result, names)


def _gradient_with_last_channels(form: Callable, lhs: jax.Array, rhs: jax.Array, params: dict[str, Any]) -> jax.Array:
    """A kernel's gradient by a form for images and cotangents as NHWC that gives HWIO."""
    names = params["dimension_numbers"]
    operands = layouts.images_and_cotangent(lhs, rhs, names)
    return layouts.as_kernel(form(*operands, params["padding"], params["precision"]), names)


def _convolution(lhs: jax.Array, rhs: jax.Array, names: layouts.Names, layer: winograd.Layer) -> jax.Array:
    return layouts.from_last_channels(winograd.convolution(layer, *layouts.last_channels(lhs, rhs, names)), names)


def _images_gradient(lhs: jax.Array, rhs: jax.Array, names: layouts.Names, layer: winograd.Layer) -> jax.Array:
    cotangent, kernel = layouts.cotangent_and_kernel(lhs, rhs, names)
    return layouts.from_last_channels(winograd.images_gradient(layer, cotangent, kernel), names)


def _kernel_gradient(lhs: jax.Array, rhs: jax.Array, names: layouts.Names, layer: winograd.Layer) -> jax.Array:
    operands = layouts.images_and_cotangent(lhs, rhs, names)
    return layouts.as_kernel(winograd.kernel_gradient(layer, *operands), names)


def _both_gradients(
    lhs: jax.Array, rhs: jax.Array, turned: jax.Array, names: Sequence[layouts.Names], layer: winograd.Layer
) -> tuple[jax.Array, jax.Array]:
    images, cotangent = layouts.images_and_cotangent(lhs, rhs, names[0])
    _, kernel = layouts.cotangent_and_kernel(rhs, turned, names[1])
    of_kernel, of_images = winograd.gradients(layer, images, cotangent, kernel)
    return layouts.as_kernel(of_kernel, names[0]), layouts.from_last_channels(of_images, names[1])


def is_kernel_gradient(lhs: Any, rhs: Any, out: Any, params: dict[str, Any]) -> bool:
    """Does a window as large as an image give a few places? So does the gradient of a small dense kernel."""
    names = params["dimension_numbers"]
    window = [rhs.shape[d] for d in names.rhs_spec[2:]]
    places = [out.shape[d] for d in names.out_spec[2:]]
    return (
        _is_dense(params)
        and 1 < math.prod(places) <= MOST_PLACES
        and all(w > p for w, p in zip(window, places, strict=True))
    )


def as_products(lhs: jax.Array, rhs: jax.Array, params: dict[str, Any]) -> jax.Array:
    """The same sums as a matrix product for each input feature (of a kernel's gradient: each example), added up.

    ``out[b, s, o] = sum_f sum_k rhs[f, k, o] * lhs[f, s + k, b]`` over places ``s``, with strides and dilations of 1.
    In a loop over ``f``, so that what is copied stays in the processor's cache.
    """
    names = params["dimension_numbers"]
    first, kernel, out = names.lhs_spec, names.rhs_spec, names.out_spec
    lhs = lax.transpose(lhs, (first[1], *first[2:], first[0]))
    padding = [(0, 0, 0), *((low, high, 0) for low, high in params["padding"]), (0, 0, 0)]
    lhs = lax.pad(lhs, jnp.zeros((), lhs.dtype), padding)
    rhs = lax.transpose(rhs, (kernel[1], kernel[0], *kernel[2:]))
    window = rhs.shape[2:]
    places = [n - w + 1 for n, w in zip(lhs.shape[1:-1], window, strict=True)]
    rhs = rhs.reshape(*rhs.shape[:2], -1)  # (feature, output, window)
    wide = jnp.promote_types(jnp.float32, lhs.dtype)

    def add(f, total):
        example = lax.dynamic_index_in_dim(lhs, f, keepdims=False)
        shifted = [
            lax.slice(example, (*at, 0), (*map(sum, zip(at, window, strict=True)), example.shape[-1]))
            for at in itertools.product(*map(range, places))
        ]
        patches = lax.concatenate(shifted, len(window)).reshape(math.prod(window), -1)
        weights = lax.dynamic_index_in_dim(rhs, f, keepdims=False)
        dims = (((1,), (0,)), ((), ()))
        return total + lax.dot_general(weights, patches, dims, params["precision"], wide)

    total = jnp.zeros((rhs.shape[1], math.prod(places) * lhs.shape[-1]), wide)
    total = lax.fori_loop(0, len(lhs), add, total).reshape(-1, *places, lhs.shape[-1])  # (output, *places, batch)
    total = total.astype(params["preferred_element_type"] or lhs.dtype)
    return lax.transpose(total, layouts.inverse((out[1], *out[2:], out[0])))
