"""Checkpoints: what goes in comes out bit for bit, and what is not ours is refused by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lab import checkpoint
from fedjax_lab.state_leaves import own_copy, state_digest
from tests.problems import assert_same_bits


def odd_state():
    """Every kind of leaf that a state may have, with bits that comparisons by value don't see."""
    nan_payloads = np.array([0x7FC00001, 0xFFC12345, 0x7F800000, 0x80000000], np.uint32).view(np.float32)
    return {
        "nan": jnp.asarray(nan_payloads),
        "minus zero": jnp.full((3, 2), -0.0),
        "bfloat16": jnp.arange(3, dtype=jnp.bfloat16),
        "float16": jnp.array([1.5, -0.0], jnp.float16),
        "int4": jnp.array([-8, 7], jnp.int4),
        "flags": jnp.array([True, False]),
        "counter": jnp.uint32(2**32 - 1),
        "empty": jnp.zeros((0, 5), jnp.int32),
        "nested": (jnp.int32(-3), [jnp.zeros(4)], ()),
        "a/b.c d": jnp.int8(1),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(7, impl="rbg"), 3),
    }


def bits(state):
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()
        for x in jax.tree.leaves(state)
    ]


def test_round_trip_keeps_every_bit(tmp_path):
    state = odd_state()
    checkpoint.save(tmp_path, 3, state, {"note": [1, None, "x"]})
    restored = checkpoint.restore_newest(tmp_path, own_copy(state))
    assert (restored.round, restored.extra) == (3, {"note": [1, None, "x"]})
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state), strict=True):
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
    assert bits(restored.state) == bits(state)
    assert state_digest(restored.state) == state_digest(state)


def test_a_state_without_a_single_number(tmp_path):
    state = {"nothing": jnp.zeros((0, 2))}
    checkpoint.save(tmp_path, 1, state, {})
    assert_same_bits(checkpoint.restore_newest(tmp_path, state).state, state)
    assert checkpoint.restore_newest(tmp_path / "elsewhere", state) is None


def test_digest_tells_states_apart():
    state = {"w": jnp.zeros(2), "k": jnp.zeros(2)}
    others = [
        {"w": jnp.zeros(2), "k": jnp.array([0.0, -0.0])},
        {"w": jnp.zeros(2), "l": jnp.zeros(2)},
        {"w": jnp.zeros(2), "k": jnp.zeros(2, jnp.int32)},
        {"w": jnp.zeros(2), "k": jnp.zeros((1, 2))},
        {"w": jnp.zeros(4), "k": jnp.zeros(0)},
    ]
    digests = {state_digest(s) for s in [state, *others]}
    assert len(digests) == 6


def test_the_newest_stay_and_leftovers_go(tmp_path):
    state = {"w": jnp.arange(3.0)}
    (tmp_path / ".draft-00000009/state").mkdir(parents=True)  # a process killed while it wrote
    (tmp_path / ".old-00000001").mkdir()  # and one killed while it removed
    for round in (2, 4, 9, 11):
        checkpoint.save(tmp_path, round, state, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000009", "00000011"]
    checkpoint.save(tmp_path, 11, {"w": jnp.arange(3.0) + 1}, {}, keep=2)  # over the one that is there
    assert checkpoint.restore_newest(tmp_path, state).state["w"].tolist() == [1, 2, 3]


def test_a_record_of_other_bytes_is_named_in_a_line(tmp_path):
    path = checkpoint.save(tmp_path, 2, {"w": jnp.zeros(2)}, {"much": "x" * 10_000}) / "record.json"
    path.write_bytes(path.read_bytes().replace(b"xx", b"x\xff", 1))
    with pytest.raises(ValueError, match=r"no checkpoint .* is intact .*record.json can't be read") as caught:
        checkpoint.restore_newest(tmp_path, {"w": jnp.zeros(2)})
    assert len(str(caught.value)) < 1000


W, B = jnp.zeros((5, 3)), jnp.zeros(3)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"w": jnp.zeros((5, 4)), "b": B}, r"its leaf w is float32\[5, 3\], this process's is float32\[5, 4\]"),
        ({"w": W.astype(jnp.float16), "b": B}, r"w is float32\[5, 3\], this process's is float16\[5, 3\]"),
        ({"w": W}, r"its leaf b \(float32\[3\]\) does not exist in this process's state"),
        ({"w": W, "b": B, "c": jnp.int32(0)}, r"this process's leaf c \(int32\[\]\) is not in it"),
        ({"w": W, "b": jax.random.key(0)}, r"b is float32\[3\], this process's is threefry2x32 key"),
    ],
)
def test_other_code_is_named(other, message, tmp_path):
    path = checkpoint.save(tmp_path, 40, {"w": W, "b": B}, {})
    with pytest.raises(ValueError, match=f"checkpoint {path} is from other code: .*{message}"):
        checkpoint.restore_newest(tmp_path, other)


def test_another_format_is_named(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"w": jnp.zeros(2)}, {})
    record = json.loads((path / "record.json").read_text())["record"] | {"format": 2}
    checkpoint.write_json(path / "record.json", {"sha256": checkpoint._sha256(record), "record": record})
    with pytest.raises(ValueError, match="has format 2, this version of fedjax_lab reads 1"):
        checkpoint.restore_newest(tmp_path, {"w": jnp.zeros(2)})


def test_own_copy_shares_no_memory():
    shared = jnp.arange(3.0)
    copy = own_copy((shared, shared, np.arange(2), 3, jax.random.key(0)))
    places = [x.unsafe_buffer_pointer() for x in (shared, *copy[:4])]
    assert len(set(places)) == 5
    assert not any(x.weak_type for x in copy[:4])
    assert copy[1].tolist() == [0, 1, 2] and copy[3] == 3


def test_json_is_replaced_at_once(tmp_path):
    path = tmp_path / "a.json"
    checkpoint.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
