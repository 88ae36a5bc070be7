"""Promise 5: the number of devices doesn't change results."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab import states
from tests.compiling import environment, in_a_process
from tests.problems import assert_close, softmax_data, softmax_model
from tests.refusals import refused

DATA = softmax_data()


@pytest.fixture(scope="module")
def results():
    """``{(case, devices): differences}`` from a process with eight CPU devices."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.promises.mesh_program", "100"],
        capture_output=True, text=True, env=environment(8), check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(row["case"], row["devices"]): row for row in rows}


@pytest.mark.parametrize("case", ["fedavg", "client_state", "large_state", "server_state", "median"])
def test_devices_agree(results, case):
    """Cohorts of 7 or 8 of 9 clients, one of them empty: 9 is a multiple of no number of devices."""
    mine = {devices: row for (name, devices), row in results.items() if name == case}
    assert mine, f"{case} did not run"
    for devices, row in mine.items():
        assert row["1"] < 1e-6 and row["100"] < 1e-5, (devices, row)
        assert row["same_bytes"], devices
        assert row["accuracy"] < 1e-6, devices
    assert {devices for name, devices in results if name == "fedavg"} == {2, 4, 8}


WIDE = """
    import jax, numpy as np, optax
    import fedjax_lab as fl
    from algorithms.fedavg import fedavg
    fl.devices.use_cores(2)
    rng = np.random.default_rng(0)
    arrays = {"x": rng.random((120, 10, 10, 1), np.float32), "y": rng.integers(0, 5, 120).astype(np.int32)}
    data = fl.FederatedData.from_assignment(arrays, np.repeat(np.arange(3), 40))
    round = fedavg(fl.models.emnist_cnn(5, dropout=(0, 0)), optax.sgd(0.1), epochs=5, batch_size=20)
    ends = []
    for mesh in (None, fl.devices.mesh(2)):
        process = fl.synchronous(round, data, mesh=mesh)
        assert mesh is not None or "_both_gradients" in str(jax.make_jaxpr(process.step)(process.init(0), process.data))
        ends.append(process.step(process.init(0), process.data)[0].server)
    print(max(float(abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, ends))))
"""


def test_devices_agree_on_wide_convolutions_which_one_alone_has_more_threads_for():
    assert float(in_a_process(WIDE)) < 1e-6


@pytest.mark.parametrize("case", ["slopes", "large_slopes"])
def test_gradients_go_through_rounds_over_devices(results, case):
    one, reverse, forward = results[case, 4]["slopes"]
    np.testing.assert_allclose([reverse, forward], one, rtol=1e-5)


def test_a_second_axis_may_share_the_model_out(results):
    assert results["model_axis", 4]["apart"] < 1e-6


def test_a_cpus_devices_read_one_copy_of_the_data(results):
    assert results["placed", 8]["copies"] == 2  # and the caller's own


