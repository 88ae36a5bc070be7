"""``links``: encoding and decoding a large vector, against NumPy and PyTorch."""

import json as json_
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

import fedjax_lab as fl
from experiments.benchmarks import pairs
from experiments.benchmarks.peers import environments
from experiments.benchmarks.peers.command import Failed

# Each link, and what its public implementations are called in peers/links_runner.py.
LINKS = {
    "top_k 1%": (lambda: fl.wire.top_k(0.01), [("numpy", "top_k"), ("torch", "top_k")]),
    "qsgd 8 bit": (lambda: fl.wire.qsgd(8), [("numpy", "qsgd"), ("torch", "qsgd")]),
    "eden 1 bit": (lambda: fl.wire.eden(1), [("torch", "eden")]),
}
THREADS = (1, 2)


class Other:
    """A process that encodes and decodes the vector by other libraries, once for each line it is given."""

    def __init__(self, python: pathlib.Path, file: pathlib.Path, threads: int):
        runner = pathlib.Path(environments.__file__).with_name("links_runner.py")
        command = [str(python), str(runner), str(file), json_.dumps({"threads": threads})]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, library: str, link: str) -> tuple[float, float]:
        """Seconds, and the squared error as a share of the vector's squared norm."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{library} {link}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise Failed(f"{library}'s {link} ended with status {self.process.wait()}")
        told = json_.loads(answer)
        return told["seconds"], told["error"]

    def end(self) -> None:
        with self.process:  # closes the pipes, and waits
            self.process.kill()


def ours_of(wire: fl.wire.Wire, vector: jax.Array):
    """``() -> (seconds, error)`` of our own link on the vector."""
    there_and_back = jax.jit(lambda x, key: fl.wire.round_trip(wire, x, key)[0])
    keys = iter(jax.random.split(jax.random.key(0), 1000))

    def call() -> tuple[float, float]:
        key = jax.block_until_ready(next(keys))
        begin = time.perf_counter()
        out = jax.block_until_ready(there_and_back(vector, key))
        took = time.perf_counter() - begin
        plain = np.asarray(vector, np.float64)
        return took, float(np.sum((np.asarray(out, np.float64) - plain) ** 2) / np.sum(plain**2))

    return call


def compare(name: str, vector: jax.Array, others: dict[int, Other], runs: int) -> pairs.Measured:
    """The link against the fastest of the others' ways and numbers of threads.

    Raises:
      Failed: errors that differ by more than a tenth from those of the way that counts.
    """
    make, ways = LINKS[name]
    ours = ours_of(make(), vector)
    ours()  # compiles
    measured = {}
    for threads, other in others.items():
        for library, link in ways:
            if library == "numpy" and threads > 1:
                continue
            other(library, link)
            errors: list[tuple[float, float]] = []

            def side(which: int, other=other, library=library, link=link, errors=errors) -> float:
                took, error = (lambda: other(library, link), ours)[which == 0]()
                errors.append((which, error))
                return took

            times = [pairs.alternating(run, side) for run in range(runs)]
            mine, their = (statistics.mean(e for which, e in errors if which == s) for s in (0, 1))
            label = library if library == "numpy" else f"{library}, {threads} thr."
            if abs(mine - their) > 0.1 * their + 1e-9:
                raise Failed(f"{name}: our squared error is {mine:.4g} of the norm's, {label} {link}'s {their:.4g}")
            measured[label, link] = pairs.summary(name, 1, label, pairs.scaled(times, 1e3), "ms")
    return pairs.show(min(measured.values(), key=lambda m: m.row.theirs))


def main(
    size: int = 10_000_000,
    quick: bool = False,
    json: pathlib.Path | None = None,
    cache: pathlib.Path | None = None,
    python: str = sys.executable,
) -> None:
    """Time encoding and decoding of one update by links, against the fastest of NumPy and PyTorch on 1 and 2 threads.

    Args:
      size: of the update.
      quick: three pairs of timings instead of fifteen.
      json: a file to write the figures to; a picture and all timings go beside it.
      cache: the folder of the environments, as of ``peers``; PyTorch is taken from pfl's.
      python: the interpreter that new environments are made with.
    """
    there = environments.environment(environments.PEERS["pfl"], cache or environments.default_folder(), python)
    vector = np.random.default_rng(0).standard_normal(size, np.float32)
    pairs.begin(json)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "vector.npy"
        np.save(file, vector)
        others = {threads: Other(there, file, threads) for threads in THREADS}
        try:
            on_device = jax.device_put(vector)
            results = [compare(name, on_device, others, 3 if quick else 15) for name in LINKS]
        finally:
            for other in others.values():
                other.end()
    if json is not None:
        pairs.write(results, json, f"Encoding and decoding {size:,} numbers")
