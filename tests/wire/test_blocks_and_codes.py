"""Parts of a model, and entropy codes: by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lab import wire
from fedjax_lab.wire.base import shapes
from fedjax_lab.wire.codes import ELIAS, BitReader, bits_to_bytes, rice
from fedjax_lab.wire.coding import best_rice
from tests.refusals import raises, refused
from tests.wire.table import context


def test_by_parameter_each_has_its_own_share_and_scale():
    x = {"large": jnp.array([100.0, 90.0, 80.0, 70.0]), "small": jnp.array([0.4, -0.3, 0.2, 0.1])}
    got, _ = wire.round_trip(wire.grouped(wire.top_k(2)), x)
    np.testing.assert_allclose(got["small"], [0.4, -0.3, 0, 0])
    got, _ = wire.round_trip(wire.top_k(2), x)
    np.testing.assert_allclose(got["small"], 0)
    got, size = wire.round_trip(wire.grouped(wire.sign()), x)
    np.testing.assert_allclose(got["large"], 85.0)
    np.testing.assert_allclose(got["small"], [0.25, -0.25, 0.25, 0.25])
    assert size == 2 * (1 + 4)


def test_equal_blocks_of_everything_in_a_row():
    x = {"a": jnp.arange(1.0, 6.0), "b": -jnp.arange(6.0, 8.0)}
    got, size = wire.round_trip(wire.grouped(wire.sign(), size=3), x)  # 1 2 3 | 4 5 -6 | -7 and two zeros
    np.testing.assert_allclose(got["a"], [2, 2, 2, 5, 5])
    np.testing.assert_allclose(got["b"], [-5, -7 / 3], rtol=1e-6)
    assert size == 3 * (1 + 4)
    assert wire.round_trip(wire.grouped(wire.sign(), count=7), x)[1] == 7 * 5


def test_each_part_of_the_model_goes_through_its_own_link():
    x = {"conv": {"kernel": jnp.ones((3, 3))}, "dense": {"kernel": jnp.arange(6.0)}, "bias": jnp.array([0.5])}
    link = wire.split({"conv": wire.sign(), "dense/kernel": wire.top_k(1)})
    got, size = wire.round_trip(link, x)
    np.testing.assert_allclose(got["dense"]["kernel"], [0, 0, 0, 0, 0, 5])
    np.testing.assert_allclose(got["bias"], [0.5])
    assert size == (2 + 4) + (4 + 1) + 4
    stateful = wire.split({"conv": wire.error_feedback(wire.sign())}, wire.power_sgd(1))
    ctx = wire.context(0, stateful, x)
    own = stateful.init_client(shapes(x))
    assert [leaf.shape for leaf in jax.tree.leaves(own)] == [(3, 3)]
    payload, own, _ = stateful.encode(x, own, ctx)
    assert jax.tree.structure(stateful.decode(stateful.open(payload, ctx), ctx)[1]) == jax.tree.structure(ctx.state)


def test_server_memories_of_parts_do_not_travel():
    link = wire.grouped(wire.error_feedback(wire.top_k(0.5), "ef21"))
    state = link.init(shapes({"a": jnp.zeros(4), "n": jnp.arange(2)}))
    assert jax.tree.leaves(state)
    assert not jax.tree.leaves(link.sends(state))


def test_what_parts_can_not_be():
    refused(lambda: wire.grouped(wire.sign(), size=3, count=2), "size= or count=")
    refused(lambda: wire.grouped(wire.sign(), size=0), "size", "positive")
    refused(lambda: wire.grouped(wire.sign), "wire.top_k(0.05)")
    refused(lambda: wire.split({}), "at least one route")
    refused(lambda: wire.split({"a": 3}), "split takes links")
    raises(lambda: wire.round_trip(wire.split({"dens": wire.sign()}), {"conv": jnp.ones(3)}), "'dens'", "conv")


# ---- codes ----


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("gamma", {1: "1", 2: "010", 3: "011", 4: "00100", 17: "000010001"}),
        ("delta", {1: "1", 2: "0100", 3: "0101", 4: "01100", 17: "001010001"}),
        ("omega", {1: "0", 2: "100", 3: "110", 4: "101000", 16: "10100100000", 100: "1011011001000"}),
    ],
)
def test_elias_words(code, words):
    """Elias 1975; the words of his tables."""
    for value, word in words.items():
        assert "".join(map(str, ELIAS[code].write(value))) == word


def test_golomb_words():
    """Quotient in unary, remainder in binary: for a parameter of 4, the gap 11 = 1 + 2 * 4 + 2 is 110 10."""
    assert "".join(map(str, rice(2).write(11))) == "11010"
    assert "".join(map(str, rice(0).write(3))) == "110"


@pytest.mark.parametrize("code", [*ELIAS.values(), rice(0), rice(3)], ids=[*ELIAS, "rice 0", "rice 3"])
def test_words_are_as_long_as_counted_and_can_be_read_in_a_row(code):
    values = [1, 2, 3, 4, 7, 8, 15, 16, 17, 100, 255, 256, 5000, 65535, 65536]
    if code.length is rice(0).length:
        values = values[:10]
    written = [code.write(v) for v in values]
    np.testing.assert_array_equal(code.length(jnp.array(values, jnp.uint32)), [len(w) for w in written])
    bit = BitReader(bits_to_bytes([b for w in written for b in w]))
    assert [code.read(bit) for _ in values] == values
    with pytest.raises(ValueError, match="middle of a code word"):
        [code.read(BitReader(b"")) for _ in values]


def test_elias_lengths_of_large_integers():
    large = [2**31 - 1, 2**31, 2**32 - 1]
    for code in ELIAS.values():
        np.testing.assert_array_equal(code.length(jnp.array(large, jnp.uint32)), [len(code.write(v)) for v in large])


def test_golomb_coding_of_random_positions_is_near_the_entropy():
    """Sattler et al. 2019: 1% of positions at about 8.4 bits each (the entropy is 8.08), where indices take 17."""
    size, count = 100_000, 1000
    x = jnp.zeros(size).at[jax.random.permutation(jax.random.key(0), size)[:count]].set(1.0)
    link = wire.chain(wire.top_k(count), wire.golomb())
    _, bits = wire.round_trip(link, x)
    assert 8.08 < (8 * int(bits) - 32 * count) / count < 8.3
    assert wire.round_trip(wire.top_k(count), x)[1] == 4 * count + 17 * count // 8
    assert best_rice(count, size) == 6
    assert best_rice(5, 5) == 0


@pytest.mark.parametrize("code", [wire.golomb(), wire.elias("delta")])
@pytest.mark.parametrize("values", [wire.sign(), wire.quantize(4), wire.grouped(wire.quantize(8), size=10)])
def test_positions_are_coded_behind_a_quantizer_of_the_values(values, code):
    """As sparse ternary compression does (Sattler et al. 2019, algorithm 1: top-k, one magnitude, Golomb)."""
    x, sparse, ctx = jax.random.normal(jax.random.key(1), (5000,)), wire.top_k(50), wire.context(0)
    size = lambda *links: int(wire.round_trip(wire.chain(*links), x)[1])
    saved = size(sparse) - size(sparse, code)
    assert saved > 5
    link = wire.chain(sparse, values, code)
    payload, _, length = link.encode(x, (), ctx)
    data = wire.serialize(payload)
    assert len(data) == int(length) == size(sparse, values) - saved
    got = wire.undo(link, payload, ctx)
    np.testing.assert_array_equal(wire.undo(link, wire.deserialize(data, payload), ctx), got)
    np.testing.assert_array_equal(got, wire.round_trip(wire.chain(sparse, values), x, 0)[0])


def test_runs_by_hand():
    """Levels 0 0 3 0 -1 in gamma: a count of 2 + 1, gap 3, plus, 3; gap 2, minus, 1."""
    link = wire.chain(wire.qsgd(levels=3, norm="max"), wire.elias("gamma", runs=True))
    x = jnp.array([0.0, 0.0, 3.0, 0.0, -1.0])
    payload, _, size = link.encode(x, (), context(jax.random.key(0), ()))
    word = "011" + "011" + "0" + "011" + "010" + "1" + "1"
    data = wire.serialize(payload)
    assert len(data) == int(size) == 4 + 2
    assert "".join(f"{b:08b}" for b in data[4:]) == word + "0" * (16 - len(word))
    np.testing.assert_allclose(wire.undo(link, payload, context(jax.random.key(0), ())), x)


def test_codes_that_do_not_exist_are_refused():
    refused(lambda: wire.elias("gama"), "gamma", "did you mean")
    refused(lambda: wire.golomb(-1), "parameter")


@pytest.mark.parametrize("coder", [wire.elias(), wire.elias("gamma", runs=True)])
@pytest.mark.parametrize("memory", [lambda link: link, wire.error_feedback])
def test_a_code_behind_blocks_is_that_within_each(coder, memory):
    """QSGD's buckets, then Elias: as long as the buckets' own codes, and read back."""
    x = jax.random.normal(jax.random.key(0), (70,))
    quantizer = wire.qsgd(3)
    behind = wire.chain(memory(wire.grouped(quantizer, size=16)), coder)
    within = memory(wire.grouped(wire.chain(quantizer, coder), size=16))
    ctx, like = wire.context(0), shapes(x)
    (payload, _, size), (other, _, expected) = (
        link.encode(x, link.init_client(like), ctx) for link in (behind, within)
    )
    data = wire.serialize(payload)
    assert len(data) == int(size) == int(wire.length(payload))
    assert abs(int(size) - int(expected)) <= 5  # of five blocks, rounded with other keys
    template = behind.encode(jnp.ones(70), behind.init_client(like), ctx)[0]
    got = behind.open(wire.deserialize(data, template), ctx)
    np.testing.assert_array_equal(got, behind.open(payload, ctx))
    # The chain gives each of its links keys of its own.
    assert float(jnp.linalg.norm(got - x)) < 2 * float(jnp.linalg.norm(within.open(other, ctx) - x))


def test_positions_in_blocks_are_coded_block_by_block():
    x = jax.random.normal(jax.random.key(0), (64,))
    link = wire.chain(wire.grouped(wire.top_k(2), size=32), wire.golomb())
    got, size = wire.round_trip(link, x)
    np.testing.assert_array_equal(got, wire.round_trip(wire.grouped(wire.top_k(2), size=32), x)[0])
    assert 2 * 2 * 4 < int(size) <= 2 * (2 * 4 + 3)


@pytest.mark.parametrize(
    "link", [wire.random_k(0.5), wire.hadamard(), wire.kashin(), wire.chain(wire.hadamard(), wire.quantize(8))]
)
def test_links_that_are_undone_after_the_sum_go_by_parameter_too(link):
    x = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.arange(6.0)}
    whole, ctx = wire.grouped(link), wire.context(0)
    for made in (whole, wire.split({"a": link, "b": link})):
        payload, _, size = made.encode(x, (), ctx)
        got, _ = made.decode(made.open(payload, ctx), ctx)
        parts = [link.encode(leaf, (), ctx.part(i)) for i, leaf in enumerate((x["a"], x["b"]))]
        for i, (name, (part, _, _)) in enumerate(zip("ab", parts, strict=True)):
            np.testing.assert_array_equal(got[name], wire.undo(link, part, ctx.part(i)))
        assert int(size) == sum(int(length) for _, _, length in parts)
