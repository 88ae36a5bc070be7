"""Functions compiled when they are first called, as is fast on a CPU for what they compute (``xla_options.py``).

Where the user keeps compiled programs, they are read from there instead (``kept_programs.py``). Other backends compile
everything as JAX does.
"""

import contextlib
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax.extend.core import Jaxpr, get_opaque_trace_state
from jax.sharding import Mesh
from jax.stages import Compiled, Traced

from fedjax_lab import garbage, kept_programs, xla_options
from fedjax_lab.xla_options import Options

PyTree = Any

_under_way: list[jax.Array] = []  # a result of the last program that was sent off to several CPU devices


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
    made = _Made(function, mesh, lambda program: xla_options.wanted(program, mesh), options)

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
    made = _Made(function, mesh, lambda program: xla_options.QUICKLY, options)

    @functools.wraps(function)
    def call(*arguments):
        return (made.plain if _inside_another() else made)(*arguments)

    return _with_stages(call, made)


def now(
    function: Callable, arguments: tuple, mesh: Mesh | None = None, runs_once: bool = False, **options: Any
) -> Callable:
    """A function compiled for arguments that it will be called with, from any thread; or read from disk.

    Args:
      function: of pytrees.
      arguments: all of them, or their shapes.
      mesh: devices that its work is shared out over.
      runs_once: whether it is to be compiled for less time, as with :func:`once`.
      **options: of ``jax.jit``.
    """
    if jax.default_backend() != "cpu":
        return jax.jit(function, **options).trace(*arguments).lower().compile()
    quickly = xla_options.QUICKLY if runs_once else {}
    made = _Made(function, mesh, lambda program: xla_options.wanted(program, mesh) | quickly, options)
    made.compile(arguments)
    return made


@garbage.put_off()
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
        self.compiled: Callable | None = None  # for those of the first call
        self.unproven: str | None = None  # the name of the latter, where it was read and has not run yet
        self.begun: dict[str, Future[Compiled | None]] = {}
        self.named: tuple[Any, list, str | None] = (None, [], None)
        self.lock = threading.Lock()

    def __call__(self, *arguments):
        if self.fitted is None and self.compiled is None:
            with self.lock:
                if self.compiled is None:
                    self.compiled = self._ready(arguments)
        if self.compiled is not None:
            # Before it runs, JAX refuses arguments of other types or places than the first ones. What is wrong with
            # them, if anything, is for the call below to say.
            with contextlib.suppress(TypeError, ValueError):
                return self._run(arguments)
        with contextlib.nullcontext() if self.fitted else garbage.put_off():  # the first time it is compiled
            return self.jitted(*arguments)(*arguments)

    @garbage.put_off()
    def compile(self, arguments: tuple) -> None:
        self.compiled = self._ready(arguments) or self.jitted(*arguments).lower(*arguments).compile()

    def jitted(self, *arguments) -> Callable:
        if self.fitted is None:
            found = xla_options.known(tuple(self.wanted(self.plain.trace(*arguments).jaxpr.jaxpr).items()))
            self.fitted = jax.jit(self.function, compiler_options=found, **self.options) if found else self.plain
        return self.fitted

    def ahead(self, *arguments) -> PyTree:
        traced, name = self._traced(arguments)
        if name is not None and name not in self.begun:
            self.begun[name] = kept_programs.fetch(name, self.devices())
        return traced.out_info

    def devices(self) -> list[Any]:
        if self.mesh is not None:
            return list(self.mesh.devices.flat)
        config: Any = jax.config
        chosen = config.jax_default_device
        return [jax.local_devices(backend=chosen)[0] if chosen is None or isinstance(chosen, str) else chosen]

    @garbage.put_off()
    def _ready(self, arguments: tuple) -> Callable | None:
        traced, name = self._traced(arguments)
        if name is None:
            return None
        self.ahead(*arguments)
        found = kept_programs.waited_for(self.begun.pop(name), traced)
        self.unproven = name if found else None
        kept_programs.used(name, self.devices())
        return found or self._compiled(name, traced)

    def _compiled(self, name: str, traced: Traced) -> Compiled:
        options = self.wanted(traced.jaxpr.jaxpr)
        try:
            return kept_programs.compiled(name, traced, options or None)
        except Exception:  # perhaps an option that this XLA doesn't have: to look first took .02 s a start
            known = xla_options.known(tuple(options.items()))
            if known == options:
                raise
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
        program, places = traced.jaxpr, kept_programs.places_of(arguments)
        if self.named[0] is not program or self.named[1] != places:
            wanted = self.wanted(program.jaxpr)
            name = kept_programs.name_of(traced, places, self.devices(), wanted, self.options)
            self.named = program, places, name
        return traced, self.named[2]


def _inside_another() -> bool:
    """Is this part of another program that is being traced, whether or not the arguments are?"""
    return get_opaque_trace_state() != _outermost()


@functools.cache
def _outermost() -> Any:
    """The state of a thread that traces nothing: a new one's, as this may be asked first in the midst of a trace."""
    with ThreadPoolExecutor(1) as new:
        return new.submit(get_opaque_trace_state).result()
