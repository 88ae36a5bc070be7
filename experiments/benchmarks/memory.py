"""``memory``: the peak of a process that runs rounds, each in a fresh process."""

import functools
import pathlib
import resource
import sys

import jax
import numpy as np

import fedjax_lab as fl
from experiments.benchmarks import engine, fresh, growth, pairs
from experiments.benchmarks.workloads import chosen

MIB = 1024 * 1024
HERE = "experiments.benchmarks.memory"


def peak() -> float:
    """The most memory that this process ever held, in MiB."""
    status = pathlib.Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: there, a child starts with what its parent held.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) / 1024
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / (MIB if sys.platform == "darwin" else 1024)


def _rounds(process: fl.Process, state, count: int) -> None:
    call = engine.rounds(process, state)
    for _ in range(count):
        jax.block_until_ready(call())


def cohort_peak(
    began: float, cohort: int, width: int, rounds: int = 2, workload: str | None = None
) -> dict[str, float]:
    """Rounds of ``cohort`` out of 1,000 clients of 10 examples, on a perceptron of ``width`` units twice.

    With ``workload``, on its model instead.
    """
    work = (growth.wide(width) if workload is None else chosen(workload)[0])._replace(
        sizes=lambda rng: np.full(1000, 10)
    )
    engine.use_all_cores()
    process = engine.process(work.algorithm(), work.data(), fl.uniform(cohort))
    state = process.init(jax.random.key(0))
    before = peak()
    model = sum(leaf.nbytes for leaf in jax.tree.leaves(work.params())) / MIB
    _rounds(process, state, rounds)
    return {"before": before, "peak": peak(), "model": model}


def population_peak(began: float, clients: int, cohort: int, rounds: int = 2) -> dict[str, float]:
    """Rounds of a cohort with per-client state, out of ``clients``."""
    engine.use_all_cores()
    jax.block_until_ready(jax.numpy.zeros(1))
    before = peak()
    process, state, _ = growth.set_up(clients, cohort)
    parts = (process.data.arrays, process.clients(state))
    needed = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(parts)) / MIB
    _rounds(process, state, rounds)
    return {"before": before, "peak": peak(), "needed": float(needed)}


def main(workloads: str = "", quick: bool = False, json: pathlib.Path | None = None) -> None:
    """Measure peak memory, as cohorts and populations grow.

    Args:
      workloads: which of w1, w2, w3 and w4, separated by commas, whose models cohorts are measured on as well, besides
        a perceptron's.
      quick: cohorts of 100 and populations of 100,000, once; instead of 1,000 and 1,000,000, three times.
      json: a file to write the figures to; a picture and all measurements go beside it.
    """
    works = chosen(workloads) if workloads else []
    engine.use_all_cores()
    pairs.begin(json)
    runs, large, many = (1, 100, 100_000) if quick else (3, 1000, 1_000_000)
    results, told = [], []

    def by_cohort(side: int, **what) -> float:
        told.append(fresh.call(HERE, "cohort_peak", {"cohort": (large, 10)[side], "width": 512, **what}))
        return told[-1]["peak"]

    def by_population(side: int) -> float:
        told.append(fresh.call(HERE, "population_peak", {"clients": (many, 10_000)[side], "cohort": large}))
        return told[-1]["peak"]

    measured = [pairs.alternating(run, by_cohort) for run in range(runs)]
    results.append(pairs.show(pairs.summary("mlp 512", large, "cohort 10", measured, "MiB peak")))
    print(f"  a model has {told[-1]['model']:.1f} MiB, {large} of them {large * told[-1]['model']:.0f} MiB", flush=True)
    for work in works:
        of_work = functools.partial(by_cohort, workload=work.name)
        measured = [pairs.alternating(run, of_work) for run in range(runs)]
        results.append(pairs.show(pairs.summary(work.name, large, "cohort 10", measured, "MiB peak")))
    told.clear()
    measured = [pairs.alternating(run, by_population) for run in range(runs)]
    name = f"{many:,} clients"
    results.append(pairs.show(pairs.summary(name, large, "10,000 clients", measured, "MiB peak")))
    mine = [one for one in told if one["needed"] == max(t["needed"] for t in told)]
    over = [pairs.Pair(one["peak"] - one["before"], one["needed"], pairs.load()) for one in mine]
    results.append(pairs.show(pairs.summary(name, large, "data and states", over, "MiB")))
    if json is not None:
        pairs.write(results, json, "Peak memory")
