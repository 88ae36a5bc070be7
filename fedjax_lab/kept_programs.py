"""Compiled programs kept on disk, found again by what was traced.

JAX's own compilation cache is asked with a program's whole text, which has to be made first: for a round of W2 that is
a quarter of a second in every process, and reading the program another tenth. A digest of the traced equations
(``digest.py``) takes a tenth of that. Programs are read in threads of their own, together with the one that was used
next the last time, while that is being traced. They lie in a folder inside of JAX's (``jax_compilation_cache_dir``).

They are programs: as with JAX's own, whoever may write that folder may run anything as you.
"""

import hashlib
import os
import pathlib
import re
import struct
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import jax
import jax.monitoring
from jax.stages import Compiled, Traced

from fedjax_lab import digest, hosts

try:
    from jax.experimental import serialize_executable
except ImportError:  # it may go, as all that is experimental: then JAX's own cache is left
    serialize_executable = cast(Any, None)

PyTree = Any
READ = "/fedjax_lab/program_read_duration"
THREADS = ThreadPoolExecutor(2, "fedjax_lab-programs")
# A process has few of the engine's programs: seconds from which on one is kept, where JAX asks for longer ones.
LEAST = 0.1
NAME = r"\w+-[0-9a-f]{64}"
COUNTS = struct.Struct("<II")  # leaves of a program's arguments and of its results
SEAL = hashlib.sha256().digest_size  # bytes in front of a file, which tell whether it is whole and of this form
FORM = b"fedjax_lab program 1"


def folder() -> pathlib.Path | None:
    """Where programs are kept; ``None`` if the user keeps none, or wants to look into what they compute."""
    config: Any = jax.config
    where = config.jax_compilation_cache_dir
    looked_into = config.jax_disable_jit or config.jax_debug_nans or config.jax_debug_infs
    bounded = config.jax_compilation_cache_max_size != -1  # JAX counts its own files only
    if not where or "://" in where or not config.jax_enable_compilation_cache or looked_into or bounded:
        return None
    if serialize_executable is None:
        return None
    return None if hosts.several() else pathlib.Path(where) / "fedjax_lab"


def name_of(traced: Traced, places: Sequence[Any], devices: Sequence[Any], *besides: Any) -> str | None:
    """The name of a program's file; ``None`` if it can't be kept.

    Args:
      traced: the program.
      places: of its arguments (:func:`places_of`).
      devices: that it runs on, in their order.
      *besides: what else tells it from others, see :func:`fedjax_lab.digest.of`.
    """
    if folder() is None or any(place is not None and not place.device_set <= set(devices) for place in places):
        return None
    found = digest.of(traced.jaxpr, places, [device.id for device in devices], *besides)
    return found and re.sub(r"\W", "_", traced.fun_name) + f"-{found}"


def places_of(arguments: PyTree) -> list[jax.sharding.Sharding | None]:
    """Where the arguments, or what their shapes stand for, must stay; ``None`` where that is open."""
    place = lambda x: getattr(x, "sharding", None) if getattr(x, "committed", True) else None
    return [place(leaf) for leaf in jax.tree.leaves(arguments)]


def fetch(name: str, devices: Sequence[Any]) -> Future[Compiled | None]:
    """Begins to read a program, and the one that was used after it the last time.

    Args:
      name: of :func:`name_of`.
      devices: that it runs on.

    Returns:
      It, from its arguments' leaves to a list of its results' leaves; ``None`` if it isn't there or isn't whole.
    """
    where, there = folder(), tuple(devices)
    begun = _foreseen.pop((name, there), None)
    if begun is None or (begun.done() and begun.result() is None):  # it may be there by now
        begun = THREADS.submit(_read, name, where, there)
    following = _after(name)
    if following is not None:
        _foreseen.clear()  # one guess at a time
        _foreseen[following, there] = THREADS.submit(_read, following, where, there)
    return begun


_foreseen: dict[tuple[str, tuple[Any, ...]], Future[Compiled | None]] = {}


