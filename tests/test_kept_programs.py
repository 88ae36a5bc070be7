"""Compiled programs are kept between processes, are the same ones, and do no harm when they are not whole."""

import json

import jax
import pytest

from fedjax_lab import kept_programs
from tests.compiling import in_a_process

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="programs are kept for CPUs")

COUNTING = """
import hashlib, json, pathlib, sys, warnings
import jax, jax.numpy as jnp, numpy as np, optax
import fedjax_lab as fl
from fedjax_lab import compiling, kept_programs
compiled, read = [], []
def count(event, seconds, fun_name=None, **_):
    lists = {"/jax/core/compile/backend_compile_duration": compiled, kept_programs.READ: read}
    if event in lists and fun_name in ("jit(start)", "jit(step)", "jit(many)", "jit(params)", "jit(function)"):
        lists[event].append(fun_name)
jax.monitoring.register_event_duration_secs_listener(count)
"""
ROUNDS = """
    fl.devices.use_cores(2)
    from algorithms.scaffold import scaffold
    from fedjax_lab.state_leaves import state_digest
    from tests.problems import softmax_data, softmax_model
    round = scaffold(softmax_model(), client_optimizer=optax.sgd(0.1), epochs=1, batch_size=5)
    digests = []
    for mesh in (None, fl.devices.mesh(2)):
        process = fl.synchronous(round, softmax_data(), fl.uniform(4), mesh=mesh)
        state = process.init(0)
        for _ in range(3):
            state, _ = process.step(state, process.data)
        digests.append(state_digest(state))
        digests.append(state_digest(fl.run(process, 3, seed=1, progress=False).state))
    print(json.dumps([digests, sorted(compiled), sorted(read)]))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where JAX's cache is in processes to come; all that is compiled is kept."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    return tmp_path / "fedjax_lab"


def said(script: str):
    lines = [line.removeprefix("    ") for line in script.splitlines()]
    return json.loads(in_a_process(COUNTING + "\n".join(lines)).splitlines()[-1])


def test_a_second_process_compiles_none_of_the_programs_and_computes_the_same_bits(folder):
    programs = sorted(2 * ["jit(start)", "jit(step)", "jit(many)"])
    first, compiled, read = said(ROUNDS)
    assert (compiled, read) == (programs, [])
    assert len([file for file in folder.iterdir() if not file.suffix]) == len(programs)
    again, compiled, read = said(ROUNDS)
    assert (compiled, read) == ([], programs)
    assert again == first


SWEEPS = """
    fl.devices.use_cores(2)
    from algorithms.fedavg import fedavg
    from fedjax_lab.state_leaves import state_digest
    from tests.problems import softmax_data, softmax_model
    make = lambda rate: fl.synchronous(fedavg(softmax_model(), optax.sgd(rate)), softmax_data(), fl.uniform(4))
    found = [fl.sweep(make, 3, range(3), rate=[0.1, 0.2], devices=n, progress=False) for n in (1, 2)]
    print(json.dumps([[state_digest(s.state) for s in found], sorted(compiled), sorted(read)]))
"""


def test_the_programs_of_a_sweep_are_kept_as_well(folder):
    programs = sorted(2 * ["jit(start)", "jit(many)", "jit(params)"])
    first, compiled, read = said(SWEEPS)
    assert (compiled, read) == (programs, [])
    again, compiled, read = said(SWEEPS)
    assert (compiled, read) == ([], programs)
    assert again == first


def test_nothing_is_kept_unless_the_user_keeps_programs(monkeypatch):
    config = jax.config
    for name, value in [
        ("jax_compilation_cache_dir", None),
        ("jax_compilation_cache_dir", "gs://a-bucket/programs"),
        ("jax_enable_compilation_cache", False),
        ("jax_compilation_cache_max_size", 10_000),
        ("jax_debug_nans", True),
        ("jax_disable_jit", True),
    ]:
        before = config.values[name]
        try:
            config.update(name, value)
            assert kept_programs.folder() is None, name
        finally:
            config.update(name, before)


FORESEEN = """
    fl.devices.use_cores(2)
    def started(x):
        return jnp.sin(x)
    def stepped(x):
        return jnp.cos(x)
    def elsewhere(x):
        return jnp.tan(x)

    reads, whole = [], kept_programs._read
    kept_programs._read = lambda name, *a: reads.append(name.split("-")[0]) or whole(name, *a)
    x, mesh = jnp.arange(4.0), fl.devices.mesh(2)
    begun = compiling.jit(started)(x)
    kept_programs.THREADS.submit(lambda: None).result()
    first = list(reads)
    out = [float(f(x)[1]) for f in (compiling.jit(stepped), compiling.jit(elsewhere, mesh), compiling.jit(stepped))]
    kept_programs.THREADS.shutdown()
    print(json.dumps([first, sorted(reads), out]))
