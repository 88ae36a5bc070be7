"""Programs on a CPU are compiled by what they compute."""

import jax
import jax.numpy as jnp
import pytest

import fedjax_lab as fl
from fedjax_lab import xla_options
from tests.compiling import in_a_process

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="what is chosen is chosen for CPUs")


def program(function, *shapes):
    return jax.make_jaxpr(function)(*[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]).jaxpr


def test_the_largest_new_array_counts_and_not_what_is_read_or_written_in_place():
    def function(table, rows, batch):
        table = table.at[jnp.arange(2)].set(rows)
        return table, jnp.tanh(batch), table[jnp.arange(5)]

    assert xla_options.largest(program(function, (1000, 7), (2, 7), (6, 4))) == 5 * 7


def test_of_a_round_the_arrays_of_a_step_count():
    def function(rows, batch):
        step = lambda i, b: jax.jit(jnp.matmul)(b, b.T) @ b + 1
        return jnp.sum(jnp.square(rows)), jax.lax.fori_loop(0, 3, step, batch)

    assert xla_options.largest(program(function, (1000, 7), (6, 4))) == 6 * 6


def test_a_step_may_have_loops_of_its_own():
    def function(rows, batch):
        parts = lambda b: jax.lax.map(lambda row: row @ row.T, b.reshape(6, 1, 4))
        step = lambda i, b: jnp.tanh(b @ b.T) @ b + jnp.sum(parts(b))
        return jnp.sum(jnp.square(rows)), jax.lax.fori_loop(0, 3, step, batch)

    assert xla_options.largest(program(function, (1000, 7), (6, 4))) == 6 * 6


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
    found = xla_options.wanted(program(jnp.matmul, *shapes))
    assert (xla_options.UNCUT.items() <= found.items()) is small
    assert (xla_options.ONE_THREAD.items() <= found.items()) is tiny


def test_options_that_xla_does_not_know_are_left_out():
    unknown = {"xla_cpu_no_such_option": True}
    assert xla_options.known(tuple((xla_options.UNCUT | unknown).items())) == xla_options.UNCUT


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
