"""A program rewritten for CPU loops computes what it did."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import core, lax

from fedjax_lab import banded, rewriting, winograd


def before_and_after(function, *arguments):
    """The values of a function and of its rewritten program, and the rewritten program as text."""
    program = jax.make_jaxpr(function)(*arguments)
    rewritten = rewriting.fast_in_loops(program)
    run = lambda p: core.eval_jaxpr(p.jaxpr, p.consts, *arguments)
    return run(program), run(rewritten), str(rewritten)


@pytest.mark.parametrize("channels", [1, 8], ids=["few channels", "as products"])
@pytest.mark.parametrize("padding", ["VALID", "SAME", [(1, 2), (0, 1)]], ids=str)
@pytest.mark.parametrize("layout", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")], ids=lambda layout: layout[0])
def test_gradients_of_a_convolution(layout, padding, channels):
    x = jax.random.normal(jax.random.key(0), (4, 9, 11, channels))
    w = jax.random.normal(jax.random.key(1), (3, 2, channels, 5))
    if layout[0] == "NCHW":
        x, w = x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1)
    loss = lambda x, w: jnp.sum(lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=layout) ** 2)
    was, now, text = before_and_after(jax.grad(loss, (0, 1)), x, w)
    assert ("dot_general" in text) == (channels == 8)
    for a, b in zip(was, now, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-6 * np.abs(a).max())


@pytest.mark.parametrize("layout", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")], ids=lambda layout: layout[0])
@pytest.mark.parametrize("block", [0, 1e9], ids=["image by image", "all at once"])
@pytest.mark.parametrize(("channels", "features"), [(32, 48), (48, 32), (32, 32)], ids=["to more", "to fewer", "equal"])
@pytest.mark.parametrize(
    ("size", "taps", "padding", "tolerance"),
    [
        ((8, 8), (3, 3), "VALID", 5e-6),
        ((11, 7), (3, 3), "SAME", 5e-6),
        ((7, 8), (5, 5), "SAME", 3e-5),
        ((9, 6), (5, 3), [(1, 2), (0, 1)], 1e-5),
    ],
    ids=["whole tiles", "tiles that stick out", "five taps", "each axis its own"],
)
def test_wide_convolutions_take_fewer_multiplications(
    layout, channels, features, size, taps, padding, tolerance, block, monkeypatch
):
    monkeypatch.setattr(winograd, "LEAST_WORK", 0)
    monkeypatch.setattr(winograd, "BLOCK", block)
    x = jax.random.normal(jax.random.key(0), (3, *size, channels))
    w = jax.random.normal(jax.random.key(1), (*taps, channels, features)) / 17
    if layout[0] == "NCHW":
        x, w = x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1)
    conv = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=layout)
    loss = lambda x, w: jnp.sum(conv(x, w) ** 2)
    was, now, text = before_and_after(lambda x, w: (conv(x, w), *jax.grad(loss, (0, 1))(x, w)), x, w)
    assert "conv_general_dilated[" not in text
    for a, b in zip(was, now, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * np.abs(a).max())


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
@pytest.mark.parametrize(("times", "again"), [(100, 0), (1, 1)], ids=["one block", "several"])
def test_gradients_of_wide_convolutions_share_what_is_transformed(times, again, padding, monkeypatch):
    monkeypatch.setattr(winograd, "BLOCK", times * winograd.BLOCK)
    x, w, g = jnp.ones((20, 26, 26, 32)), jnp.ones((3, 3, 32, 64)), jnp.ones((20, 26, 26, 64))
    conv = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def both(x, w, g):
        y, back = jax.vjp(conv, x, w)
        return y, back(g[:, : y.shape[1], : y.shape[2]])

    program = rewriting.fast_in_loops(jax.make_jaxpr(both)(x, w, g))
    run = lambda *given: core.eval_jaxpr(program.jaxpr, program.consts, *given)
    text = jax.jit(run).lower(x, w, g).compile().as_text()
    # Three products by place; transforms of images, kernel and cotangent, and back to outputs, kernel and images. Those
    # of a block's images don't wait for the backward pass.
    assert text.count(" dot(") == 3 + 3 + 3 + again


@pytest.mark.parametrize("needed", [False, True], ids=["in between", "by the other"])
def test_gradients_are_computed_together_unless_one_needs_the_other(needed):
    x, w = jax.random.normal(jax.random.key(0), (20, 10, 10, 32)), jax.random.normal(jax.random.key(1), (3, 3, 32, 64))
    g = jax.random.normal(jax.random.key(2), (20, 10, 10, 64))
    conv = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def both(x, w, g):
        of_kernel = jax.vjp(lambda w: conv(x, w), w)[1](g)[0]
        moved = w - of_kernel / 100
        return of_kernel, moved, jax.vjp(lambda x: conv(x, moved if needed else w), x)[1](g)[0]

    was, now, text = before_and_after(both, x, w, g)
    assert ("_both_gradients" in text) is not needed
    for a, b in zip(was, now, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("layout", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")], ids=lambda layout: layout[0])
@pytest.mark.parametrize("padding", ["VALID", "SAME", [(1, 2), (0, 1)]], ids=str)
@pytest.mark.parametrize(
    ("channels", "features", "taps"), [(1, 6, (5, 5)), (6, 16, (3, 5)), (3, 24, (5, 5))], ids=["one", "six", "colours"]
)
def test_convolutions_between_few_channels_are_products(channels, features, taps, padding, layout, monkeypatch):
    monkeypatch.setattr(banded, "LEAST_WORK", 0)
    x = jax.random.normal(jax.random.key(0), (4, 7, 15, channels))
    w = jax.random.normal(jax.random.key(1), (*taps, channels, features))
    if layout[0] == "NCHW":
        x, w = x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1)
    conv = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=layout)
    both = lambda x, w: (conv(x, w), *jax.grad(lambda x, w: jnp.sum(conv(x, w) ** 2), (0, 1))(x, w))
    was, now, text = before_and_after(both, x, w)
    # Left are the kernel's gradient of several channels, and the inputs' of 24 features with less than full padding.
    assert text.count("conv_general_dilated[") == (channels > 1) + (features == 24 and padding == "SAME")
    for a, b in zip(was, now, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-6 * np.abs(a).max())


@pytest.mark.parametrize(
    ("channels", "dtype", "precision"),
    [(31, jnp.float32, None), (32, jnp.bfloat16, None), (32, jnp.float32, lax.Precision.HIGHEST)],
    ids=["few channels", "half precision", "highest precision"],
)
def test_plain_sums_where_few_multiplications_do_not_pay_or_are_not_wanted(channels, dtype, precision):
    x, w = jnp.ones((50, 6, 6, channels), dtype), jnp.ones((3, 3, channels, 64), dtype)
    layout = ("NHWC", "HWIO", "NHWC")
    conv = lambda x: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout, precision=precision)
    was, now, text = before_and_after(conv, x)
    assert text.count("conv_general_dilated[") == 1
    np.testing.assert_array_equal(now[0], was[0])


@pytest.mark.parametrize(("outputs", "taps"), [(2, 3), (3, 3), (2, 4), (3, 4), (2, 5)])
def test_minimal_filtering_is_the_filter(outputs, taps):
    a, g, b = winograd.minimal_filtering(outputs, taps)
    places, weights = np.random.default_rng(6).normal(size=outputs + taps - 1), np.arange(1.0, taps + 1)
    few = a @ ((g @ weights) * (b @ places))
    np.testing.assert_allclose(few, np.correlate(places, weights, "valid"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("stride", "groups"), [(2, 1), (1, 4)], ids=["strided", "grouped"])
def test_other_convolutions_stay_convolutions(stride, groups):
    x, w = jnp.ones((2, 6, 6, 8)), jnp.ones((3, 3, 8 // groups, 8))
    conv = lambda w: lax.conv_general_dilated(
        x, w, (stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )
    was, now, text = before_and_after(jax.grad(lambda w: jnp.sum(conv(w) ** 2)), w)
    assert "dot_general" not in text
    np.testing.assert_allclose(now[0], was[0], rtol=1e-5)


@pytest.mark.parametrize("channels", [5, 16])  # slice by slice, entry by entry
@pytest.mark.parametrize("shape", [(3, 6, 4), (3, 7, 5)], ids=["whole blocks", "rest at the ends"])
def test_pooling_and_its_gradient_with_ties(shape, channels):
    shape = (*shape, channels)
    x = jax.random.randint(jax.random.key(2), shape, 0, 3).astype(jnp.float32)  # many equals: the first one is chosen
    loss = lambda x: jnp.sum((nn.max_pool(x, (2, 2), strides=(2, 2)) + 1.0) ** 2)
    was, now, text = before_and_after(jax.value_and_grad(loss), x)
    assert "reduce_window" not in text and "select_and_scatter" not in text
    for a, b in zip(was, now, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("window", "strides", "padding"), [((3, 3), (2, 2), "VALID"), ((2, 2), (2, 2), "SAME")])
def test_windows_that_overlap_or_stick_out_are_left(window, strides, padding):
    x = jax.random.normal(jax.random.key(3), (2, 7, 7, 3))
    loss = lambda x: jnp.sum(nn.max_pool(x, window, strides=strides, padding=padding) ** 2)
    was, now, text = before_and_after(jax.grad(loss), x)
    assert "select_and_scatter_add" in text
    np.testing.assert_array_equal(was[0], now[0])


def test_the_bodies_of_loops_are_rewritten_too():
    x, w = jnp.ones((2, 6, 6, 8)), jnp.ones((3, 3, 8, 8)) / 100
    conv = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    loss = lambda w: jnp.mean(nn.max_pool(conv(x, w), (2, 2), strides=(2, 2)) ** 2)
    was, now, text = before_and_after(lambda w: lax.fori_loop(0, 3, lambda i, w: w - 0.1 * jax.grad(loss)(w), w), w)
    assert "dot_general" in text and "select_and_scatter" not in text
    np.testing.assert_allclose(now[0], was[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(60, 10), (10, 60), (200, 10), (10, 200)],
    ids=["narrow outputs", "narrow inputs", "columns", "columns of the transpose"],
)  # fmt: skip
def test_the_gradient_of_a_narrow_kernel_is_sums(inputs, outputs):
    x = jax.random.normal(jax.random.key(4), (10, inputs))
    w = jax.random.normal(jax.random.key(5), (inputs, outputs))
    was, now, text = before_and_after(jax.grad(lambda w: jnp.sum((x @ w) ** 2)), w)
    assert text.count("dot_general") == 1, "the forward product is left, its gradient is not"
    np.testing.assert_allclose(now[0], was[0], rtol=0, atol=2e-6 * np.abs(was[0]).max())


@pytest.mark.parametrize(
    ("examples", "inputs", "outputs", "dtype"),
    [(40, 60, 10, jnp.float32), (20, 200, 10, jnp.float32), (10, 12, 10, jnp.float32), (10, 60, 10, jnp.bfloat16)],
    ids=["many terms", "many of a large kernel", "short rows", "half precision"],
)
def test_other_products_are_left(examples, inputs, outputs, dtype):
    x, w = jnp.ones((examples, inputs), dtype), jnp.ones((inputs, outputs), dtype)
    _, _, text = before_and_after(jax.grad(lambda w: jnp.sum((x @ w) ** 2)), w)
    assert text.count("dot_general") == 2


def test_what_nothing_is_made_of_is_dropped_unless_it_has_effects():
    """Keys that a loop's body folds for whoever draws, for instance, in the model that draws nothing."""

    def function(x, w):
        def step(i, x):
            key = jax.random.fold_in(jax.random.key(0), i)
            jax.random.fold_in(key, 1), jnp.sin(x)
            jax.debug.callback(lambda x: None, x[0])
            return x @ w

        return jax.lax.fori_loop(0, 3, step, x)

    x, w = jnp.ones((2, 4)), jnp.eye(4)
    program = jax.make_jaxpr(function)(x, w)
    rewritten = rewriting.in_forms(program, {"dot_general": lambda eqn: None})
    names = lambda closed: [eqn.primitive.name for eqn in closed.eqns[-1].params["jaxpr"].eqns]
    assert {"random_fold_in", "sin", "debug_callback"} <= set(names(program))
    assert {"random_fold_in", "sin"}.isdisjoint(names(rewritten))
    assert "debug_callback" in names(rewritten)
    np.testing.assert_array_equal(jax.core.eval_jaxpr(rewritten.jaxpr, rewritten.consts, x, w)[0], x)
