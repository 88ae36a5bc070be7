"""Arguments that no link can work with: named, and refused when built where that can be known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lab import wire
from fedjax_lab.wire.base import float_norm
from tests.refusals import raises, refused


@pytest.mark.parametrize("make", [wire.top_k, wire.random_k, wire.rand_mask])
@pytest.mark.parametrize("k", [0, -3, 0.0, -0.1, 1.5, float("nan"), float("inf"), "all", None, True, [3]])
def test_numbers_of_entries_that_make_no_sense(make, k):
    refused(lambda: make(k), "k must be", "share")


@pytest.mark.parametrize("make", [wire.quantize, wire.lloyd_max, wire.eden])
@pytest.mark.parametrize("bits", [0, 17, -1, 2.5, None, True])
def test_numbers_of_bits_that_make_no_sense(make, bits):
    refused(lambda: make(bits), f"{make.__name__} takes 1 to 16 bits", repr(bits))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: wire.qsgd(1), ("2 to 16 bits", "1")),
        (lambda: wire.qsgd(levels=2**15), ("2 to 16 bits",)),
        (lambda: wire.qsgd(levels=0), ("levels", "positive")),
        (lambda: wire.qsgd(norm="l3"), ("'l2' or 'max'",)),
        (lambda: wire.threshold(0), ("threshold's value", "positive")),
        (lambda: wire.threshold(-1.0), ("threshold's value",)),
        (lambda: wire.sign("median"), ("'mean'", "median")),
        (lambda: wire.sign(-1.0), ("scale", "positive")),
        (lambda: wire.majority_vote(0), ("scale",)),
        (lambda: wire.terngrad(0), ("clip",)),
        (lambda: wire.lloyd_max(2, scale="biased"), ("unbiased", "did you mean")),
        (lambda: wire.hadamard(100), ("power of two", "100")),
        (lambda: wire.hadamard(2**30), ("memory",)),
        (lambda: wire.eden(2, block=3), ("power of two",)),
        (lambda: wire.eden(2, passes=0), ("passes",)),
        (lambda: wire.kashin(1.0), ("above 1",)),
        (lambda: wire.kashin(iterations=0), ("iterations",)),
        (lambda: wire.low_rank(0), ("rank", "positive")),
        (lambda: wire.low_rank(2, iterations=0), ("iterations",)),
        (lambda: wire.power_sgd(1.5), ("rank", "integer")),
        (lambda: wire.factorize(2, sweeps=0), ("sweeps",)),
        (lambda: wire.count_sketch(0, width=10), ("rows",)),
        (lambda: wire.count_sketch(width=0), ("width",)),
        (lambda: wire.count_mean_sketch(width=1.5), ("width",)),
        (lambda: wire.fetch_sgd(width=10, k=0), ("k must be",)),
        (lambda: wire.fetch_sgd(width=10, k=2, momentum=2.0), ("momentum",)),
        (lambda: wire.clip(0), ("max_norm", "positive")),
        (lambda: wire.clip(-1.0), ("max_norm",)),
        (lambda: wire.gaussian(-1.0), ("noise_multiplier",)),
        (lambda: wire.split({"(": wire.sign()}), ("'('", "regular expression")),
        (lambda: wire.split({3: wire.sign()}), ("3", "regular expression")),  # pyright: ignore
        (lambda: wire.chain([wire.sign(), wire.elias()]), ("one by one", "chain(*links)")),  # pyright: ignore
        (lambda: wire.gaussian(1.0, by="clients"), ("client", "did you mean")),
        (lambda: wire.gaussian(1.0, shares=3), ("server adds its noise once",)),
        (lambda: wire.gaussian(1.0, by="client", shares=0), ("shares",)),
    ],
)
def test_arguments_that_make_no_sense(make, words):
    refused(make, *words)


def test_what_only_shapes_tell():
    x = jnp.ones(5000)
    raises(lambda: wire.round_trip(wire.top_k(5001), x), "top_k was asked for 5001 entries", "has 5000")
    raises(lambda: wire.round_trip(wire.random_k(5001), x), "random_k was asked for 5001")
    raises(lambda: wire.round_trip(wire.dense_rotation(), x), "matrix of 0.1 GB", "wire.hadamard()", "grouped")
    raises(lambda: wire.round_trip(wire.fetch_sgd(width=9, k=6000), x), "k was asked for 6000")


def test_complex_numbers():
    x = {"a": jnp.ones(3), "b": jnp.full(3, 3 + 4j)}
    raises(lambda: wire.round_trip(wire.qsgd(4), x), "real and imaginary parts")
    np.testing.assert_allclose(float_norm(x), (3 + 75) ** 0.5, rtol=1e-6)


@pytest.mark.parametrize("x", [1.5, {"a": [1.0, 2.0], "n": 3}, np.ones((2, 3))])
def test_plain_numbers_make_the_round_trip_too(x):
    for link in (wire.identity(), wire.clip(9.0), wire.low_rank(1), wire.grouped(wire.hadamard())):
        got, _ = wire.round_trip(link, x)
        np.testing.assert_allclose(*(np.hstack([np.ravel(a) for a in jax.tree.leaves(t)]) for t in (got, x)), rtol=1e-6)


def test_nothing_to_encode():
    """Uploads without floats, and empty leaves, pass through every link."""
    for x in ({"n": jnp.arange(4)}, {"n": jnp.arange(2), "e": jnp.zeros((0, 3))}):
        for link in (
            wire.top_k(0.1), wire.qsgd(4), wire.eden(2), wire.hadamard(), wire.majority_vote(0.1), wire.low_rank(1),
            wire.error_feedback(wire.sign()), wire.grouped(wire.sign()), wire.chain(wire.random_k(0.5), wire.qsgd(4)),
        ):  # fmt: skip
            got, size = wire.round_trip(link, x)
            assert (got["n"] == x["n"]).all(), link.name
            assert size == 4 * x["n"].size + (4 if link.name == "eden" else 0), link.name  # whose seed travels anyway