@pytest.mark.parametrize("width", [3, states.LARGE_ROW // 4], ids=["gathered", "copied one by one"])
@pytest.mark.parametrize("keep", [None, np.array([True, False, True, True])], ids=["all", "some"])
def test_rows_of_a_table(width, keep):
    table = np.random.default_rng(0).normal(size=(6, width)).astype(np.float32)
    table[2] = np.nan  # a row that isn't kept is zero whatever it holds
    index = np.array([5, 2, 0, 5])
    expected = table[index] if keep is None else np.where(keep[:, None], table[index], 0)
    np.testing.assert_array_equal(jax.jit(states.rows)(table, index, keep), expected)


@pytest.mark.parametrize("devices", [3, states.MOST_DEVICES + 1])
def test_sums_over_devices_keep_every_bit_of_integers(devices):
    """int32 sums wrap as NumPy's do, uint32 and truth values come back as they were; floats add up."""
    rng = np.random.default_rng(0)
    ints = rng.integers(-(2**31), 2**31, (devices, 7)).astype(np.int32)
    only_one = np.zeros((devices, 2), np.uint32)
    only_one[1] = (2**32 - 1, 2**31 + 5)
    flags = np.arange(devices)[:, None] == 2
    floats = rng.normal(size=(devices, 5)).astype(np.float32)
    summed = jax.vmap(lambda tree: states.exchange(tree, "d"), axis_name="d")((ints, only_one, flags, floats))
    first = jax.tree.map(lambda x: np.asarray(x[0]), summed)
    assert (first[0] == ints.astype(np.int64).sum(0).astype(np.int32)).all()
    assert first[1].dtype == np.uint32 and (first[1] == only_one[1]).all()
    assert first[2].dtype == bool and first[2].all()
    np.testing.assert_allclose(first[3], floats.sum(0), rtol=1e-5, atol=1e-5)


def test_large_leaves_travel_by_themselves_and_add_up():
    """Whatever the message before them held: a large one waits for it, and is not changed by it."""
    rng = np.random.default_rng(0)
    small = np.full((3, 2), np.nan, np.float32)
    large = [rng.normal(size=(3, states.LARGE_MESSAGE // 4 + i)).astype(np.float32) for i in range(2)]
    large[0][:, 0] = 0, np.inf, 0
    summed = jax.vmap(lambda tree: states.exchange(tree, "d"), axis_name="d")((small, *large))
    assert np.isnan(summed[0]).all()
    for ours, theirs in zip(summed[1:], large, strict=True):
        np.testing.assert_allclose(np.asarray(ours[0]), theirs.sum(0), rtol=1e-5, atol=1e-5)


def test_a_mesh_of_one_is_a_device():
    algorithm = fedavg(softmax_model(), optax.sgd(0.1))
    plain, alone = (fl.synchronous(algorithm, DATA, lanes=4, mesh=m) for m in (None, fl.devices.mesh(1)))
    a, b = (p.params(p.step(p.init(0), p.data)[0]) for p in (plain, alone))
    assert_close(a, b)


def test_bad_meshes_are_refused():
    algorithm = fedavg(softmax_model(), optax.sgd(0.1))
    other = Mesh(np.array(jax.devices()[:1]), ("model",))
    refused(lambda: fl.synchronous(algorithm, DATA, mesh=other), "model", '"clients"')
    refused(lambda: fl.synchronous(algorithm, DATA, mesh=2), "jax.sharding.Mesh", "2")
    refused(lambda: fl.devices.mesh(64), "64", "use_cores(64)")
    refused(lambda: fl.devices.use_cores(3), "before anything else of JAX", error=RuntimeError)


def test_lanes_may_be_an_arrays_number():
    algorithm = fedavg(softmax_model(), optax.sgd(0.1))
    a, b = (fl.synchronous(algorithm, DATA, lanes=n) for n in (4, jax.numpy.int32(4)))
    assert_close(a.params(a.step(a.init(0), a.data)[0]), b.params(b.step(b.init(0), b.data)[0]))


def test_what_a_cohort_cannot_fill_is_refused():
    algorithm = fedavg(softmax_model(), optax.sgd(0.1))
    refused(lambda: fl.synchronous(algorithm, DATA, fl.uniform(4), lanes=5), "lanes=5", "4 clients", "lanes=4")


@pytest.mark.parametrize("cores", [2, 8])
def test_a_thread_stays_free_beside_the_devices_own(cores):
    """Without one, queues of threads fill up and XLA's convolutions go wrong (fedjax_lab/devices.py)."""
    script = f"""
    import os, warnings
    import fedjax_lab as fl
    fl.devices.use_cores({cores})
    warnings.simplefilter("error")
    fl.devices.checked(fl.devices.mesh({cores}))
    print(os.environ["PJRT_NPROC"])
    """
    assert int(in_a_process(script)) > cores


def test_devices_that_hold_all_cores_cut_no_kernel_up():
    script = """
    import fedjax_lab as fl
    cores = fl.devices.use_cores()
    import jax, jax.numpy as jnp
    from fedjax_lab import compiling
    loop = lambda x: jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x) * x, x)
    for mesh in (None, fl.devices.mesh()):
        program = compiling.jit(loop, mesh).lower(jnp.ones((2000, 2000))).compile()
        print(cores, 'outer_dimension_partitions":["' in program.as_text())
    """
    cores, usual, _, over_devices = in_a_process(script).split()
    assert (usual, over_devices) == (str(int(cores) > 1), "False")


def test_a_rounds_program_is_traced_once_over_devices():
    """When the process is built, and not again when its first and second round run."""
    script = """
    import jax, optax
    import fedjax_lab as fl
    from algorithms.fedavg import fedavg
    from tests.problems import softmax_data, softmax_model
    fl.devices.use_cores(2)
    round, traced = fedavg(softmax_model(), optax.sgd(0.1)), []
    update = round.client_update
    counted = lambda *given, **more: traced.append(None) or update(*given, **more)
    round = round._replace(client_update=counted)
    process = fl.synchronous(round, softmax_data(), fl.uniform(4), mesh=fl.devices.mesh())
    built, state = len(traced), process.init(0)
    for _ in range(2):
        state, _ = process.step(state, process.data)
    print(built, len(traced))
    """
    assert in_a_process(script).split() == ["1", "1"]


def test_devices_that_hold_all_threads_are_warned_of():
    script = """
    import os, warnings
    import jax
    jax.config.update("jax_num_cpu_devices", os.cpu_count() + 1)
    jax.devices()
    import fedjax_lab as fl
    warnings.simplefilter("error")
    for used in (1, os.cpu_count()):
        fl.devices.checked(fl.devices.mesh(used))
    try:
        fl.devices.checked(fl.devices.mesh())
    except RuntimeWarning as warning:
        print(warning)
    """
    count = os.cpu_count() + 1
    said = in_a_process(script)
    for words in (f"{count} CPU devices", f"use_cores({count})", "PJRT_NPROC"):
        assert words in said
