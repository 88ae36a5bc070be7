"""Asserting that a program is compiled once, by what JAX reports and not by a cache that may be emptied.

And the environment of a process that compiles as this one does, with CPU devices of its own number.
"""

import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator

from fedjax_lab.devices import THREADS
from tests.refusals import COMPILED


@contextlib.contextmanager
def compiled_once(program: str = "jit(step)") -> Iterator[None]:
    """The block compiles one program of this name, or takes one from the cache, exactly once."""
    begin = len(COMPILED)
    yield
    assert COMPILED[begin:].count(program) == 1, COMPILED[begin:]


def environment(devices: int | None = None) -> dict[str, str]:
    """This process's, with a CPU of ``devices`` devices, or of as many as the program itself asks for."""
    count = "--xla_force_host_platform_device_count"
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(count)]
    if devices is not None:
        flags.append(f"{count}={devices}")
    return os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}


def in_a_process(script: str) -> str:
    """What a script prints that chooses its own CPU devices and threads."""
    env = {name: value for name, value in environment().items() if name != THREADS}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