"""


def test_what_was_used_next_is_read_ahead_unless_it_was_on_other_devices(folder):
    first, reads, out = said(FORESEEN)
    assert (first, reads) == (["started"], ["elsewhere", "started", "stepped", "stepped"])
    assert out == pytest.approx([0.5403023, 1.5574077, 0.5403023])
    (following,) = folder.glob("*.next")
    assert following.name.startswith("started-") and following.read_text().startswith("stepped-")
    first, reads, again = said(FORESEEN)
    assert sorted(first) == ["started", "stepped"]  # once: the first call takes what was read
    assert (reads, again) == (["elsewhere", "started", "stepped", "stepped"], out)
    following.write_text("../../anything")
    first, reads, again = said(FORESEEN)
    assert (first, again) == (["started"], out)


QUICK = """
    out = []
    for seconds, least in ((1.0, 0.0), (1.0, 60.0), (0.0, 60.0)):
        def function(x):
            return jnp.sin(x) + seconds
        kept_programs.LEAST = least
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
        there = lambda: {file for file in kept_programs.folder().glob("function-*") if not file.suffix}
        before = there()
        compiling.jit(function)(jnp.ones(3))
        kept_programs.THREADS.shutdown()
        kept_programs.THREADS = type(kept_programs.THREADS)(2)
        out.append(len(there() - before))
    print(json.dumps(out))
"""


UNKNOWN = """
    from fedjax_lab import xla_options
    xla_options.wanted = lambda program, mesh=None: {"xla_cpu_no_such_option": True}
    outs = [compiling.jit(lambda x: x + 1)(jnp.ones(3)) for _ in range(2)]
    print(json.dumps(np.asarray(outs).tolist()))
"""


def test_options_that_this_xla_does_not_have_are_left_out(folder):
    assert said(UNKNOWN) == [[2.0] * 3] * 2


def test_what_compiles_in_no_time_is_not_kept_unless_jax_keeps_it(folder):
    assert said(QUICK) == [1, 0, 1]


DAMAGE = """
    x = jnp.arange(6.0).reshape(2, 3)

    def made():
        for file in kept_programs.folder().parent.glob("*-cache"):
            file.unlink()  # JAX's own, of which nothing could be kept again
        def function(x):
            return jnp.sin(x) @ x.T
        out = compiling.jit(function)(x)
        kept_programs.THREADS.shutdown()
        kept_programs.THREADS = type(kept_programs.THREADS)(2)
        return np.asarray(out).tolist()

    whole, out = made(), []
    (file,) = kept_programs.folder().iterdir()
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    other = b"not a program"
    form = hashlib.sha256(content[kept_programs.SEAL:]).digest() + content[kept_programs.SEAL:]  # of another form
    for damaged in (b"", content[:20], content[:-1], bytes(flipped), form, kept_programs._seal(other) + other):
        file.write_bytes(damaged)
        compiled.clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            same = made() == whole
        out.append([same, list(compiled), file.read_bytes() != damaged, len(told)])
    compiled.clear()
    out.append([made() == whole, list(compiled), True, 0])
    print(json.dumps(out))
"""


def test_a_program_that_is_not_whole_is_compiled_again_and_replaced(folder):
    *damaged, whole = said(DAMAGE)
    assert whole == [True, [], True, 0]
    *torn, foreign = damaged
    assert torn == 5 * [[True, ["jit(function)"], True, 0]]
    assert foreign == [True, ["jit(function)"], True, 1]  # sealed, but no program: told


OTHERS = """
    def function(state, x):
        return state + jnp.sum(x), x

    for _ in range(2):
        ours = compiling.jit(function, donate_argnums=0)
        state = jnp.zeros(())
        after, _ = ours(state, jnp.ones(3))
        donated = state.is_deleted()
        others = [float(ours(jnp.zeros(()), x)[0]) for x in (jnp.ones(5), jnp.ones(3), jnp.ones(4, int))]
        inside = float(jax.grad(lambda x: ours(jnp.zeros(()), x)[0])(jnp.ones(3))[1])
    try:
        ours(jnp.zeros(()), "text")
        wrong = None
    except TypeError as error:
        wrong = "text" in str(error) or "str" in str(error)
    print(json.dumps([float(after), donated, others, inside, wrong, read]))
