"""Chains: in which order they are undone, what they let through, and which of them make no sense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lab import wire
from fedjax_lab.wire.base import as_opened, float_norm, shapes
from tests.problems import assert_close
from tests.refusals import raises, refused
from tests.wire.table import LINKS, compiled, context, states, tree


def spy(name, trail, summable):
    """Adds nothing, and says when it is used."""

    def note(what, value):
        trail.append(f"{name}.{what}")
        return value

    return wire.Wire(
        encode=lambda x, state, ctx: (note("encode", x), state, 0),
        open=lambda payload, ctx: note("open", payload),
        decode=lambda total, ctx: (note("decode", total), ctx.state),
        summable=summable,
        name=name,
    )


def test_the_longest_summable_prefix_is_undone_after_the_sum():
    trail = []
    link = wire.chain(*[spy(n, trail, n in "ab") for n in "abcd"])
    ctx = context(jax.random.key(0), ())
    payload, _, _ = link.encode(jnp.ones(3), (), ctx)
    assert trail == ["a.encode", "b.encode", "c.encode", "d.encode"]
    trail.clear()
    opened = link.open(payload, ctx)
    # d for each client; c, the first that can't be summed, is opened for each and decoded for all.
    assert trail == ["d.open", "d.decode", "c.open"]
    trail.clear()
    link.decode(opened, ctx)
    assert trail == ["c.decode", "b.open", "b.decode", "a.open", "a.decode"]
    assert not link.summable
    assert wire.chain(*[spy(n, [], True) for n in "ab"]).summable


def test_nested_chains_are_one_and_identities_vanish():
    inner = wire.chain(wire.hadamard(), wire.quantize(4))
    assert wire.chain(inner, wire.elias()).name == "chain(hadamard, quantize, elias('omega'))"
    assert wire.chain(wire.identity(), wire.chain()).name == "identity"
    link = wire.top_k(3)
    assert wire.chain(link, wire.identity()) is link
    assert wire.top_k(1.0).name == wire.random_k(1.0).name == "identity"


def test_a_chain_undone_by_hand():
    """Two clients' random_k behind a rotation, quantized: summed in 1/4 of the rotated entries, rotated back once."""
    link = wire.chain(wire.hadamard(), wire.random_k(0.25), wire.qsgd(12))
    x, y = jax.random.normal(jax.random.key(0), (2, 256))
    ctx = context(jax.random.key(1), ())
    opened = [link.open(link.encode(v, (), ctx)[0], ctx) for v in (x, y)]
    assert [leaf.shape for leaf in jax.tree.leaves(opened[0])] == [(64,)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *opened)
    got = link.decode(mean, ctx)[0]
    exact = wire.chain(wire.hadamard(), wire.random_k(0.25))
    expected = wire.undo(exact, exact.encode((x + y) / 2, (), ctx)[0], ctx)
    assert_close(got, expected, atol=0.02)


# Memories add what they like; products of factors and means of buckets have no bound of use.
UNBOUNDED = [
    "error_feedback", "ef21", "momentum_correction", "chain", "fetch_sgd", "count_mean_sketch", "low_rank",
    "low_rank by iteration", "factorize",
]  # fmt: skip


@pytest.mark.parametrize("name", [n for n in LINKS if "noise" not in n])
def test_what_arrives_is_no_longer_than_the_bound(name):
    link, like, key = LINKS[name], shapes(tree()), jax.random.key(0)
    most = lambda x: link.gain(link.bound(float(float_norm(x)), like), like)
    if most(tree()) is None:
        assert name in UNBOUNDED
        return
    (encode, undo), (own, server) = compiled(name), states(name)
    for x in (tree(), jax.tree.map(lambda a: a * (a > 2.5), tree()), jax.tree.map(jnp.zeros_like, tree())):
        payload, _, _ = encode(x, own, server, key)
        assert float(float_norm(undo(payload, server, key))) <= float(most(x)) * (1 + 1e-5) + 1e-6


# ---- noise ----


