"""Too little memory is said beforehand, with an estimate that can be checked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lab import memory

SHAPE = jax.ShapeDtypeStruct


def test_the_estimate_by_hand():
    """1 MB of examples, 1,000 clients with 4 kB each, a server of 8 kB, cohorts of 10."""
    data, clients = SHAPE((250_000,), jnp.float32), SHAPE((1000, 1000), jnp.float32)
    server = SHAPE((2000,), jnp.float32)
    rows, each, states = 1_000_000, 2 * 8_000 + 2 * 40_000, 4_000_000
    cases = (1, True, rows + each + states), (4, True, rows + 4 * each + states), (4, False, rows + each + 10**6)
    for count, shared, needed in cases:
        memory.require(data, clients, server, 10, count, shared=shared, most=needed)
        with pytest.raises(memory.TooLittleMemory, match=f"{needed / 1e6:.1f} MB of memory"):
            memory.require(data, clients, server, 10, count, shared=shared, most=needed - 1)


def test_the_message_names_the_largest_part_and_a_way_out():
    with pytest.raises(memory.TooLittleMemory, match=r"4000\.0 GB client states.*FederatedData\.open"):
        memory.require((), SHAPE((10**9, 1000), jnp.float32), (), 10, 1, shared=True, most=16 * 10**9)


def test_keys_and_mapped_files(tmp_path):
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 5))
    assert memory.size(keys) == 40
    np.save(tmp_path / "x.npy", np.zeros(1000))
    assert memory.size(np.load(tmp_path / "x.npy", mmap_mode="r")) == 0


def test_this_machine_says_what_it_has():
    assert memory.available() is None or memory.available() > 10**8
