"""Our side: the same task by ``fl.synchronous``, in a process of its own.

``python -m experiments.benchmarks.peers.ours TASK.npz OUTCOME WORKLOAD``
"""

import pathlib
import sys
import time

import jax
import numpy as np

import fedjax_lab as fl
from experiments.benchmarks import engine
from experiments.benchmarks.peers import exchange
from experiments.benchmarks.workloads import Workload, chosen


def train(work: Workload, task: exchange.Task) -> exchange.Outcome:
    """All rounds of the task, on every device."""
    data = fl.FederatedData.from_assignment(task.arrays, np.repeat(np.arange(len(task.sizes)), task.sizes))
    process = engine.process(work.algorithm(), data, engine.in_turn(task.cohorts))
    state = process.init(jax.random.key(0), params=exchange.nested(task.params))
    seconds = []
    for _ in task.cohorts:
        start = time.perf_counter()
        state, _ = jax.block_until_ready(process.step(state, process.data))
        seconds.append(time.perf_counter() - start)
    versions = {"jax": jax.__version__, "devices": str(len(jax.devices()))}
    return exchange.Outcome(seconds, exchange.named(process.params(state)), versions)


def main(task: str, outcome: str, workload: str) -> None:
    """Read a task, train, write the outcome."""
    engine.use_all_cores()
    (work,) = chosen(workload)
    exchange.write_outcome(pathlib.Path(outcome), train(work, exchange.read_task(pathlib.Path(task))))


if __name__ == "__main__":
    main(*sys.argv[1:])
