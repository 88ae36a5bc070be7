"""Errors and lengths that can be worked out by hand: papers' closed forms, at 2%."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lab import wire
from fedjax_lab.wire.base import shapes
from fedjax_lab.wire.codes import ELIAS
from fedjax_lab.wire.eden import normal_levels
from tests.wire.table import context


def draws(link, x, count, of=None):
    """``of(payload, what arrives, bytes)`` over many draws; by default the squared error."""
    of = of or (lambda payload, got, size: jnp.sum(jnp.square(got - x)))

    def draw(key):
        ctx = context(key, ())
        payload, _, size = link.encode(x, link.init_client(shapes(x)), ctx)
        return of(payload, wire.undo(link, payload, ctx), size)

    keys = jax.random.split(jax.random.key(8), count)
    return np.asarray(jax.jit(lambda k: jax.lax.map(draw, k, batch_size=min(count, 64)))(keys), np.float64)


def unit(x):
    return x / jnp.linalg.norm(x)


V = unit(jnp.array([3.0, -2.0, 1.0, 0.5, -0.1, 0.01, 0.0, 4.0, -1.0, 1.3, 0.7, 0.2, -0.6, 2.0, 0.05, -0.02]))


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        (wire.drive(unbiased=False), 1 - 2 / math.pi),
        (wire.drive(), math.pi / 2 - 1),
        (wire.eden(1), 0.5708),
        (wire.eden(2), 0.1331),
        (wire.eden(3), 0.0358),
        (wire.eden(4), 0.0096),
    ],
    ids=["drive biased", "drive unbiased", "eden 1", "eden 2", "eden 3", "eden 4"],
)
def test_drive_and_eden_lose_what_their_papers_say(link, expected):
    x = unit(jax.random.normal(jax.random.key(0), (2**15,)))
    np.testing.assert_allclose(draws(link, x, 16).mean(), expected, rtol=0.02)


@pytest.mark.parametrize(("size", "expected", "count"), [(128, 0.546, 8000), (1024, 0.564, 100), (8192, 0.569, 16)])
def test_eden_of_lognormal_vectors(size, expected, count):
    """One Hadamard transform, as the figures were computed."""
    link = wire.eden(1, passes=1)

    def draw(key):
        x = unit(jnp.exp(jax.random.normal(key, (size,))))
        ctx = context(key, ())
        return jnp.sum(jnp.square(wire.undo(link, link.encode(x, (), ctx)[0], ctx) - x))

    got = jax.jit(lambda keys: jax.lax.map(draw, keys, batch_size=min(count, 100)))(
        jax.random.split(jax.random.key(8), count)
    )
    np.testing.assert_allclose(got.mean(), expected, rtol=0.02)


def test_eden_of_a_long_lognormal_vector_rotated_at_once():
    x = unit(jnp.exp(jax.random.normal(jax.random.key(1), (2**17,))))
    link = wire.eden(1, block=2**17, passes=1)
    np.testing.assert_allclose(draws(link, x, 4).mean(), 0.5705, rtol=0.02)


def fractions(share):
    f = np.asarray(share, np.float64)
    return f - np.floor(f)


@pytest.mark.parametrize("levels", [1, 3, 7])
def test_qsgd_error(levels):
    f = fractions(levels * np.abs(np.asarray(V)))
    np.testing.assert_allclose(
        draws(wire.qsgd(levels=levels), V, 20000).mean(), (f * (1 - f)).sum() / levels**2, rtol=0.02
    )


def test_terngrad_error():
    a = np.abs(np.asarray(V))
    np.testing.assert_allclose(draws(wire.terngrad(), V, 20000).mean(), (a * (a.max() - a)).sum(), rtol=0.02)


def test_stochastic_uniform_error():
    low, high = float(V.min()), float(V.max())
    step = (high - low) / 7
    f = fractions((np.asarray(V, np.float64) - low) / step)
    got = draws(wire.quantize(3, stochastic=True), V, 20000).mean()
    np.testing.assert_allclose(got, (f * (1 - f)).sum() * step**2, rtol=0.02)


def test_natural_compression_error_and_its_bound():
    a = np.abs(np.asarray(V, np.float64))
    low = np.where(a > 0, 2.0 ** np.floor(np.log2(np.where(a > 0, a, 1))), 0)
    got = draws(wire.natural(), V, 20000).mean()
    np.testing.assert_allclose(got, ((a - low) * (2 * low - a)).sum(), rtol=0.02)
    assert got < 1 / 8  # Horváth et al., theorem 1; the vector is a unit


def test_random_k_error():
    np.testing.assert_allclose(draws(wire.random_k(4), V, 20000).mean(), 16 / 4 - 1, rtol=0.02)


def test_kashin_spreads_a_vector_evenly():
    """No coefficient is 2.5 times as large as if all were equal; those of a Hadamard rotation are like normal ones."""
    uneven = jnp.exp(2 * jax.random.normal(jax.random.key(4), (2730,)))
    peak = {}
    for name, link in {"kashin": wire.kashin(1.5, iterations=8), "hadamard": wire.hadamard()}.items():
        code = link.encode(unit(uneven), (), context(jax.random.key(0), ()))[0].code
        peak[name] = float(jnp.abs(code).max()) * code.size**0.5
    assert peak["kashin"] < 2.5 < 3 < peak["hadamard"]


def test_the_levels_of_a_normal_variable():
    """Max 1960, table I; for many levels Panter and Dite 1951."""
    table = {1: [0.7979], 2: [0.4528, 1.510], 3: [0.2451, 0.7560, 1.344, 2.152]}
    for bits, positive in table.items():
        np.testing.assert_allclose(normal_levels(bits)[2 ** (bits - 1) :], positive, rtol=5e-4)
    z = np.random.default_rng(0).normal(size=200_000)
    for bits, error in {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 8: 3**0.5 * math.pi / 2 / 4**8}.items():
        levels = normal_levels(bits)
        near = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, z)]
        np.testing.assert_allclose(((near - z) ** 2).mean(), error, rtol=0.03)


# ---- lengths ----


@pytest.mark.parametrize(
    ("link", "bits", "extra"),
    [
        (wire.quantize(5), 5, 8),
        (wire.qsgd(4), 4, 4),
        (wire.qsgd(levels=4), 4, 4),  # 9 codes
        (wire.natural(), 9, 0),
        (wire.terngrad(), 1.6, 4),
        (wire.sign(), 1, 4),
        (wire.sign(0.1), 1, 0),
        (wire.one_bit(), 1, 8),
        (wire.lloyd_max(3), 3, 4),
        (wire.fixed_point(20, limit=1.0, clients=10), 20, 0),
        (wire.grouped(wire.qsgd(4), size=100), 4, 40),
        (wire.eden(2), 2, 8),
    ],
)
def test_bits_of_each_quantizer(link, bits, extra):
    """1,024 entries are whole bytes for all of them but the trits; then the scales and seeds."""
    size = 1000 if link.name == "grouped(qsgd)" else 1024
    size = jax.eval_shape(lambda x: wire.round_trip(link, x)[0], jnp.zeros(size)).size
    _, got = wire.round_trip(link, jnp.linspace(-1, 1, size))
    assert int(got) == math.ceil(size * bits / 8) + extra


def words(code, values):
    return np.array([len(code.write(int(v))) for v in values])


@pytest.mark.parametrize("code", ["gamma", "delta", "omega"])
def test_expected_bits_of_coded_levels(code):
    """Each level is one of two, whose words are of known length: the expectation is exact."""
    a = 3 * np.abs(np.asarray(V, np.float64))
    low, f = np.floor(a), a - np.floor(a)
    sign = np.sign(np.asarray(V))
    fold = lambda level: np.where(level > 0, 2 * level, 1 - 2 * level)
    each = (1 - f) * words(ELIAS[code], fold(low * sign)) + f * words(ELIAS[code], fold((low + 1) * sign))
    link = wire.chain(wire.qsgd(levels=3), wire.elias(code))
    got = draws(link, V, 1000, of=lambda p, x, size: jnp.sum(ELIAS[code].length(_folded(p))))
    assert abs(got.mean() - each.sum()) < 4 * got.std() / 1000**0.5
    assert got.std() > 0


def _folded(payload):
    level = payload.payload.code["codes"].codes().astype(jnp.int32) - 3
    return jnp.where(level > 0, 2 * level, 1 - 2 * level)


def test_qsgd_of_one_level_is_as_sparse_and_as_short_as_theorem_3_2_says():
    """At most s(s + sqrt(n)) entries aren't zero, and the expected code is within the theorem's bound."""
    n = 2048
    x = unit(jax.random.normal(jax.random.key(3), (n,)))
    link = wire.chain(wire.qsgd(levels=1), wire.elias("omega", runs=True))
    got = draws(link, x, 60, of=lambda p, got, size: jnp.stack([jnp.sum(got != 0), 8 * size.astype(jnp.int32)]))
    nonzero, bits = got.mean(0)
    assert nonzero <= 1 + n**0.5
    np.testing.assert_allclose(nonzero, float(jnp.abs(x).sum()), rtol=0.02)  # exactly: |x|_1 / |x|_2
    bound = (3 + 1.5 * math.log2(2 * (1 + n) / (1 + n**0.5))) * (1 + n**0.5) + 32
    assert bits <= bound