"""


def test_a_program_that_was_read_takes_over_its_state_and_lets_others_through(folder):
    assert said(OTHERS) == [3.0, True, [5.0, 3.0, 4.0], 1.0, True, ["jit(function)"]]
    assert said(OTHERS) == [3.0, True, [5.0, 3.0, 4.0], 1.0, True, 2 * ["jit(function)"]]


PLACES = """
    fl.devices.use_cores(2)
    def function(x):
        return 2 * x

    x, (one, other) = jnp.arange(3.0), jax.devices()
    out = []
    for given in (x, jax.device_put(x, one), jax.device_put(x, other), np.asarray(x)):
        for _ in range(2):
            ours = compiling.jit(function)
            compiling.ahead(ours, jax.ShapeDtypeStruct((3,), jnp.float32))
            result = ours(given)
            out.append([np.asarray(result).tolist(), [device.id for device in result.devices()]])
    print(json.dumps(out))
"""


def test_what_lies_on_another_device_is_computed_there(folder):
    expected = [[[0.0, 2.0, 4.0], [device]] for device in (0, 0, 0, 0, 1, 1, 0, 0)]
    assert said(PLACES) == expected
    assert said(PLACES) == expected


def test_a_folder_that_cannot_be_written_is_told_and_does_no_harm(folder):
    folder.write_text("a file where the folder should be")
    script = """
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        def function(x):
            return 2 * x
        out = float(compiling.jit(function)(jnp.ones(())))
        kept_programs.THREADS.shutdown()
    print(json.dumps([out, ["can't keep" in str(one.message) for one in told]]))
    """
    assert said(script) == [2.0, [True]]
    assert folder.read_text() == "a file where the folder should be"


BROKEN = """
    def made():
        def function(state, x):
            return state + jnp.sum(x)
        ours = compiling.jit(function, donate_argnums=0)
        out = [float(ours(jnp.zeros(()), jnp.ones(3))) for _ in range(2)]
        kept_programs.THREADS.shutdown()
        kept_programs.THREADS = type(kept_programs.THREADS)(2)
        return out

    def broken(*_):
        def runs(*_):
            raise jax.errors.JaxRuntimeError("NOT_FOUND: Function iota not found")
        return runs

    out = made()
    for file in kept_programs.folder().parent.glob("*-cache"):
        file.unlink()
    whole, kept_programs._read = kept_programs._read, broken
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        out += made()
    kept_programs._read = whole
    compiled.clear(), read.clear()
    out += made()
    print(json.dumps([out, ["doesn't run" in str(one.message) for one in told], compiled, read]))
"""


def test_a_program_that_does_not_run_is_made_again_and_replaced(folder):
    assert said(BROKEN) == [6 * [3.0], [True], [], ["jit(function)"]]


THREADED = """
    from concurrent.futures import ThreadPoolExecutor
    def function(x):
        return jnp.sort(jnp.sin(x) @ x.T, 0)

    x = jnp.arange(12.0).reshape(4, 3)
    with ThreadPoolExecutor(8) as pool:
        ours = compiling.jit(function)
        same = list(pool.map(lambda _: float(jnp.sum(ours(x))), range(8)))
        others = [compiling.jit(function) for _ in range(8)]
        same += list(pool.map(lambda ours: float(jnp.sum(ours(x))), others))
    kept_programs.THREADS.submit(lambda: None).result()
    again = float(jnp.sum(compiling.jit(function)(x)))
    print(json.dumps([len(set([*same, again])), compiled.count("jit(function)") >= 1, len(read) >= 1]))
"""


def test_threads_that_begin_at_once_keep_a_program_that_runs(folder):
    assert said(THREADED) == [1, True, True]
    assert said(THREADED) == [1, False, True]
