"""A function of this package in a fresh process: for peak memory and start-up times."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from experiments.benchmarks.peers.command import ROOT, Failed

CHILD = """
import json, sys, time
began = time.perf_counter()
import gc, importlib
module, name, arguments = json.loads(sys.argv[1])
called = getattr(importlib.import_module(module), name)
gc.freeze()  # as the experiments' command does
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
