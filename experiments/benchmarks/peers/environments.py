"""A virtual environment for each peer, made when it is first asked for and kept."""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

CACHE = "FEDJAX_LAB_CACHE"
STAMP = "installed.txt"


class Unavailable(Exception):
    """A peer that can't be had here, with the reason in one line."""


class Peer(NamedTuple):
    """A framework that does the same work.

    Attributes:
      name: as in ``--peers``, and in the figures.
      packages: what pip installs.
      runner: the file beside this one that runs in the peer's environment.
      settings: ``{name: options for the runner}``; each is measured, and the best counts.
      environment: variables that the runner's process gets.
    """

    name: str
    packages: tuple[str, ...]
    runner: str
    settings: Mapping[str, dict[str, Any]]
    environment: Mapping[str, str] = {}


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "fedjax",
            # Our own jax, so that both sides have the same compiler.
            ("fedjax==0.0.17", "dm-haiku==0.0.17", f"jax=={jax.__version__}"),
            "fedjax_runner.py",
            # Its other backend, pmap, needs device_put_replicated and its like, which jax no longer has.
            {"jit": {"backend": "jit"}},
        ),
        Peer(
            "pfl",
            ("pfl==0.6.0", "torch==2.13.0", "numpy"),
            "pfl_runner.py",
            {"1 thread": {"threads": 1}, "2 threads": {"threads": 2}},
            {"PFL_PYTORCH_DEVICE": "cpu"},
        ),
        Peer(
            "flower",
            ("flwr[simulation]==1.41.0", "torch==2.13.0", "numpy"),
            "flower_runner.py",
            {"2 actors": {"actors": 2}},
            {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"},
        ),
    )
}


def default_folder() -> pathlib.Path:
    """Where the environments lie: ``$FEDJAX_LAB_CACHE/peers``, or ``~/.cache/fedjax_lab/peers``."""
    cache = os.environ.get(CACHE)
    return pathlib.Path(cache or pathlib.Path.home() / ".cache" / "fedjax_lab") / "peers"


def _stamp(peer: Peer, python: str) -> str:
    return "\n".join((python, *peer.packages)) + "\n"


def environment(peer: Peer, folder: pathlib.Path, python: str = sys.executable) -> pathlib.Path:
    """The Python of the peer's environment, which is made if it isn't there or is of other packages.

    Args:
      peer: which.
      folder: of all environments; this one's has a name of its own for each set of packages.
      python: the interpreter that a new environment is made with.

    Raises:
      Unavailable: it can't be installed; the last line of what the installer said.
    """
    wanted = _stamp(peer, python)
    root = folder / f"{peer.name}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"
    inner = root / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    # Written last: an installation that was interrupted is made anew.
    if (root / STAMP).is_file() and (root / STAMP).read_text() == wanted:
        return inner
    print(f"installing {peer.name} ({', '.join(peer.packages)}) into {root}", flush=True)
    shutil.rmtree(root, ignore_errors=True)
    _quietly(peer, [python, "-m", "venv", str(root)])
    pip = [str(inner), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *peer.packages]
    _quietly(peer, [*pip, "setuptools<81"])  # pkg_resources, which older packages import
    (root / STAMP).write_text(wanted)
    return inner


def _quietly(peer: Peer, command: list[str]) -> None:
    nice = ["nice", "-n", "19"] if shutil.which("nice") else []
    try:
        done = subprocess.run(nice + command, capture_output=True, text=True)
    except OSError as error:
        raise Unavailable(f"{peer.name} can't be installed: {error}") from error
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
        errors = [line for line in said if "error" in line.lower()] or said or ["no output"]
        raise Unavailable(f"{peer.name} can't be installed: {errors[-1].strip()}")
