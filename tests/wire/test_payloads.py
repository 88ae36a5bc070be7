"""What holds for every link: its payload can be written down and read back, and is as long as it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_lab as fl
from fedjax_lab import wire
from fedjax_lab.wire.packing import pack, pack_trits, unpack
from tests.problems import assert_close, assert_same_bits
from tests.wire.table import LINKS, LOSSLESS, compiled, context, states, tree

KEY = jax.random.key(3)
# The others are made of these.
KINDS = [
    "top_k", "random_k", "rand_mask", "threshold", "qsgd", "natural", "terngrad", "majority_vote", "eden 2", "kashin",
    "low_rank", "power_sgd", "count_sketch", "fetch_sgd", "ef21", "momentum_correction", "split", "long chain",
    "golomb in blocks", "elias omega", "noise of the server", "noise in shares",
]  # fmt: skip
SOME = [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in LINKS]


@pytest.mark.parametrize("name", SOME)
def test_a_payload_is_as_long_as_its_bytes_and_can_be_read_back(name):
    x = tree()
    (encode, undo), (own, server) = compiled(name), states(name)
    payload, _, size = encode(x, own, server, KEY)
    template, _, _ = encode(tree(1), own, server, jax.random.key(4))  # another client's
    data = wire.serialize(payload)
    assert len(data) == int(size) == int(wire.length(payload)) == int(fl.nbytes(payload))
    again = wire.deserialize(data, template)
    assert_same_bits(again, payload)
    got = undo(payload, server, KEY)
    assert_same_bits(undo(again, server, KEY), got)
    np.testing.assert_array_equal(got["n"], x["n"])
    if name in LOSSLESS:
        assert_close(got, x, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"payload (ends|needs)|middle of a code word"):
        wire.deserialize(data[:-1], template)
    with pytest.raises(ValueError, match="payload ends 1 bytes before"):
        wire.deserialize(data + b"x", template)


@pytest.mark.parametrize("name", LINKS)
def test_what_arrives_has_the_shapes_and_types_of_what_was_sent(name):
    x = {"w": jnp.ones((40, 30), jnp.bfloat16), "b": jnp.ones(7), "n": jnp.arange(2)}
    got, _ = jax.eval_shape(lambda x: wire.round_trip(LINKS[name], x), x)
    assert jax.tree.structure(got) == jax.tree.structure(x)
    for key, leaf in x.items():
        assert got[key].shape == leaf.shape
    # Floats may come back in the type in which they are added up.
    assert got["w"].dtype in (jnp.bfloat16, jnp.float32)
    assert (got["b"].dtype, got["n"].dtype) == (jnp.float32, x["n"].dtype)


@pytest.mark.parametrize("name", [name for name in LINKS if name != "split"])  # which wants a parameter of that name
def test_counters_alone_travel_as_they_are(name):
    x = {"n": jnp.arange(3, dtype=jnp.int32), "none": jnp.zeros((0, 2))}
    got, size = wire.round_trip(LINKS[name], x)
    assert_same_bits(got, x)
    assert 12 <= int(size) <= 16  # some send a seed all the same


@pytest.mark.parametrize("name", SOME)
def test_over_clients_and_rounds_it_is_the_same(name):
    """vmap over clients inside scan over rounds, compiled, against each client by itself."""
    link, clients, rounds = LINKS[name], 3, 2
    own, server = states(name)
    keys = [[jax.random.key(10 * r + k) for k in range(clients)] for r in range(rounds)]
    xs = [[tree(10 * r + k) for k in range(clients)] for r in range(rounds)]

    def turn(x, own, server, key):
        ctx = context(key, link.sends(server))
        payload, own, size = link.encode(x, own, ctx)
        return payload, own, jnp.asarray(size, jnp.uint32)

    def round(own, inputs):
        payloads, own, sizes = jax.vmap(turn, (0, 0, None, 0))(inputs[0], own, server, inputs[1])
        return own, (payloads, sizes)

    stack = lambda trees: jax.tree.map(lambda *a: jnp.stack(a), *trees)
    every = stack([own] * clients)
    inputs = stack([stack(x) for x in xs]), stack([jnp.stack(k) for k in keys])
    _, (payloads, sizes) = jax.jit(lambda own, inputs: jax.lax.scan(round, own, inputs))(every, inputs)

    encode, undo = compiled(name)
    for k in range(clients):
        mine = own
        for r in range(rounds):
            expected, mine, size = encode(xs[r][k], mine, server, keys[r][k])
            payload = jax.tree.map(lambda a, r=r, k=k: a[r, k], payloads)
            assert int(size) == int(sizes[r][k])
            assert_close(undo(payload, server, keys[r][k]), undo(expected, server, keys[r][k]), atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("name", ["threshold", "golomb", "golomb of a bitmap", "elias omega", "elias delta"])
def test_a_damaged_payload_is_read_or_refused_in_words(name):
    link, x = LINKS[name], tree()
    payload = link.encode(x, (), wire.context(0))[0]
    data, rng = wire.serialize(payload), np.random.default_rng(0)
    for _ in range(60):
        torn = bytearray(data)
        for at in rng.integers(0, len(data), 3):
            torn[at] ^= 1 << rng.integers(8)
        said = ""
        try:
            wire.deserialize(bytes(torn), payload)
        except ValueError as error:
            said = str(error)
        assert not said or "is it another link's?" in said


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 20, 24, 31, 32])
def test_codes_pack_into_their_bits(bits):
    rng = np.random.default_rng(bits)
    for count in (1, 7, 8, 33):
        codes = rng.integers(0, 2**bits, count, dtype=np.uint32)
        packed = pack(jnp.asarray(codes), bits)
        assert packed.data.shape == (-(-count * bits // 8),)
        np.testing.assert_array_equal(unpack(packed.data, bits, count), codes)
        # The first code stands in the lowest bits: the bytes are one long number.
        number = sum(int(c) << (bits * i) for i, c in enumerate(codes))
        assert int.from_bytes(np.asarray(packed.data).tobytes(), "little") == number


def test_trits_pack_five_to_a_byte():
    digits = jnp.array([0, 1, 2, 2, 2, 1, 0])
    packed = pack_trits(digits)
    np.testing.assert_array_equal(packed.data, [0 + 1 * 3 + 2 * 9 + 2 * 27 + 2 * 81, 1])
    np.testing.assert_array_equal(packed.codes(), digits)
