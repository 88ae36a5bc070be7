"""``devices``: a round on several devices against the same on one, in one process, in turns."""

import pathlib

import jax
import numpy as np

import fedjax_lab as fl
from experiments.benchmarks import engine, pairs
from experiments.benchmarks.workloads import Workload, chosen, cohorts


class Disagree(RuntimeError):
    """The devices' result is another one."""


def check_same(work: Workload, data: fl.FederatedData, ids: np.ndarray, devices: int, tolerance: float = 1e-6) -> None:
    """One round on one and on several devices must agree.

    Raises:
      Disagree: parameters further apart than ``tolerance``, absolute and relative.
    """
    ends = []
    for count in (1, devices):
        process = engine.process(work.algorithm(), data, fl.fixed(ids), count)
        state = process.init(jax.random.key(0), params=work.params())
        ends.append(jax.device_get(process.params(process.step(state, process.data)[0])))
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        if not np.allclose(a, b, rtol=tolerance, atol=tolerance):
            apart = float(np.max(np.abs(a - b)))
            raise Disagree(f"{work.name}: {devices} devices differ from one by {apart:.1e}; nothing was timed")


def main(
    workloads: str = "w1,w2,w3,w4",
    quick: bool = False,
    json: pathlib.Path | None = None,
    cohort: int | None = None,
) -> None:
    """Time a round on 2, 4, ... devices, as many as there are, against one device.

    A CPU's cores are made devices of their own; one of them may use another's core for large matrix products.

    Args:
      workloads: which ones, separated by commas.
      quick: three pairs of timings instead of fifteen.
      json: a file to write the figures to; a picture and all timings go beside it.
      cohort: clients a round, instead of the workload's own.
    """
    works = chosen(workloads)
    engine.use_all_cores()
    there = len(jax.devices())
    counts = sorted({count for count in (2, 4, 8, 16, there) if 1 < count <= there})
    pairs.begin(json)
    if not counts:
        print("there is one device only: nothing to compare", flush=True)
    results = []
    for work, data, ids in cohorts(works if counts else [], cohort):
        micro = 1e6 / work.steps(np.asarray(data.sizes)[ids])
        calls = {}
        for count in (1, *counts):
            process = engine.process(work.algorithm(), data, fl.fixed(ids), count)
            calls[count] = engine.rounds(process, process.init(jax.random.key(0)))
        for count in counts:
            check_same(work, data, ids, count)
            times = pairs.scaled(pairs.paired(calls[count], calls[1], 3 if quick else 15), micro)
            name = f"{work.name}, {count} dev."
            results.append(pairs.show(pairs.summary(name, len(ids), "1 device", times, "us per step")))
    if json is not None and results:
        pairs.write(results, json, "A round on several devices")
