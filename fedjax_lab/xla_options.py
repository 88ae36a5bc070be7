"""XLA's options for a program on a CPU, by what it computes.

XLA cuts kernels up for threads, and leaves matrix products to libraries that do so themselves. That pays off for large
arrays. A small model's step is some twenty kernels of a microsecond each, and XLA takes the one that reads a batch from
the population's array for large, as the array is: on two cores a round of logistic regression (W1) took 2.4 times as
long. Other backends compile everything as they do by themselves.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn
from jax.sharding import Mesh

from fedjax_lab import devices, whole_loops
from fedjax_lab.program import flops, flops_of
from fedjax_lab.rewriting import programs_of

Options = dict[str, Any]

# Operations of a step, and numbers in an array, up to which no kernel is worth cutting up. On one device of two cores
# a perceptron's step of .5 million operations took .75 of its time uncut, one of 5 million .93, one of 66 million 1.19.
SMALL, LARGEST = 1e7, 1 << 18
# Up to here the libraries' calls cost more than their arithmetic (W1: .024 million; .81 to .93 of its time without).
# Products of a perceptron with .5 million are faster in a library.
TINY = 2e5
UNCUT: Options = {"xla_disable_hlo_passes": "cpu-parallel-task-assigner"}
ONE_THREAD: Options = {"xla_cpu_multi_thread_eigen": False}  # in products and convolutions
# The newest library sums, and multiplies no matrices. (The older emitter of kernels, xla_cpu_use_fusion_emitters=False,
# compiled W1 in 1.0 s instead of 1.5; but with 10 lanes it took 1.4 of the time, and a perceptron 1.1 to 1.35.)
NO_CALLS: Options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
# LLVM spends long on random numbers at its third level: W2's, W3's and W4's programs that begin a run compiled in 1.1,
# 1.1 and 1.7 s at the second, instead of 2.5, 3.6 and 3.0, with the same parameters. Steps compile no faster there.
QUICKLY: Options = {"xla_backend_optimization_level": 2}
# Tables of clients' states are written where they are, a few rows at a time.
IN_PLACE = ("scatter", "dynamic_update_slice")
LOOPS = ("while", "scan")


def wanted(program: Jaxpr, mesh: Mesh | None = None) -> Options:
    """XLA's options for a program on a CPU's devices, whether or not this version has them all (:func:`known`).

    A mesh that holds all cores leaves no thread to cut anything up for. Helpers that a kernel asks for come too late
    (with a thread to spare, a sweep of W1 took half as long again), and can do harm, see ``devices._enough_threads``.
    """
    alone = devices.at_work(mesh) >= devices.cores() > 1
    small = is_small(program)
    tiny = small and flops(program) <= TINY
    calls = {} if not tiny else whole_loops.NO_LIBRARY if whole_loops.suit(program) else NO_CALLS
    return (UNCUT if small or alone else {}) | (ONE_THREAD if tiny or alone else {}) | calls


def is_small(program: Jaxpr) -> bool:
    """Is nothing that it computes worth cutting up for threads?"""
    return flops(program) <= SMALL and largest(program) <= LARGEST


def largest(program: Jaxpr) -> int:
    """Numbers in the largest floating-point array that an equation makes anew.

    Where products are in loops, only of these: what a step of training doesn't do is done seldom.
    """
    eqns = list(_unwrapped(program))
    bodies = [sub for eqn in eqns for sub in programs_of(eqn)]
    steps = [body for body in bodies if flops(body)]
    if steps and not any(map(flops_of, eqns)):
        return max(map(largest, steps))
    new = [eqn for eqn in eqns if not any(programs_of(eqn)) and not eqn.primitive.name.startswith(IN_PLACE)]
    made: list[Any] = [v.aval for eqn in new for v in eqn.outvars]
    own = [math.prod(array.shape) for array in made if jnp.issubdtype(array.dtype, jnp.floating)]
    return max([*own, *map(largest, bodies)], default=0)


def _unwrapped(program: Jaxpr) -> Iterator[JaxprEqn]:
    """Its equations and loops, those of the functions that it calls among them."""
    for eqn in program.eqns:
        if eqn.primitive.name in LOOPS or not any(programs_of(eqn)):
            yield eqn
        else:
            for called in programs_of(eqn):
                yield from _unwrapped(called)


@functools.lru_cache(maxsize=8)
def known(options: tuple[tuple[str, Any], ...]) -> Options:
    """Those of the options that this version of XLA has."""

    def takes(options: tuple) -> bool:
        try:
            jax.jit(lambda: 0, compiler_options=dict(options)).lower().compile()
        except Exception:  # a name or a value that it doesn't know
            return False
        return True

    return dict(options if takes(options) else [option for option in options if takes((option,))])