def deviation(link, size=100_000, parts=2):
    """The standard deviation of what arrives of zeros."""

    def draw(key):
        ctx = context(key, ())
        payload, _, _ = link.encode(jnp.zeros(size), link.init_client(shapes(jnp.zeros(size))), ctx)
        return link.decode(link.open(payload, ctx), ctx)[0]

    got = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), parts)))
    assert abs(got.mean()) < 5 * got.std() / got.size**0.5
    return float(got.std())


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        (wire.chain(wire.clip(2.0), wire.gaussian(0.5)), 1.0),
        (wire.chain(wire.clip(2.0), wire.gaussian(0.5, by="client")), 1.0),
        (wire.chain(wire.clip(2.0), wire.gaussian(0.5, by="client", shares=16)), 0.25),
        # The tighter of two clips; a rotation lengthens nothing.
        (wire.chain(wire.clip(5.0), wire.hadamard(), wire.clip(2.0), wire.gaussian(0.5)), 1.0),
        # Kashin's 7 cuts may lengthen what is opened sevenfold: the noise stands in front of it and covers that.
        (wire.chain(wire.clip(1.0), wire.gaussian(0.5), wire.hadamard(), wire.kashin()), 3.5),
        # Levels of a third of the norm lengthen by 1 + sqrt(d) / 3.
        (wire.chain(wire.clip(1.0), wire.gaussian(0.01), wire.qsgd(levels=3)), 0.01 * (1 + 100_000**0.5 / 3)),
        (wire.chain(wire.clip(1.0), wire.gaussian(2.0, by="client"), wire.random_k(0.99999)), 2 / 0.99999),
        # The server's noise is added to what arrives, which random_k has lengthened by d/k, and a clip shortened.
        (wire.chain(wire.clip(1.0), wire.gaussian(0.5), wire.random_k(0.25)), 2.0),
        (wire.chain(wire.clip(5.0), wire.gaussian(0.5), wire.clip(2.0)), 1.0),
    ],
    ids=["server", "client", "shares", "two clips", "kashin", "qsgd", "random_k client", "random_k", "clips"],
)
def test_noise_is_calibrated_to_what_the_whole_chain_lets_through(link, expected):
    """200,000 draws: 2% are twelve standard errors, and 5% more or less noise would be seen."""
    assert abs(deviation(link) / expected - 1) < 0.02


def test_a_clients_noise_covers_what_it_is_added_to():
    """A clip behind it comes too late: twice the noise fills the same ball."""
    loose = wire.chain(wire.clip(4.0), wire.gaussian(0.001, by="client"), wire.clip(2.0))
    assert abs(deviation(loose) / 0.004 - 1) < 0.02


def test_noise_of_zero_is_none_whatever_the_bound():
    for by in ("client", "server"):
        link = wire.chain(wire.clip(float("inf")), wire.gaussian(0.0, by=by))
        x = tree()
        assert_close(wire.round_trip(link, x)[0], x, atol=1e-7)


def test_noise_differs_by_leaf_client_and_round():
    link = wire.chain(wire.clip(1.0), wire.gaussian(1.0, by="client"))
    draw = lambda key: wire.undo(
        link, link.encode([jnp.zeros(50), jnp.zeros(50)], (), context(key, ()))[0], context(key, ())
    )
    a, b = draw(jax.random.key(0)), draw(jax.random.key(1))
    rows = np.stack([*a, *b])
    assert np.abs(np.corrcoef(rows) - np.eye(4)).max() < 0.6


# ---- what is refused ----


