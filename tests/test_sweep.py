"""sweep: one cell is its own run, in one program whatever the number of cells."""

import functools
import pathlib
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedadam import fedadam
from algorithms.fedavg import fedavg
from algorithms.fedprox import fedprox
from algorithms.scaffold import scaffold
from fedjax_lab.cell_program import trace
from fedjax_lab.grids import cells_of
from tests.laws.table import ALGORITHMS
from tests.problems import assert_close, assert_same_bits, softmax_data, softmax_model
from tests.promises.mesh_program import median
from tests.promises.resuming import walk

ROOT = pathlib.Path(__file__).resolve().parents[1]
EVALUATE = fl.global_metrics(softmax_data(seed=1))


def assert_same_run(cell: fl.Result, own: fl.Result) -> None:
    """Integers, bytes and names are equal, floats within 1e-6."""
    assert_close(cell.params, own.params)
    assert (cell.uplink_bytes, cell.downlink_bytes) == (own.uplink_bytes, own.downlink_bytes)
    assert (cell.rounds, cell.stopped) == (own.rounds, own.stopped)
    assert len(cell.metrics) == len(own.metrics)
    for ours, theirs in zip(cell.metrics, own.metrics, strict=True):
        assert set(ours) == set(theirs)
        assert {n: type(v) for n, v in ours.items()} == {n: type(v) for n, v in theirs.items()}
        assert {n: v for n, v in ours.items() if type(v) is int} == {n: v for n, v in theirs.items() if type(v) is int}
        floats = [n for n, v in theirs.items() if type(v) is float]
        np.testing.assert_allclose([ours[n] for n in floats], [theirs[n] for n in floats], rtol=1e-6, atol=1e-6)


# ---- the law: one cell of a sweep is its own run ----


def proximal(learning_rate, mu, fraction=0.3):
    algorithm = fedprox(softmax_model(), optax.sgd(learning_rate), mu=mu, epochs=2, batch_size=10)
    return fl.synchronous(algorithm, softmax_data(), fl.dropout(fl.uniform(4), fraction))


def test_a_cell_is_its_own_run_with_evaluation_and_dropout():
    result = fl.sweep(proximal, 5, [7, 0, 3], learning_rate=[0.1], mu=[0, 0.3], evaluate=EVALUATE, every=2)
    assert result.metrics["accuracy"].shape == (1, 2, 3, 4)
    assert result.points["accuracy"].tolist() == [0, 2, 4, 5]
    assert result.metrics["train_loss"].shape == (1, 2, 3, 5)
    assert result.params["w"].shape == (1, 2, 3, 4, 3)
    own = fl.run(proximal(0.1, 0.3), 5, seed=3, evaluate=EVALUATE, every=2)
    assert_same_run(result.cell(seed=3, mu=0.3), own)
    assert len({m["survivors"] for m in own.metrics[1:]}) > 1


def adaptive(learning_rate, tau, epochs):
    """Hyper-parameters that reach the state, integers, and clients that keep their own state."""
    algorithm = fedadam(
        softmax_model(),
        optax.sgd(learning_rate, momentum=0.9),
        server_learning_rate=0.05,
        tau=tau,
        epochs=epochs,
        batch_size=10,
        keep_optimizer_state=True,
    )
    return fl.synchronous(algorithm, softmax_data(), fl.uniform(4))


