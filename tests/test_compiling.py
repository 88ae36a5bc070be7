"""Functions compiled when they are first called: as JAX does it, but once, and as a part of others too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab import compiling, sweep_runs
from tests.problems import assert_close, softmax_data, softmax_model

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="what is chosen is chosen for CPUs")


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


def test_a_first_process_may_be_built_in_the_midst_of_a_trace():
    """As when the first thing that a script does is jax.jit of a function that builds and runs one."""
    compiling._outermost.cache_clear()
    data = softmax_data()

    @jax.jit
    def objective(rate):
        process = fl.synchronous(fedavg(softmax_model(), optax.sgd(rate)), data, fl.uniform(4))
        return process.step(process.init(0), data)[1]["loss"]

    built = objective(0.1)
    process = fl.synchronous(fedavg(softmax_model(), optax.sgd(0.1)), data, fl.uniform(4))
    assert not compiling._inside_another()
    assert_close(built, process.step(process.init(0), data)[1]["loss"])


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
