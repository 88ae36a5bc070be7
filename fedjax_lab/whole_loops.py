"""Loops of small training steps that a CPU runs as one kernel each.

XLA:CPU dispatches what a loop computes operation by operation: a step of logistic regression (W1) is some 25 kernels
that take microseconds together, of which the arithmetic is a fraction. A loop that moves few bytes a turn becomes one
kernel instead, but few is a kilobyte if XLA isn't told otherwise. It is told here, before it starts, in ``XLA_FLAGS``;
loops that call libraries, or need what such a kernel can't do (convolutions, scatters, sorting), stay as they are.

XLA takes a population's array for moved as a whole if a batch is gathered from it, so rows are read one by one. One
client at a time is then as fast as several: lanes are for dispatches that cost more than their work.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Var

from fedjax_lab.devices import runs_already
from fedjax_lab.program import Program, flops, flops_of, rewritten
from fedjax_lab.rewriting import programs_of

OPTION = "xla_cpu_small_while_loop_byte_threshold"
EXTRA = "--xla_backend_extra_options="
# Rows, columns and vectors of the pieces that a product in such a kernel is cut into, each written out in full. By
# itself XLA takes 11:9:1, half of W1's kernel, and a batch of 10 is less than a piece: of 10 x 60 x 10 the program
# took .26 s to compile, now .13, and .95 us to run, now .66 to .9; five others .78 to 1.04 of their time, 10 x 8 x 10
# .21 us instead of .16. The same bits.
PIECES = "xla_llvm_ir_gemm_tile_size=10:2:1*vectwidth"
# Bytes a turn, by XLA's count. Inside such a kernel nothing is cut up for threads, and what no library multiplies
# (integers, complex numbers) is slow: products of two matrices of 128 x 128 such numbers are above.
BYTES = 1 << 17
# What a step makes, by our count, which knows less of fusion than XLA: 17,000 of W1's, where XLA counts below 32,768.
MOST_MADE = BYTES // 2
# Operations of a step's products; larger ones are faster in a library. Rounds of 20 clients on two cores took .4 to .96
# of the time with up to 36,000 (regressions and perceptrons, batches of 10 to 20), and .8 to 2.4 from 38,000 on.
MOST_WORK = 3.7e4
# Bytes of what is made only to be summed up, as a kernel's gradient is (``products.py``): from 48,000 on a step took up
# to 1.4 of the time.
MOST_SUMMED = 4e4
# Products of matrices that such a kernel has good code for. With 10 rows and columns, .7 us for sums of 128 terms and
# 6.8 for 129; of 64 x 64 results 87 us, of 32 x 64 1.3.
LONGEST, NARROWEST = 128, 32
# No library: a loop that calls one isn't made one kernel.
NO_LIBRARY = {"xla_cpu_experimental_ynn_fusion_type": ""}
LOOPS = ("while", "scan")
# Starts of names; what isn't here and can't be in such a kernel either costs the dispatches that it would cost anyway.
LEFT_ALONE = (
    "conv_",
    "scatter",
    "sort",
    "top_k",
    "approx_top_k",
    "fft",
    "pure_callback",
    "io_callback",
    "debug_",
    "psum",
)
VIEWS = ("broadcast_in_dim", "reshape", "transpose", "iota", "squeeze", "slice", "convert_element_type")
FEW_BYTES = 1 << 12  # of an array that may be gathered from as it is


def ask() -> None:
    """Tell XLA, unless it runs already, or the environment tells it something of the kind itself."""
    flags = os.environ.get("XLA_FLAGS", "")
    if EXTRA not in flags and not runs_already():
        os.environ["XLA_FLAGS"] = f"{flags} {EXTRA}{OPTION}={BYTES},{PIECES}".strip()


ask()


@functools.cache
def there_are() -> bool:
    """Whether this XLA makes one kernel of a loop with a product in it: one is compiled and looked at."""
    if jax.default_backend() != "cpu":
        return False

    def loop(n, x):
        return lax.fori_loop(0, n, lambda i, x: lax.dot(x, x), x)

    shapes = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((32, 32), jnp.float32)
    try:
        compiled = jax.jit(loop, compiler_options={**NO_LIBRARY}).lower(*shapes).compile()
    except Exception:  # an option that it doesn't know
        return False
    return "xla_cpu_small_call" in (compiled.as_text() or "")


def suit(program: Jaxpr) -> bool:
    """Whether it has loops of products that are all best as one kernel each, where :func:`there_are` such."""
    loops = list(_loops_of_products(program))
    return bool(loops) and all(map(_is_small, loops)) and there_are()


def row_by_row(turn: Program) -> Program:
    """A client's turn that reads the rows of a batch one after the other."""
    return rewritten(turn, {"gather": _rows})


