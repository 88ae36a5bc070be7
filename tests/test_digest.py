"""A digest tells programs apart: each thing that compiling reads changes it by itself, and nothing else does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab import digest
from tests.compiling import in_a_process
from tests.problems import softmax_data, softmax_model

X = jax.ShapeDtypeStruct((4, 3), jnp.float32)


def of(function, *arguments, **options):
    return digest.of(jax.jit(function, **options).trace(*arguments).jaxpr)


def scanned(scale):
    return lambda x: jax.lax.scan(lambda c, row: (c + scale * row, c), jnp.zeros(3), x)


def branched(scale):
    return lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x, lambda x: scale * x, x)


def repeated(turns):
    return lambda x: jax.lax.fori_loop(0, turns, lambda i, x: jnp.sin(x), x)


def ruled(scale):
    function = jax.custom_jvp(lambda x: scale * x)
    function.defjvp(lambda primals, tangents: (function(*primals), tangents[0]))
    return function


def closing_over(last):
    held = np.arange(12, dtype=np.float32).reshape(4, 3)
    held[-1, -1] = last
    return lambda x: x + jnp.asarray(held)


PAIRS = {
    "a literal": (lambda x: x * 2.0, lambda x: x * 2.0000002),
    "a literal's sign of zero": (lambda x: x * 0.0, lambda x: x * -0.0),
    "a type": (lambda x: x.astype(jnp.float16), lambda x: x.astype(jnp.bfloat16)),
    "the last closed-over number": (closing_over(1.0), closing_over(1.0000001)),
    "the operation": (jnp.sin, jnp.cos),
    "the order of operands": (lambda x: x[0] - x[1], lambda x: x[1] - x[0]),
    "the order of results": (lambda x: (x[0], x[1]), lambda x: (x[1], x[0])),
    "which value is used": (lambda x: jnp.sin(x) + jnp.cos(x) * 0, lambda x: jnp.cos(x) + jnp.sin(x) * 0),
    "an axis": (lambda x: jnp.sum(x @ x.T, 0), lambda x: jnp.sum(x @ x.T, 1)),
    "a product's precision": (lambda x: x @ x.T, lambda x: jnp.matmul(x, x.T, precision="highest")),
    "a weak type": (lambda x: 2.0, lambda x: np.float32(2.0)),
    "in a scan": (scanned(2.0), scanned(3.0)),
    "in a branch": (branched(2.0), branched(3.0)),
    "in a function with a rule": (ruled(2.0), ruled(3.0)),
    "in a call": (lambda x: jax.jit(lambda x: 2 * x)(x), lambda x: jax.jit(lambda x: 3 * x)(x)),
    "a loop's turns": (repeated(3), repeated(4)),
    "a key's kind": (
        lambda x: jax.random.normal(jax.random.key(0, impl="rbg")),
        lambda x: jax.random.normal(jax.random.key(0, impl="unsafe_rbg")),
    ),
    "a key": (lambda x: jax.random.normal(jax.random.key(0)), lambda x: jax.random.normal(jax.random.key(1))),
    "its name": (lambda x: jax.jit(jnp.sin)(x), lambda x: jnp.sin(x)),
}


@pytest.mark.parametrize("what", PAIRS)
def test_each_part_of_a_program_counts(what):
    one, other = (of(function, X) for function in PAIRS[what])
    assert None not in (one, other)
    assert one != other


@pytest.mark.parametrize("what", ["a literal", "in a scan", "in a function with a rule", "a key"])
def test_a_program_traced_again_has_the_same(what):
    for function in PAIRS[what]:
        anew = lambda x, function=function: function(x)
        assert of(function, X) == of(anew, X)


def test_arguments_count_by_their_types_and_not_by_their_numbers():
    function = lambda x: 2 * x
    assert of(function, jnp.ones((4, 3))) == of(function, jnp.zeros((4, 3))) == of(function, X)
    assert len({of(function, X), of(function, jnp.ones((3, 4))), of(function, jnp.ones((4, 3), jnp.int32))}) == 3


@pytest.mark.parametrize(
    "setting",
    [lambda: jax.default_matmul_precision("highest"), lambda: jax.threefry_partitionable(False), jax.enable_x64],
)
def test_settings_count_where_they_hold(setting):
    function = lambda x: x @ x.T
    traced = jax.jit(function).trace(X)
    plain = digest.of(traced.jaxpr)
    with setting():
        assert digest.of(traced.jaxpr) != plain
    assert digest.of(traced.jaxpr) == plain


def test_what_is_given_besides_counts():
    traced = jax.jit(jnp.sin).trace(X)
    given = [(), ({"a": 1},), ({"a": True},), ({"a": 1.0},), ({"a": 1}, None), ([1, 2],), ((1, 2),), ("1, 2",)]
    assert len({digest.of(traced.jaxpr, *besides) for besides in given}) == len(given)


def _own():
    own = Primitive("own")
    own.def_abstract_eval(lambda x: x)
    mlir.register_lowering(own, lambda ctx, x: [x])
    return own.bind


UNKNOWN = {
    "a call of Python": lambda x: jax.pure_callback(lambda x: x, X, x),
    "in a loop": lambda x: jax.lax.map(lambda row: jax.pure_callback(lambda x: x, row, row), x),
    "another's primitive": _own(),
    "a foreign function": lambda x: jax.ffi.ffi_call("no_such_target", X)(x),
    "numbers beyond the most": lambda x: x[0, 0] + jnp.asarray(np.zeros(digest.MOST_BYTES // 4 + 1, np.float32)),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_the_equations_do_not_tell_has_no_digest(what):
    assert of(UNKNOWN[what], X) is None


def test_a_function_besides_has_no_digest():
    assert digest.of(jax.jit(jnp.sin).trace(X).jaxpr, lambda: 0) is None
    assert digest.of(jax.jit(jnp.sin).trace(X).jaxpr, jax.random.key_data) is not None


SCRIPT = """
import jax, optax
import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab import digest
from tests.problems import softmax_data, softmax_model
process = fl.synchronous(fedavg(softmax_model(), optax.sgd(0.1)), softmax_data(), fl.uniform(4))
state = process.init(0)
print(digest.of(jax.jit(lambda s, d: process.step(s, d)).trace(state, process.data).jaxpr))
"""


def test_every_process_finds_the_same_and_flags_count(monkeypatch):
    one, other = in_a_process(SCRIPT), in_a_process(SCRIPT)
    assert one == other != "None\n"
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert in_a_process(SCRIPT) != one


ROUNDS = {
    "as it is": {},
    "another rate": {"client_optimizer": optax.sgd(0.10001)},
    "momentum": {"client_optimizer": optax.sgd(0.1, 0.9)},
    "another momentum": {"client_optimizer": optax.sgd(0.1, 0.8)},
    "two epochs": {"epochs": 2},
    "steps": {"epochs": None, "steps": 3},
    "smaller batches": {"batch_size": 4},
    "uniform weights": {"weighting": "uniform"},
    "weights": {"weighting": np.arange(1.0, 9.0)},
    "other weights": {"weighting": np.arange(1.0, 9.0)[::-1]},
    "a sampler of five": {"sampler": fl.uniform(5)},
    "fixed clients": {"sampler": fl.fixed([0, 1, 2, 3])},
    "other clients": {"sampler": fl.fixed([0, 1, 2, 4])},
    "two lanes": {"lanes": 2},
}


def _round_of(changes):
    data, changes = softmax_data(), {"epochs": 1, "batch_size": 5, "client_optimizer": optax.sgd(0.1)} | changes
    sampler, lanes = changes.pop("sampler", fl.uniform(4)), changes.pop("lanes", 1)
    if isinstance(weights := changes.get("weighting"), np.ndarray):
        changes["weighting"] = np.resize(weights, data.num_clients)
    process = fl.synchronous(fedavg(softmax_model(), **changes), data, sampler, lanes)
    state = jax.eval_shape(process.init, jax.random.key(0))
    return jax.jit(lambda state, data: process.step(state, data)).trace(state, process.data)


def test_rounds_have_one_digest_if_and_only_if_they_lower_to_one_text():
    def seen():
        return [(digest.of(traced.jaxpr), traced.lower().as_text()) for traced in map(_round_of, ROUNDS.values())]

    ones, again = seen(), seen()
    assert ones == again
    assert len({text for _, text in ones}) == len({found for found, _ in ones}) == len(ROUNDS)


def test_two_meshes_of_other_devices_are_two_programs():
    script = """
    import jax, numpy as np
    import fedjax_lab as fl
    fl.devices.use_cores(2)
    from fedjax_lab import digest
    from jax.sharding import Mesh, PartitionSpec as P
    def of(devices):
        mesh = Mesh(np.array(devices), "clients")
        f = jax.shard_map(lambda x: jax.lax.psum(x, "clients"), mesh=mesh, in_specs=P("clients"), out_specs=P())
        return digest.of(jax.jit(f).trace(jax.numpy.ones(4)).jaxpr)
    a, b = jax.devices()
    print(len({of([a, b]), of([b, a]), of([a]), of([b])}), of([a, b]) == of([a, b]))
    """
    assert in_a_process(script).split() == ["4", "True"]