def waited_for(begun: Future[Compiled | None], traced: Traced) -> Callable | None:
    """A program that is being read, of arguments as it was traced with.

    ``jax.monitoring`` is told (:data:`READ`), as JAX tells of those that it compiles.
    """
    begin = time.perf_counter()
    found = begun.result()
    if found is None:
        return None
    jax.monitoring.record_event_duration_secs(READ, time.perf_counter() - begin, fun_name=f"jit({traced.fun_name})")
    structure, out = traced.in_tree, traced.out_tree

    def call(*arguments):
        leaves, given = jax.tree.flatten((arguments, {}))
        if given != structure:
            raise TypeError("it was compiled for arguments of another structure")
        return out.unflatten(found(*leaves))

    return call


def used(name: str, devices: Sequence[Any]) -> None:
    """Remembers which program is used after which on the same devices, in each thread."""
    (before, there), _last.program = _last.program, (name, list(devices))
    where = folder()
    # XLA ends the process when it reads a program for other devices than it was made for.
    if before not in (None, name) and there == list(devices) and where is not None and _after(before) != name:
        THREADS.submit(_put, where / f"{before}.next", name.encode())


class _Last(threading.local):
    program: tuple[str | None, list] = (None, [])


_last = _Last()


def _after(name: str) -> str | None:
    where = folder()
    try:
        told = "" if where is None else (where / f"{name}.next").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return told if re.fullmatch(NAME, told) else None


def _read(name: str, where: pathlib.Path | None, devices: tuple[Any, ...]) -> Compiled | None:
    try:
        whole = b"" if where is None else (where / name).read_bytes()
    except OSError:
        return None
    seal, content = whole[:SEAL], whole[SEAL:]
    if seal != _seal(content):
        return None
    try:
        content = zlib.decompress(content)
        given, gives = COUNTS.unpack_from(content)
        structures = (jax.tree.structure(((0,) * given, {})), jax.tree.structure([0] * gives))
        return serialize_executable.deserialize_and_load(content[COUNTS.size :], *structures, execution_devices=devices)
    except Exception as error:  # whatever another version wrote: it is compiled anew, and replaced
        warnings.warn(f"the compiled program {name} can't be used, and is made again: {error}", stacklevel=1)
        return None


def compiled(name: str, traced: Traced, options: Mapping[str, Any] | None) -> Compiled:
    """A program compiled with XLA's options; begins to write it, if it took long enough."""
    begin, before = time.perf_counter(), (_told.compiled, _told.found)
    made = traced.lower().compile(compiler_options=dict(options) if options else None)
    # XLA writes only what it has just compiled: parts are missing of what was read, or has run.
    if (_told.compiled, _told.found) == (before[0] + 1, before[1]):
        _keep(name, made, time.perf_counter() - begin)
    return made


def forget(name: str, why: Exception) -> None:
    """Removes a program that doesn't run."""
    where = folder()
    if where is not None:
        (where / name).unlink(missing_ok=True)
    warnings.warn(f"the compiled program {name} doesn't run, and is made again: {why}", stacklevel=2)


class _Told(threading.local):
    """Programs that JAX said, in this thread, it has made; and those of them that it found in its own cache."""

    compiled = found = 0


_told = _Told()


def _listen(event: str, *_: Any, **__: Any) -> None:
    _told.compiled += event == "/jax/core/compile/backend_compile_duration"
    _told.found += event == "/jax/compilation_cache/cache_hits"


jax.monitoring.register_event_listener(_listen)
jax.monitoring.register_event_duration_secs_listener(_listen)


def _keep(name: str, compiled: Compiled, seconds: float) -> Future[None] | None:
    where, config = folder(), cast(Any, jax.config)
    if where is None or seconds < min(config.jax_persistent_cache_min_compile_time_secs, LEAST):
        return None
    try:
        content, given, gives = serialize_executable.serialize(compiled)
    except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError):  # some kinds can't be written at all
        return None
    return THREADS.submit(_write, where / name, COUNTS.pack(given.num_leaves, gives.num_leaves) + content)


def _write(file: pathlib.Path, content: bytes) -> None:
    content = zlib.compress(content, 1)
    _put(file, _seal(content) + content)


def _seal(content: bytes) -> bytes:
    return hashlib.sha256(FORM + content).digest()


def _put(file: pathlib.Path, content: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".", delete=False) as new:
            new.write(content)
        os.replace(new.name, file)
    except OSError as error:
        warnings.warn(f"can't keep the compiled program {file}: {error}", stacklevel=1)