@pytest.mark.slow
def test_hyper_parameters_of_the_server_and_integers():
    result = fl.sweep(adaptive, 3, [0, 1], learning_rate=[0.1, 0.03], tau=[0.1, 0.01], epochs=[1, 3], every=3)
    values = {"learning_rate": 0.03, "tau": 0.01, "epochs": 3}
    cell, own = result.cell(seed=1, **values), fl.run(adaptive(**values), 3, seed=1, every=3)
    assert_same_run(cell, own)
    assert jax.tree.structure(cell.state) == jax.tree.structure(own.state)
    assert_close(cell.state.clients.table, own.state.clients.table)
    assert_same_bits(cell.state.clients.known, own.state.clients.known)
    assert_same_bits(cell.state.key, own.state.key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_over_seeds(name):
    process = fl.synchronous(ALGORITHMS[name].make(), softmax_data(), fl.uniform(4))
    result = fl.sweep(lambda: process, 3, [4, 5], every=2, batch=2)
    for seed in (4, 5):
        assert_same_run(result.cell(seed=seed), fl.run(process, 3, seed=seed, every=2))


@pytest.mark.parametrize("kind", ["client states", "all uploads at once"])
def test_cohorts_abreast_share_lanes_and_nothing_else(kind):
    """Ragged cohorts, some of whose clients are absent; every server, state and key is its own cell's."""
    algorithm = scaffold(softmax_model(), optax.sgd(0.1), epochs=2, batch_size=10)
    if kind != "client states":
        algorithm = fedavg(softmax_model(), optax.sgd(0.1), batch_size=10)._replace(aggregate=median())
    process = fl.synchronous(algorithm, softmax_data(), fl.dropout(fl.uniform(4), 0.3))
    own = [process.init(seed) for seed in (3, 4, 5)]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
    abreast = jax.jit(jax.vmap(lambda state: process.step.abreast(state, process.data)))
    for _ in range(3):
        states, metrics = abreast(states)
        own, logs = zip(*[process.step(state, process.data) for state in own], strict=True)
    for seed, (state, log) in enumerate(zip(own, logs, strict=True)):
        ours = jax.tree.map(lambda x, seed=seed: x[seed], (states.server, states.clients, metrics))
        assert_close(ours, (state.server, state.clients, log))


def test_cells_abreast_may_have_populations_of_their_own():
    populations = [softmax_data(seed=seed) for seed in (0, 1)]
    algorithm = fedavg(softmax_model(), optax.sgd(0.1), batch_size=10)
    processes = [fl.synchronous(algorithm, data, fl.uniform(4)) for data in populations]
    start = processes[0].init(3)
    leaves, shapes = zip(*[jax.tree.flatten(process.data) for process in processes], strict=True)
    both = jax.tree.unflatten(shapes[0], map(jnp.stack, zip(*leaves, strict=True)))  # ids are the first one's
    params = jax.vmap(lambda data: processes[0].step.abreast(start, data)[0].server.variables.params)(both)
    for i, process in enumerate(processes):
        mine = process.params(process.step(process.init(3), process.data)[0])
        assert_close(jax.tree.map(lambda x, i=i: x[i], params), mine)


own_walk = functools.cache(walk)  # whose runs then compile once for all tests


@pytest.mark.parametrize(("batch", "every"), [(None, 3), (1, 7), (2, 1), (4, 50)])
def test_every_cell_for_any_batch_and_logging_points(batch, every):
    result = fl.sweep(walk, 7, range(3), rate=[0.1, 0.5, 0.01], batch=batch, every=every)
    for rate in result.grids["rate"]:
        for seed in result.seeds:
            assert_same_run(result.cell(rate=rate, seed=seed), fl.run(own_walk(rate), 7, seed=seed, every=7))


def test_data_on_a_device_may_be_given_within_make_process():
    data = softmax_data().on_device()
    make = lambda rate: fl.synchronous(fedavg(softmax_model(), optax.sgd(rate / data.num_examples)), data)
    assert_close(fl.sweep(make, 2, [0], rate=[0.1]).params["w"][0, 0], fl.run(make(0.1), 2).params["w"])


def test_seeds_alone():
    process = walk()
    result = fl.sweep(lambda: process, 4, [2, 9], every=4)
    assert result.metrics["loss"].shape == (2, 4)
    assert_same_run(result.cell(seed=9), fl.run(process, 4, seed=9))
    assert_same_run(fl.sweep(lambda: process, 4, [9]).cell(), fl.run(process, 4, seed=9))


def test_parameters_to_start_from_and_no_rounds():
    start = jnp.array([1.0, 2.0, 3.0])
    result = fl.sweep(walk, 3, [0], params=start, rate=[0.1, 0.2])
    assert_same_run(result.cell(rate=0.2), fl.run(walk(0.2), 3, params=start))
    nothing = fl.sweep(walk, 0, [0, 1], params=start, rate=[0.1], evaluate=lambda p, s: {"first": s.w[0]})
    assert nothing.metrics["first"].shape == (1, 2, 1)
    np.testing.assert_array_equal(nothing.params, np.broadcast_to(start, (1, 2, 3)))
    assert nothing.uplink_bytes.tolist() == [[0, 0]]
    assert nothing.cell(seed=1).metrics == [{"round": 0, "first": 1.0}]


def test_bytes_are_exact_integers():
    result = fl.sweep(walk, 9, [0, 1], rate=[0.1], every=4)
    one = 40_000 * 65536 + 7
    assert result.metrics["uplink_bytes"].dtype == np.int64
    assert (result.metrics["uplink_bytes"] == one).all()
    assert result.uplink_bytes.tolist() == [[9 * one] * 2]
    assert type(result.cell(seed=0).uplink_bytes) is int


def test_a_state_that_holds_the_hyper_parameter_itself():
    """Its buffer is the argument's at first, and the state is donated."""

    def make(rate):
        base = walk(rate)

        def step(state, data):
            (inner, kept), metrics = state, {}
            inner, metrics = base.step(inner, data)
            return (inner, kept * 0.5), metrics | {"kept": kept}

        return base._replace(
            init=lambda key, params=None: (base.init(key, params), jnp.asarray(rate)),
            step=step, params=lambda s: s[0].w,
        )  # fmt: skip

    result = fl.sweep(make, 5, [0], rate=[0.5, 4.0], every=1)
    np.testing.assert_array_equal(
        result.metrics["kept"][:, 0], [[0.5 / 2**i for i in range(5)], [4 / 2**i for i in range(5)]]
    )
    assert_same_run(result.cell(rate=0.5), fl.run(make(0.5), 5))


def half_precision(rate):
    """A model in bfloat16, whose steps are the rate and which a float32 rate would make a float32 one."""
    base = walk()

    def step(state, data):
        return (state - rate * state), {"loss": jnp.sum(state)}

    return base._replace(init=lambda key, params=None: jnp.arange(4, dtype=jnp.bfloat16), step=step, params=lambda s: s)


def test_a_hyper_parameter_is_as_weakly_typed_as_a_number():
    """With rates and states of a few bits, since XLA may compute in more of them than bfloat16 has."""
    result = fl.sweep(half_precision, 3, [0], rate=[0.5, 0.25])
    assert result.params.dtype == jnp.bfloat16
    assert_same_bits(result.cell(rate=0.25).params, fl.run(half_precision(0.25), 3).params)


@pytest.mark.slow
def test_two_devices():
    """Five cells on two devices, with and without blocks; the results lie on one device."""
    script = """
    import jax
    jax.config.update("jax_num_cpu_devices", 2)
    import numpy as np
    import fedjax_lab as fl
    from tests.promises.resuming import walk

    evaluate = lambda p, s: {"first": s.w[0]}
    call = lambda **how: fl.sweep(walk, 5, range(5), rate=[0.1], every=2, evaluate=evaluate, **how)
    one = call(devices=1)
    for how in ({}, {"batch": 2}, {"batch": 3}, {"batch": 4, "devices": 2}):
        two = call(**how)
        assert len(two.params.devices()) == 1
        for name in one.metrics:
            np.testing.assert_allclose(two.metrics[name], one.metrics[name], rtol=1e-6)
        np.testing.assert_allclose(two.params, one.params, rtol=1e-6)
        np.testing.assert_array_equal(jax.random.key_data(two.state.key), jax.random.key_data(one.state.key))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- one program ----


def test_one_trace_for_any_number_of_cells():
    traces = []

    def make(rate):
        base = walk(rate)

        def step(state, data):
            traces.append(1)
            return base.step(state, data)

        return base._replace(step=step)

    for seeds, rounds in ((2, 2), (6, 5)):
        traces.clear()
        fl.sweep(make, rounds, range(seeds), rate=[0.1, 0.2], every=2)
        assert len(traces) == 1


def test_arrays_that_are_closed_over_are_arguments_and_not_constants():
    table = np.random.default_rng(0).normal(size=50_000).astype(np.float32)

    def make(rate):
        base = walk(rate)

        def step(state, data):
            state, metrics = base.step(state, data)
            return state, metrics | {"entry": jnp.asarray(table)[state.round]}

        return base._replace(step=step)

    cells = cells_of({"rate": [0.1, 0.2]}, [0])
    step = trace(make, cells, make(0.1), None).step
    assert table.shape in [const.shape for const in step.consts]
    state = jax.eval_shape(make(0.1).init, jax.random.key(0))
    text = jax.jit(step.call).lower(step.consts, (jnp.float32(0.1),), state, make(0.1).data).as_text()
    assert len(text) < table.size
    assert fl.sweep(make, 2, [0], rate=[0.1]).metrics["entry"].tolist() == [[[table[1].item(), table[2].item()]]]


class Halves:
    """An evaluation whose first half may run for many cells at once."""

    def __init__(self):
        self.traced, self.called = 0, 0

    def arrays(self, process, state):
        self.traced += 1
        return {"w": process.params(state), "rows": process.data.sizes}

    def numbers(self, found):
        self.called += 1
        assert isinstance(found["w"], np.ndarray)
        return {"length": float(np.sqrt((found["w"].astype(np.float64) ** 2).sum())), "rows": int(found["rows"].sum())}

    def __call__(self, process, state):
        return self.numbers(jax.device_get(self.arrays(process, state)))


@pytest.mark.parametrize("batch", [None, 2])
def test_an_evaluation_in_two_halves_is_traced_once(batch):
    evaluate = Halves()
    result = fl.sweep(walk, 3, [0, 1, 2], rate=[0.1, 0.5], evaluate=evaluate, every=2, batch=batch)
    assert (evaluate.traced, evaluate.called) == (1, 3 * 6)
    assert_same_run(result.cell(rate=0.5, seed=1), fl.run(own_walk(0.5), 3, seed=1, evaluate=Halves(), every=2))


# ---- the document ----


@pytest.mark.slow
def test_the_documents_examples_run(monkeypatch):
    """The code of docs/sweeps.md, with fewer clients, rounds and seeds."""
    pytest.importorskip("matplotlib")
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "sweeps.md").read_text(), re.DOTALL))
    for written, small, times in (
        ("num_clients=30", "num_clients=12", 1),
        ("num_rounds=100", "num_rounds=2", 2),
        ("every=10", "every=2", 1),
        ("seeds=range(5)", "seeds=range(4)", 2),
        ("epochs=5", "epochs=1", 2),
        ("learning_rate=[0.003, 0.01, 0.03]", "learning_rate=[0.01]", 1),
        ("mu=[0, 0.1, 1]", "mu=[0.1]", 1),
    ):
        assert code.count(written) == times, f"the example no longer says {written}: adapt this test"
        code = code.replace(written, small)
    scope = {}
    exec(compile(code, "docs/sweeps.md", "exec"), scope)
    assert scope["result"].metrics["accuracy"].shape == (1, 1, 4, 2)
    assert len(scope["figure"].axes[0].lines) == 2
