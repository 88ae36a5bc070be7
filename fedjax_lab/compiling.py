"""How a program is compiled on a CPU, by what it computes.

XLA cuts kernels up for threads, and leaves matrix products to libraries that do so themselves. That pays off for large
arrays. A small model's step is some twenty kernels of a microsecond each, and XLA takes the one that reads a batch from
the population's array for large, as the array is: on two cores a round of logistic regression (W1) took 2.4 times as
long. Other backends compile everything as they do by themselves.
"""

import functools
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, get_opaque_trace_state
from jax.sharding import Mesh
from jax.stages import Compiled, Traced

from fedjax_lab import devices, kept_programs
from fedjax_lab.program import flops, flops_of
from fedjax_lab.rewriting import programs_of

PyTree = Any
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


def jit(function: Callable, mesh: Mesh | None = None, **options: Any) -> Callable:
    """``jax.jit`` of a function, compiled as its first arguments say is fast; inside of other programs ``jax.jit``.

    Over a mesh of CPU devices a program waits until the last one has ended: devices share threads, and stand still
    when those of two programs are all held up in exchanges.

    Args:
      function: of pytrees.
      mesh: devices that its work is shared out over.
      **options: of ``jax.jit``.
    """
    if jax.default_backend() != "cpu":
        return jax.jit(function, **options)
    made = _Made(function, mesh, lambda program: _wanted(program, mesh), options)

    @functools.wraps(function)
    def call(*arguments):
        if _inside_another():
            return made.plain(*arguments)
        if mesh is None:
            return made(*arguments)
        if _under_way and not _under_way[0].is_deleted():
            jax.block_until_ready(_under_way[0])
        out = made(*arguments)
        _under_way[:] = [min(jax.tree.leaves(out), key=lambda leaf: leaf.size)]
        return out

    return _with_stages(call, made)


def once(function: Callable, mesh: Mesh | None = None, **options: Any) -> Callable:
    """``jax.jit`` of a function that runs once, as one that begins a run: compiled for less time than others.

    Args:
      function: of pytrees.
      mesh: devices that hold what it gives.
      **options: of ``jax.jit``.
    """
    if jax.default_backend() != "cpu":
        return jax.jit(function, **options)
    made = _Made(function, mesh, lambda program: QUICKLY, options)

    @functools.wraps(function)
    def call(*arguments):
        return (made.plain if _inside_another() else made)(*arguments)

    return _with_stages(call, made)


def ahead(function: Callable, *arguments: PyTree) -> PyTree:
    """The shapes of what a function gives; one of :func:`jit` and :func:`once` is looked for on disk from here on.

    Args:
      function: of pytrees.
      *arguments: what it will be called with, or their shapes.
    """
    begin = None if _inside_another() else getattr(function, "ahead", None)
    return begin(*arguments) if begin else jax.eval_shape(function, *arguments)


def _with_stages(call: Any, made: "_Made") -> Callable:
    call.lower = lambda *arguments: made.jitted(*arguments).lower(*arguments)
    call.ahead = made.ahead
    return call