def _loops_of_products(program: Jaxpr) -> Iterator[Jaxpr]:
    """The bodies of the innermost loops that multiply matrices."""
    for eqn in program.eqns:
        for sub in programs_of(eqn):
            inner = list(_loops_of_products(sub))
            yield from inner
            if eqn.primitive.name in LOOPS and not inner and flops(sub):
                yield sub


def _is_small(body: Jaxpr) -> bool:
    programs = list(_programs(body))
    eqns = [eqn for program in programs for eqn in program.eqns]
    made = [_made(program) for program in programs]
    return (
        sum(map(flops_of, eqns)) <= MOST_WORK
        and sum(map(_bytes, [array for kept, _ in made for array in kept])) <= MOST_MADE
        and max(map(_bytes, [array for _, summed in made for array in summed]), default=0) <= MOST_SUMMED
        and all(map(_can_be_inside, eqns))
    )


def _programs(body: Jaxpr) -> Iterator[Jaxpr]:
    """A program and all that are inside of it."""
    yield body
    for eqn in body.eqns:
        for sub in programs_of(eqn):
            yield from _programs(sub)


def _made(program: Jaxpr) -> tuple[list[Any], list[Any]]:
    """The arrays that its own equations make, and those that they make only to sum them up, which no memory holds."""
    is_sum = lambda eqn: eqn.primitive.name.startswith("reduce")
    own = [eqn for eqn in program.eqns if is_sum(eqn) or not any(programs_of(eqn))]
    read = {v for eqn in program.eqns if not is_sum(eqn) for v in _variables(eqn.invars)}
    read.update(_variables(program.outvars))
    made = [v for eqn in own if eqn.primitive.name not in VIEWS for v in eqn.outvars]
    return [v.aval for v in made if v in read], [v.aval for v in made if v not in read]


def _variables(atoms: Sequence[Any]) -> list[Var]:
    return [v for v in atoms if isinstance(v, Var)]


def _can_be_inside(eqn: JaxprEqn) -> bool:
    name = eqn.primitive.name
    if name != "dot_general":
        return not name.startswith(LEFT_ALONE)
    lhs, rhs = [cast(Any, v.aval) for v in eqn.invars]
    (contracted, _), (batched, _) = eqn.params["dimension_numbers"]
    inner = math.prod(lhs.shape[i] for i in contracted)
    rows, columns = math.prod(lhs.shape) // max(inner, 1), math.prod(rhs.shape) // max(inner, 1)
    return not batched and max(inner, rows, columns) <= LONGEST and min(rows, columns) <= NARROWEST


def _bytes(array: Any) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def _rows(eqn: JaxprEqn) -> Callable | None:
    """For ``array[rows]`` of a large array and known places, a loop of slices; None for other gathers."""
    array, places = [cast(Any, v.aval) for v in eqn.invars]
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    ours = (
        dims.collapsed_slice_dims == dims.start_index_map == (0,)
        and not dims.operand_batching_dims
        and dims.offset_dims == tuple(range(1, array.ndim))
        and places.ndim == 2
        and tuple(sizes) == (1, *array.shape[1:])
        and eqn.params["mode"] in (lax.GatherScatterMode.PROMISE_IN_BOUNDS, lax.GatherScatterMode.CLIP)
        and _bytes(array) > FEW_BYTES
    )
    if not ours:
        return None

    def rows(array, places):
        row = functools.partial(lax.dynamic_index_in_dim, array, keepdims=False, allow_negative_indices=False)
        return lax.scan(lambda _, place: (None, row(place[0])), None, places)[1]

    return rows
