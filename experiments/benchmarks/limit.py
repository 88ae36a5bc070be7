"""``limit``: a round of FedAvg against a hand-written ``lax.scan`` that makes as many SGD steps.

The loop is the limit that a simulator of sequential clients can reach: one model, no clients, no
sampling, no averaging, every batch's rows chosen beforehand. Its batches are always full, where the
last one of a client's epoch may not be.
"""

import pathlib

import jax
import numpy as np

import fedjax_lab as fl
from experiments.benchmarks import pairs
from experiments.benchmarks.workloads import Workload, chosen


def hand_written(work: Workload):
    """``(arrays, rows: int[steps, batch], params) -> params``: plain SGD on the given rows."""

    @jax.jit
    def train(arrays, rows, params):
        def step(params, batch):
            grads = jax.grad(work.mean_loss)(params, arrays["x"][batch], arrays["y"][batch])
            return jax.tree.map(lambda w, g: w - work.learning_rate * g, params, grads), None

        return jax.lax.scan(step, params, rows)[0]

    return train


def batches(work: Workload, data: fl.FederatedData, cohort: np.ndarray, seed: int) -> np.ndarray:
    """The rows of every step of a round, client after client in shuffled epochs; ``int32[steps, batch]``."""
    rng = np.random.default_rng(seed)
    starts, sizes = np.asarray(data.starts), np.asarray(data.sizes)
    out = []
    for k in cohort:
        for _ in range(work.epochs):
            order = starts[k] + rng.permutation(sizes[k])
            out.append(np.resize(order, -(-sizes[k] // work.batch_size) * work.batch_size))
    return np.concatenate(out).reshape(-1, work.batch_size).astype(np.int32)


def check_same_steps(work: Workload, data: fl.FederatedData) -> None:
    """One client with one batch of examples: both sides must reach the same parameters.

    Raises:
      RuntimeError: they don't, so that no timing would mean anything.
    """
    few = {name: np.asarray(leaf)[: work.batch_size] for name, leaf in data.arrays.items()}
    alone = fl.FederatedData.from_clients({0: few})
    process = fl.synchronous(work.algorithm(), alone)
    ours = process.params(process.step(process.init(jax.random.key(0)), process.data)[0])
    rows = batches(work, alone, np.array([0]), 0)
    theirs = hand_written(work)(process.data.arrays, rows, work.params())
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if a.shape != b.shape or not np.allclose(a, b, rtol=1e-4, atol=1e-6):
            raise RuntimeError(f"{work.name}: the two sides train different models; nothing was timed")


def measure(work: Workload, data: fl.FederatedData, cohort: int, runs: int, draws: int) -> list:
    """Microseconds per SGD step, ``[(ours, theirs)]``, over ``draws`` cohorts of ``runs`` pairs each."""
    out = []
    for draw in range(draws):
        drawn = np.random.default_rng(draw).choice(data.num_clients, cohort, replace=False)
        process = fl.synchronous(work.algorithm(), data, fl.fixed(drawn))
        start = process.init(jax.random.key(draw))
        loop, rows = hand_written(work), jax.device_put(batches(work, data, drawn, draw))
        arrays, params = process.data.arrays, work.params()
        times = pairs.paired(
            lambda process=process, start=start: process.step(start, process.data),
            lambda arrays=arrays, rows=rows, params=params, loop=loop: loop(arrays, rows, params),
            runs,
        )
        micro = 1e6 / work.steps(np.asarray(data.sizes)[drawn])
        out += [(ours * micro, theirs * micro) for ours, theirs in times]
    return out


def main(workloads: str = "w1", quick: bool = False, json: pathlib.Path | None = None) -> None:
    """Time a round of FedAvg against a hand-written loop of as many SGD steps.

    Args:
      workloads: which ones, separated by commas.
      quick: one cohort and three pairs of timings, instead of three and fifteen.
      json: a file to write the figures to.
    """
    works = chosen(workloads)
    print(pairs.machine(), pairs.HEADER, sep="\n", flush=True)
    rows = []
    for work in works:
        data = work.data()
        check_same_steps(work, data)
        for cohort in work.cohorts:
            times = measure(work, data, cohort, runs=3 if quick else 15, draws=1 if quick else 3)
            rows.append(pairs.summary(work.name, cohort, "lax.scan", times, "us per step"))
            print(pairs.line(rows[-1], times), flush=True)
    if json is not None:
        pairs.write(rows, json)