class _Made:
    """A function compiled when it is first called, or read from disk, where programs are kept."""

    def __init__(self, function: Callable, mesh: Mesh | None, wanted: Callable[[Jaxpr], Options], options: Options):
        self.function, self.options, self.wanted, self.mesh = function, options, wanted, mesh
        self.plain = jax.jit(function, **options)
        self.fitted: Callable | None = None  # with XLA's options, for arguments of any shape
        self.compiled: Compiled | None = None  # for those of the first call
        self.unproven: str | None = None  # the name of the latter, where it was read and has not run yet
        self.begun: dict[str, Future[Compiled | None]] = {}
        self.named: tuple[Any, str | None] = (None, None)
        self.lock = threading.Lock()

    def __call__(self, *arguments):
        if self.fitted is None and self.compiled is None:
            with self.lock:
                if self.compiled is None:
                    self.compiled = self._ready(arguments)
        if self.compiled is not None:
            try:
                return self._run(arguments)
            except (TypeError, ValueError):  # others than the first ones
                pass
        return self.jitted(*arguments)(*arguments)

    def jitted(self, *arguments) -> Callable:
        if self.fitted is None:
            found = _known(tuple(self.wanted(self.plain.trace(*arguments).jaxpr.jaxpr).items()))
            self.fitted = jax.jit(self.function, compiler_options=found, **self.options) if found else self.plain
        return self.fitted

    def ahead(self, *arguments) -> PyTree:
        traced, name = self._traced(arguments)
        if name is not None and name not in self.begun:
            self.begun[name] = kept_programs.fetch(name, traced, arguments, self.devices())
        return traced.out_info

    def devices(self) -> list[Any]:
        if self.mesh is not None:
            return list(self.mesh.devices.flat)
        config: Any = jax.config
        chosen = config.jax_default_device
        return [jax.local_devices(backend=chosen)[0] if chosen is None or isinstance(chosen, str) else chosen]

    def _ready(self, arguments: tuple) -> Compiled | None:
        traced, name = self._traced(arguments)
        if name is None:
            return None
        self.ahead(*arguments)
        found = kept_programs.waited_for(self.begun.pop(name), traced)
        self.unproven = name if found else None
        return found or self._compiled(name, traced)

    def _compiled(self, name: str, traced: Traced) -> Compiled:
        known = _known(tuple(self.wanted(traced.jaxpr.jaxpr).items()))
        return kept_programs.compiled(name, traced, known or None)

    def _run(self, arguments: tuple) -> PyTree:
        assert self.compiled
        try:
            out = self.compiled(*arguments)
        except jax.errors.JaxRuntimeError as error:
            taken = any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(arguments))
            if self.unproven is None or taken:
                raise
            kept_programs.forget(self.unproven, error)
            self.compiled = self._compiled(self.unproven, self.plain.trace(*arguments))
            out = self.compiled(*arguments)
        self.unproven = None
        return out

    def _traced(self, arguments: tuple) -> tuple[Traced, str | None]:
        """The function's program, and the name under which it is kept."""
        traced = self.plain.trace(*arguments)  # JAX has it still, if it has traced it before
        if self.named[0] is not traced.jaxpr:
            wanted = self.wanted(traced.jaxpr.jaxpr)
            name = kept_programs.name_of(traced, arguments, self.devices(), wanted, self.options)
            self.named = traced.jaxpr, name
        return traced, self.named[1]


def quickly() -> Options | None:
    """XLA's options for a program that runs once; ``None`` where its own choice is best."""
    return (_known(tuple(QUICKLY.items())) or None) if jax.default_backend() == "cpu" else None


def _inside_another() -> bool:
    """Is this part of another program that is being traced, whether or not the arguments are?"""
    return get_opaque_trace_state() != _outermost()


@functools.cache
def _outermost() -> Any:
    with jax.ensure_compile_time_eval():
        return get_opaque_trace_state()


_under_way: list[jax.Array] = []  # a result of the last program that was sent off to several CPU devices


def chosen(program: Jaxpr, mesh: Mesh | None = None) -> Options | None:
    """XLA's options for a program on a CPU's devices; ``None`` elsewhere, and where its own choice is best.

    A mesh that holds all cores leaves no thread to cut anything up for. Helpers that a kernel asks for come too late
    (with a thread to spare, a sweep of W1 took half as long again), and can do harm, see ``devices._enough_threads``.
    """
    first = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return (_known(tuple(_wanted(program, mesh).items())) or None) if first.platform == "cpu" else None


def _wanted(program: Jaxpr, mesh: Mesh | None) -> Options:
    """The same for a program on a CPU, whether or not this version of XLA has them all."""
    alone = devices.at_work(mesh) >= devices.cores() > 1
    small = is_small(program)
    tiny = small and flops(program) <= TINY
    return (UNCUT if small or alone else {}) | (ONE_THREAD if tiny or alone else {}) | (NO_CALLS if tiny else {})


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
def _known(options: tuple[tuple[str, Any], ...]) -> Options:
    """Those of the options that this version of XLA has."""

    def takes(options: tuple) -> bool:
        try:
            jax.jit(lambda: 0, compiler_options=dict(options)).lower().compile()
        except Exception:  # a name or a value that it doesn't know
            return False
        return True

    return dict(options if takes(options) else [option for option in options if takes((option,))])
