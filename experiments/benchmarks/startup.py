"""``startup``: from the call to the first finished round, in a fresh process.

The clock starts with the data in memory and everything imported, and stops when the first round's result
is there: building the algorithm and the process, tracing, compiling, computing.
"""

import pathlib
import tempfile
import time

import jax

import fedjax_lab as fl
from experiments.benchmarks import engine, fresh, pairs
from experiments.benchmarks.workloads import WORKLOADS, chosen

HERE = "experiments.benchmarks.startup"
TARGETS = {"w1": 3.0, "w2": 8.0}  # seconds, issue 3


def first_round(began: float, workload: str, cohort: int) -> dict[str, float]:
    """Seconds to import, from call to first round, and of the round after it."""
    engine.use_all_cores()
    imported = time.perf_counter() - began
    work = WORKLOADS[workload]
    data = work.data()
    jax.block_until_ready(jax.numpy.zeros(1))
    start = time.perf_counter()
    process = engine.process(work.algorithm(), data, fl.uniform(cohort))
    call = engine.rounds(process, process.init(jax.random.key(0)))
    jax.block_until_ready(call())
    first = time.perf_counter() - start
    start = time.perf_counter()
    jax.block_until_ready(call())
    return {"import": imported, "first": first, "next": time.perf_counter() - start}


def cold_and_warm(workload: str, cohort: int) -> list[dict[str, float]]:
    """The same twice, with a compilation cache that is empty, then full."""
    with tempfile.TemporaryDirectory(prefix="fedjax_lab_programs_") as folder:
        environ = {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        arguments = {"workload": workload, "cohort": cohort}
        return [fresh.call(HERE, "first_round", arguments, environ) for _ in range(2)]


def main(
    workloads: str = "w1,w2",
    quick: bool = False,
    json: pathlib.Path | None = None,
    cohort: int | None = None,
) -> None:
    """Time the start of fresh processes: cold against a target, and with a warm compilation cache against cold.

    Args:
      workloads: which ones, separated by commas.
      quick: one pair of processes instead of five.
      json: a file to write the figures to; a picture and all timings go beside it.
      cohort: clients a round, instead of the workload's smallest.
    """
    works = chosen(workloads)
    engine.use_all_cores()
    pairs.begin(json)
    results = []
    for work in works:
        size = min(work.cohorts) if cohort is None else cohort
        busy, both = [], []
        for _ in range(1 if quick else 5):
            busy.append(pairs.load())
            both.append(cold_and_warm(work.name, size))
        if work.name in TARGETS:
            target = TARGETS[work.name]
            cold = [pairs.Pair(one["first"], target, b) for (one, _), b in zip(both, busy, strict=True)]
            results.append(pairs.show(pairs.summary(work.name, size, "target, cold", cold, "s")))
        warm = [pairs.Pair(w["first"], c["first"], b) for (c, w), b in zip(both, busy, strict=True)]
        results.append(pairs.show(pairs.summary(f"{work.name}, warm", size, "cold", warm, "s")))
        rest = [
            pairs.Pair(max(w["first"] - w["next"], 1e-3), max(c["first"] - c["next"], 1e-3), b)
            for (c, w), b in zip(both, busy, strict=True)
        ]
        results.append(pairs.show(pairs.summary(f"{work.name}, warm", size, "cold", rest, "s but a round")))
        print(f"  imports {both[-1][1]['import']:.1f} s, a round {both[-1][1]['next']:.2f} s", flush=True)
    if json is not None:
        pairs.write(results, json, "From call to first round")
