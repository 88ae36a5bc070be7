"""Functions in processes of their own: for peak memory, start-up times, and what must not share our settings."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from experiments.benchmarks.peers.command import ROOT, Failed

CHILD = """
import json, sys, time
began = time.perf_counter()
import importlib
module, name, arguments = json.loads(sys.argv[1])
called = getattr(importlib.import_module(module), name)
out = called(began, **arguments)
print("\\n" + json.dumps(out))
"""


def call(module: str, name: str, arguments: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Any:
    """``module.name(began, **arguments)`` in a process of its own; what it returned, by way of JSON.

    ``began`` is the child's ``time.perf_counter()`` before it imported anything.

    Raises:
      Failed: the process ended badly.
    """
    command = [sys.executable, "-c", CHILD, json.dumps([module, name, dict(arguments)])]
    surroundings = {**os.environ, **(environ or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings, cwd=ROOT)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-15:]
        raise Failed("\n  ".join([f"{name} ended with status {done.returncode}:", *said]))
    return json.loads(done.stdout.strip().splitlines()[-1])


SERVER = """
import importlib, json, sys
module, name, arguments = json.loads(sys.argv[1])
measure = getattr(importlib.import_module(module), name)(**arguments)
print(flush=True)
for line in sys.stdin:
    print(json.dumps(measure(json.loads(line))), flush=True)
"""


@contextlib.contextmanager
def server(module: str, name: str, arguments: Mapping[str, Any], without: tuple[str, ...] = ()) -> Iterator[Callable]:
    """A function of one number that a process of its own computes; ``module.name(**arguments)`` gives it there.

    Args:
      module, name, arguments: JSON's kinds.
      without: variables that its environment lacks.

    Raises:
      Failed: the process ended, at its start or when it is called.
    """
    command = [sys.executable, "-c", SERVER, json.dumps([module, name, dict(arguments)])]
    surroundings = {key: value for key, value in os.environ.items() if key not in without}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=surroundings, cwd=ROOT) as process:
        assert process.stdin and process.stdout

        def answer() -> str:
            line = process.stdout.readline()
            if not line:
                raise Failed(f"the process of {name} ended with status {process.wait()}")
            return line

        def ask(number: float) -> Any:
            process.stdin.write(f"{json.dumps(number)}\n")
            process.stdin.flush()
            return json.loads(answer())

        answer()
        yield ask
        process.stdin.close()