def test_chains_that_make_no_sense_are_refused_when_built():
    fixed = wire.fixed_point(limit=1.0, clients=10)
    for make, words in (
        (lambda: wire.chain(wire.top_k(0.1), fixed), ("fixed_point must be summed", "top_k in front", "random_k")),
        (lambda: wire.chain(wire.qsgd(4), fixed), ("fixed_point must be summed", "qsgd")),
        (lambda: wire.chain(wire.clip(1.0), wire.eden(2), wire.gaussian(1.0)), ("gaussian must be summed", "eden")),
        (
            lambda: wire.chain(wire.top_k(0.1), wire.majority_vote(0.1)),
            ("majority_vote works on the sum", "put it first"),
        ),
        (lambda: wire.chain(wire.top_k(0.1), wire.power_sgd(2)), ("power_sgd works on the sum", "top_k")),
        (lambda: wire.chain(wire.top_k(0.1), wire.fetch_sgd(width=9, k=2)), ("fetch_sgd works on the sum",)),
        (lambda: wire.chain(wire.threshold(1.0), wire.qsgd(4)), ("threshold", "length depends", "put it last")),
        (lambda: wire.chain(wire.qsgd(4), wire.elias(), wire.golomb()), ("elias", "put it last")),
        (lambda: wire.chain(wire.qsgd(4), wire.hadamard()), ("hadamard works on floats", "qsgd", "codes")),
        (
            lambda: wire.chain(wire.clip(1.0), wire.sign(), wire.gaussian(1.0, by="client")),
            ("gaussian works on floats",),
        ),
        (
            lambda: wire.chain(wire.clip(1.0), wire.top_k(0.1), wire.gaussian(1.0, by="client")),
            ("gaussian behind top_k", "positions"),
        ),
        (lambda: wire.chain(fixed, wire.gaussian(1.0)), ("gaussian works on floats", "fixed_point")),
        (lambda: wire.chain(wire.gaussian(1.0)), ("gaussian is calibrated to a bound", "wire.clip")),
        (lambda: wire.chain(wire.random_k(0.1), wire.gaussian(1.0)), ("has none", "in front")),
        (lambda: wire.chain(wire.gaussian(1.0, by="client"), wire.clip(1.0)), ("has none", "in front")),
        (
            lambda: wire.chain(wire.clip(1.0), wire.gaussian(1.0), wire.count_mean_sketch(width=9)),
            ("count_mean_sketch breaks",),
        ),
        (
            lambda: wire.chain(
                wire.clip(1.0), wire.error_feedback(wire.random_k(0.1, unbiased=False)), wire.gaussian(1.0)
            ),
            ("error_feedback(random_k) breaks", "behind it"),
        ),
        (lambda: wire.chain(wire.top_k, wire.qsgd(4)), ("call it",)),
        (lambda: wire.chain(0.05), ("made of links", "0.05")),
        (lambda: wire.grouped(wire.chain(wire.clip(1.0), wire.gaussian(1.0))), ("noise", "put it behind")),
        (lambda: wire.own_seed(fixed), ("fixed_point works on sums",)),
        (lambda: wire.own_seed(wire.power_sgd(2)), ("power_sgd works on sums",)),
    ):
        refused(make, *words)


def test_a_clip_behind_a_memory_bounds_it_again():
    memory = wire.error_feedback(wire.random_k(0.5, unbiased=False))
    link = wire.chain(memory, wire.clip(1.0), wire.gaussian(2.0))
    assert link.bound(None, shapes(jnp.zeros(10))) == 1.0


def test_noise_alone_can_not_be_used():
    raises(lambda: wire.gaussian(1.0, by="client").encode(jnp.ones(3), (), context(jax.random.key(0), ())), "chain")


def test_decode_is_trivial_where_nothing_is_left_after_the_sum():
    """By which fl.uplink knows that any aggregator will do."""
    trivial = (
        wire.top_k(2),
        wire.chain(wire.top_k(2), wire.qsgd(4)),
        wire.grouped(wire.top_k(0.5)),
        wire.grouped(wire.qsgd(4), size=10),
        wire.eden(2),
        wire.clip(1.0),
        wire.chain(wire.clip(1.0), wire.gaussian(1.0, by="client")),
    )
    assert all(link.decode is as_opened for link in trivial)
    assert all(link.decode is not as_opened for link in (wire.hadamard(), wire.random_k(0.5), wire.majority_vote(1.0)))


def test_noise_on_what_is_not_clipped_is_refused():
    refused(lambda: wire.chain(wire.clip(float("inf")), wire.gaussian(0.5)), "without end")
    x = jnp.arange(3.0)
    link = wire.chain(wire.clip(float("inf")), wire.gaussian(0.0))
    payload, _, _ = link.encode(x, (), wire.context(0))
    np.testing.assert_array_equal(link.decode(payload, wire.context(0))[0], x)
