"""Too little memory is said beforehand, with an estimate that can be checked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_lab as fl
from fedjax_lab import memory
from tests.promises.resuming import walk

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


def test_what_is_on_the_device_already_is_not_needed_again():
    """The memory that is free was counted without it: a second process over the same data would be refused."""
    on_host = {"x": np.zeros(250_000, np.float32)}
    on_device = jax.tree.map(jnp.asarray, on_host)
    with pytest.raises(memory.TooLittleMemory, match=r"1\.0 MB examples"):
        memory.require(on_host, (), (), 10, 1, shared=True, most=10**6 - 1)
    memory.require(on_device, (), (), 10, 1, shared=True, most=10**6 - 1)
    assert jax.eval_shape(lambda x: jnp.float32(memory.size(x)), on_device["x"]).shape == ()  # traced: as its shape


GROUPS = {
    "second version": ("0::/job/step\n", "", ("memory.max", "memory.current", "inactive_file")),
    "first version": (
        "5:cpu,cpuacct:/other\n4:memory:/job/step\n0::/\n",
        "memory",
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ),
}


@pytest.mark.parametrize("version", GROUPS)
def test_limits_of_containers_and_batch_jobs_count(version, tmp_path):
    """A job of 8 GB on a machine of 500 GB; its step has none of its own, or one that is wider or narrower."""
    membership, folder, (limit, used, files) = GROUPS[version]
    member, root = tmp_path / "membership", tmp_path / "groups"
    member.write_text(membership)

    def group(path, most, taken):
        there = root / folder / path
        there.mkdir(parents=True, exist_ok=True)
        for name, value in ((limit, most), (used, taken), ("memory.stat", f"anon 5\n{files} 1000")):
            (there / name).write_text(f"{value}\n")

    assert memory._allowed(root, member) == []  # nothing can be read: nothing is known
    group("job", 8 * 10**9, 10**9)
    group("job/step", "max", 5 * 10**8)
    assert memory._allowed(root, member) == [7 * 10**9 + 1000]
    group("job/step", 2 * 10**9, 5 * 10**9)
    assert min(memory._allowed(root, member)) == 0
    assert memory._allowed(root, tmp_path / "nowhere") == []


def test_a_container_that_sees_only_its_own_group(tmp_path):
    member = tmp_path / "membership"
    member.write_text("0::/docker/0123\n")
    for name, value in (("memory.max", 10**9), ("memory.current", 10**8), ("memory.stat", "inactive_file 0")):
        (tmp_path / name).write_text(f"{value}\n")
    assert memory._allowed(tmp_path, member) == [9 * 10**8]


def test_a_sweep_keeps_every_cell_of_its_states(monkeypatch):
    """Ten cells of 40 kB each; and a sweep says so before any cell is begun."""
    state = {"table": SHAPE((100, 100), jnp.float32)}
    memory.require_cells(10, state, most=400_000)
    memory.require_cells(10, state, 4, most=100_000)
    with pytest.raises(memory.TooLittleMemory, match=r"0\.4 MB of memory and there are 0\.4 MB: 10 cells"):
        memory.require_cells(10, state, most=399_999)
    monkeypatch.setattr(memory, "available", lambda: 2_000)
    with pytest.raises(memory.TooLittleMemory, match=r"this sweep needs at least .* 20 cells"):
        fl.sweep(walk, 2, range(10), rate=[0.1, 0.2])


def test_this_machine_says_what_it_has():
    told = memory.available()
    assert told is None or told > 10**8
