"""Loops of small steps are one kernel each on a CPU, and compute what they would otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedjax_lab import program, whole_loops
from tests.compiling import in_a_process

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="such kernels are a CPU's")


def _loop(body, *shapes, dtype=jnp.float32):
    """The program of a loop of ``body(carry, *rest) -> carry``."""
    loop = lambda n, carry, *rest: lax.fori_loop(0, n, lambda i, carry: body(carry, *rest), carry)
    given = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.make_jaxpr(loop)(jax.ShapeDtypeStruct((), jnp.int32), *given).jaxpr


def _times(weights, batch):
    return weights - 0.1 * batch.T @ (batch @ weights)


@pytest.fixture
def there_are_such_kernels(monkeypatch):
    monkeypatch.setattr(whole_loops, "there_are", lambda: True)


@pytest.mark.usefixtures("there_are_such_kernels")
@pytest.mark.parametrize(
    ("body", "shapes", "suits"),
    [
        (_times, [(60, 10), (10, 60)], True),
        (lambda w, x: jax.jit(_times)(w, x), [(60, 10), (10, 60)], True),
        (_times, [(129, 3), (2, 129)], False),  # sums of more terms than such a kernel has good code for
        (_times, [(60, 40), (40, 60)], False),  # 384,000 operations
        (lambda w, x: w + jnp.sum(jnp.einsum("bij,bjk->bik", x, x)), [(2, 2), (3, 4, 4)], False),  # a batch of products
        (lambda w, x: _times(w, x).at[x[0].astype(int)].add(1), [(60, 10), (10, 60)], False),
        (lambda w, x: jnp.sort(_times(w, x)), [(60, 10), (10, 60)], False),
        (lambda w, x: w + jnp.sum(x), [(60, 10), (10, 60)], False),  # no product: nothing to gain is known
        (lambda w, x: _times(w, x) + jnp.sum(jnp.outer(x, x)), [(60, 10), (10, 60)], False),  # .4 million numbers
    ],
)
def test_which_loops_suit(body, shapes, suits):
    assert whole_loops.suit(_loop(body, *shapes)) is suits


@pytest.mark.usefixtures("there_are_such_kernels")
def test_all_innermost_loops_must_suit():
    def within(n, weights, batch):
        inner = lambda w: lax.fori_loop(0, n, lambda i, w: _times(w, batch), w)
        return lax.fori_loop(0, n, lambda i, w: inner(w), weights)

    def beside(n, weights, batch):
        large = jnp.tile(batch, (10, 10))
        return within(n, weights, batch), lax.fori_loop(0, n, lambda i, x: x @ large.T @ x, large)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((60, 10), (10, 60))]
    number = jax.ShapeDtypeStruct((), jnp.int32)
    assert whole_loops.suit(jax.make_jaxpr(within)(number, *shapes).jaxpr)
    assert not whole_loops.suit(jax.make_jaxpr(beside)(number, *shapes).jaxpr)


def test_rows_one_by_one_are_the_same_rows():
    rng = np.random.default_rng(0)
    table = {
        "x": rng.normal(size=(500, 3, 4)).astype(np.float32),
        "y": rng.integers(0, 9, 2000).astype(np.int32),
        "few": rng.normal(size=(7, 2)).astype(np.float32),
    }

    def read(table, places):
        few = jnp.minimum(places, 6)
        return {name: rows[few if name == "few" else places] for name, rows in table.items()}

    def square(table, places):
        return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(read(table, places)) if x.dtype == jnp.float32)

    places = jnp.array([0, 499, 3, 3, 250, 1], jnp.int32)
    for function in (read, jax.grad(square, allow_int=True)):
        traced = program.trace(function, table, places)
        one_by_one = whole_loops.row_by_row(traced)
        compare = lambda a, b: np.testing.assert_array_equal(a, b)
        jax.tree.map(compare, one_by_one.call(table, places), traced.call(table, places))
        if function is read:
            assert [e.primitive.name for e in one_by_one.jaxpr.eqns].count("gather") == 1  # of the few


def test_other_gathers_are_left():
    """Places of more than one axis, columns, and places outside that are filled."""

    def read(x, places):
        return x[places[:, None]], x[:, places], x.at[places].get(mode="fill", fill_value=7.0), x[places, places]

    x, places = jnp.arange(5000.0).reshape(50, 100), jnp.array([3, 60, 4], jnp.int32)
    traced = program.trace(read, x, places)
    assert whole_loops.row_by_row(traced).jaxpr.eqns == traced.jaxpr.eqns


W1 = """
import os
import jax, optax, numpy as np
import fedjax_lab as fl
from algorithms.fedavg import fedavg
from experiments.benchmarks.populations import synthetic
data = synthetic(np.arange(20, 50))
process = fl.synchronous(fedavg(fl.models.logistic_regression(10), optax.sgd(0.1)), data, fl.uniform(8), {given})
state = process.init(0)
text = process.step.lower(state, process.data).compile().as_text()
whole = [line for line in text.splitlines() if 'xla_cpu_small_call="true"' in line and 'f32[60,10]' in line]
for _ in range(3):
    state, _ = process.step(state, process.data)
norm = sum(float(abs(leaf).sum()) for leaf in jax.tree.leaves(process.params(state)))
print(bool(whole), norm)
"""


def test_a_small_models_training_is_one_kernel_and_computes_the_same():
    """By default; not where the user gave lanes, whose steps are larger, or told XLA something else."""
    otherwise = "import os; os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + "
    flag = f"' {whole_loops.EXTRA}{whole_loops.OPTION}=1000'"
    scripts = [
        W1.format(given=""),
        W1.format(given="lanes=8"),
        otherwise + flag + W1.format(given=""),
    ]
    found = [in_a_process(script).split() for script in scripts]
    assert [whole for whole, _ in found] == ["True", "False", "False"]
    np.testing.assert_allclose([float(norm) for _, norm in found], float(found[0][1]), rtol=1e-5)


def test_products_in_other_pieces_train_to_the_same_norm():
    without = f"import os; os.environ['XLA_FLAGS'] = '{whole_loops.EXTRA}{whole_loops.OPTION}={whole_loops.BYTES}'"
    own, of_xla = (in_a_process(start + W1.format(given="")).split() for start in ("", without))
    assert own == of_xla
    assert own[0] == "True"


def test_the_environment_is_asked_once_and_only_before_jax_runs():
    script = """
    import os
    os.environ["XLA_FLAGS"] = "--xla_cpu_enable_fast_math=false"
    {before}
    import fedjax_lab
    from fedjax_lab import whole_loops
    whole_loops.ask()
    print(os.environ["XLA_FLAGS"].count(whole_loops.OPTION), whole_loops.there_are())
    """
    assert in_a_process(script.format(before="")).split() == ["1", "True"]
    assert in_a_process(script.format(before="import jax; jax.devices()")).split() == ["0", "False"]
