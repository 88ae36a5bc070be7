"""Programs on a CPU are compiled by what they compute."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab import compiling, sweep_runs
from tests.compiling import in_a_process
from tests.problems import assert_close, softmax_data, softmax_model

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="what is chosen is chosen for CPUs")


def program(function, *shapes):
    return jax.make_jaxpr(function)(*[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]).jaxpr


def test_the_largest_new_array_counts_and_not_what_is_read_or_written_in_place():
    def function(table, rows, batch):
        table = table.at[jnp.arange(2)].set(rows)
        return table, jnp.tanh(batch), table[jnp.arange(5)]

    assert compiling.largest(program(function, (1000, 7), (2, 7), (6, 4))) == 5 * 7


def test_of_a_round_the_arrays_of_a_step_count():
    def function(rows, batch):
        step = lambda i, b: jax.jit(jnp.matmul)(b, b.T) @ b + 1
        return jnp.sum(jnp.square(rows)), jax.lax.fori_loop(0, 3, step, batch)

    assert compiling.largest(program(function, (1000, 7), (6, 4))) == 6 * 6


def test_a_step_may_have_loops_of_its_own():
    def function(rows, batch):
        parts = lambda b: jax.lax.map(lambda row: row @ row.T, b.reshape(6, 1, 4))
        step = lambda i, b: jnp.tanh(b @ b.T) @ b + jnp.sum(parts(b))
        return jnp.sum(jnp.square(rows)), jax.lax.fori_loop(0, 3, step, batch)

    assert compiling.largest(program(function, (1000, 7), (6, 4))) == 6 * 6


@pytest.mark.parametrize(
    ("shapes", "small", "tiny"),
    [
        (((10, 60), (60, 10)), True, True),
        (((10, 60), (60, 400)), True, False),  # .48 million operations
        (((256, 256), (256, 256)), False, False),  # 34 million
        (((1, 2), (2, 1 << 19)), False, False),  # few, but of large arrays
    ],
)
def test_small_and_tiny_products(shapes, small, tiny):
    found = compiling.chosen(program(jnp.matmul, *shapes)) or {}
    assert (compiling.UNCUT.items() <= found.items()) is small
    assert (compiling.ONE_THREAD.items() <= found.items()) is tiny


def test_options_that_xla_does_not_know_are_left_out():
    unknown = {"xla_cpu_no_such_option": True}
    assert compiling._known(tuple((compiling.UNCUT | unknown).items())) == compiling.UNCUT


def test_a_small_models_round_is_not_cut_up_where_a_cpu_is_one_device():
    """As XLA compiles it by itself, the kernels that read a batch from the population's rows are cut up."""
    script = """
    import jax, optax, numpy as np
    import fedjax_lab as fl
    from algorithms.fedavg import fedavg
    from experiments.benchmarks.populations import synthetic
    data = synthetic(np.full(30, 3000))
    process = fl.synchronous(fedavg(fl.models.logistic_regression(10), optax.sgd(0.1)), data, fl.uniform(4))
    state = process.init(0)
    for step in (jax.jit(lambda *given: process.step(*given)), process.step):
        print('outer_dimension_partitions":["' in step.lower(state, process.data).compile().as_text())
    """
    cut, ours = in_a_process(script).split()
    assert ours == "False"
    assert cut == str(fl.devices.cores() > 1)


@pytest.mark.parametrize("jit", [compiling.jit, compiling.once])
def test_a_function_is_traced_once_and_computes_what_jax_does(jit):
    traced = []

    def function(x):
        traced.append(None)
        return jnp.sin(x) @ x.T

    x = jax.random.normal(jax.random.key(0), (5, 3))
    ours = jit(function)
    assert_close(ours(x), jax.jit(lambda x: jnp.sin(x) @ x.T)(x))
    ours(x + 1)
    assert_close(jax.grad(lambda x: jnp.sum(ours(x)))(x), jax.grad(lambda x: jnp.sum(jnp.sin(x) @ x.T))(x))
    assert len(traced) == 1


@pytest.mark.parametrize("jit", [compiling.jit, compiling.once])
@pytest.mark.parametrize("called", [False, True])
def test_a_function_may_be_part_of_another_program_even_if_its_arguments_are_not(jit, called):
    ours, x, computed = jit(lambda x: jnp.sin(x) @ x.T), np.ones((3, 3), np.float32), []
    if called:
        computed.append(ours(x))
    assert jax.eval_shape(lambda: ours(x)).shape == (3, 3)
    assert "sin" in str(jax.make_jaxpr(lambda: ours(x))())  # traced, rather than computed at once
    assert_close(jax.jit(lambda: ours(x))(), jnp.sin(x) @ x.T)
    assert_close(jax.vmap(lambda y: y * ours(x)[0, 0])(x[0]), (jnp.sin(x) @ x.T)[0, 0] * x[0])
    assert_close(jax.grad(lambda y: y * ours(x)[0, 0])(1.0), (jnp.sin(x) @ x.T)[0, 0])


def test_a_step_may_be_traced_with_a_state_that_is_there():
    process = fl.synchronous(fedavg(softmax_model(), optax.sgd(0.1)), softmax_data(), fl.uniform(4))
    state = process.init(0)
    new, metrics = jax.eval_shape(lambda: process.step(state, process.data))
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state) and "loss" in metrics


@pytest.mark.parametrize("batch", [None, 2])
def test_cells_that_several_threads_send_off_are_their_own_runs(monkeypatch, batch):
    """Five cells on one device: three at once or as many as ``batch`` says; the last block is filled up."""
    monkeypatch.setattr(sweep_runs, "cores", lambda: 3)
    sent = []
    executor = sweep_runs.ThreadPoolExecutor
    monkeypatch.setattr(sweep_runs, "ThreadPoolExecutor", lambda *args: sent.append(args) or executor(*args))
    process = fl.synchronous(fedavg(softmax_model(), optax.sgd(0.1), batch_size=10), softmax_data(), fl.uniform(4))
    result = fl.sweep(lambda: process, 4, range(5), every=3, devices=1, batch=batch, progress=False)
    assert len(sent) == (batch or 3)
    for seed in range(5):
        own = fl.run(process, 4, seed=seed, progress=False)
        cell = result.cell(seed=seed)
        assert_close(cell.params, own.params)
        np.testing.assert_allclose([m["loss"] for m in cell.metrics], [m["loss"] for m in own.metrics], rtol=1e-6)
