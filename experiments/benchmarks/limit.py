"""``limit``: a round of FedAvg against a hand-written loop that makes as many SGD steps.

The loop is the limit that a simulator of sequential clients can reach: one model, no clients, no
sampling, no averaging, every batch's rows chosen beforehand. Its batches are always full, where the
last one of a client's epoch may not be. It is a ``lax.scan``, or, for convolutional models, a Python
loop over a jitted step: XLA:CPU leaves convolutions inside loops in a slow form (jax 0.10), so that a
scan would be too easy to beat. ``--in-scan`` shows by how much.
"""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_lab as fl
from experiments.benchmarks import engine, fresh, pairs
from experiments.benchmarks.workloads import Workload, chosen, found


class DifferentSteps(RuntimeError):
    """Our side and the hand-written loop don't compute the same."""


def hand_written(work: Workload, top_level: bool | None = None) -> Callable:
    """``(arrays, rows: int[steps, batch], params) -> params``: plain SGD on the given rows.

    Args:
      work: the model and the learning rate.
      top_level: a jitted step in a Python loop, rather than a jitted ``scan``; by default as the
        workload has it.
    """

    def step(arrays, params, batch):
        grads = jax.grad(work.mean_loss)(params, arrays["x"][batch], arrays["y"][batch])
        return jax.tree.map(lambda w, g: w - work.learning_rate * g, params, grads)

    if not (work.top_level if top_level is None else top_level):
        return jax.jit(lambda arrays, rows, params: jax.lax.scan(
            lambda params, batch: (step(arrays, params, batch), None), params, rows
        )[0])  # fmt: skip

    once = jax.jit(step, donate_argnums=1)

    def train(arrays, rows, params):
        params = jax.tree.map(jnp.array, params)  # a copy, to be given away
        for batch in np.asarray(rows):
            params = once(arrays, params, batch)
        return params

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
      DifferentSteps: they don't, so that no timing would mean anything.
    """
    few = {name: np.asarray(leaf)[: work.batch_size] for name, leaf in data.arrays.items()}
    alone = fl.FederatedData.from_clients({0: few})
    process = engine.process(work.algorithm(), alone, devices=1)
    start = process.init(jax.random.key(0), params=work.params())
    ours = process.params(process.step(start, process.data)[0])
    theirs = hand_written(work)(few, batches(work, alone, np.array([0]), 0), work.params())
    if jax.tree.structure(ours) != jax.tree.structure(theirs):
        raise DifferentSteps(f"{work.name}: the two sides train different models; nothing was timed")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if a.shape != b.shape or not np.allclose(a, b, rtol=1e-4, atol=1e-6):
            raise DifferentSteps(f"{work.name}: the two sides train different models; nothing was timed")


def measure(
    work: Workload, data: fl.FederatedData, cohort: int, runs: int, draws: int, devices: int | None = None
) -> list[pairs.Pair]:
    """Microseconds per SGD step over ``draws`` cohorts of ``runs`` pairs each."""
    out = []
    for draw in range(draws):
        drawn = draw_of(data, cohort, draw)
        process = engine.process(work.algorithm(), data, fl.fixed(drawn), devices)
        ours = engine.rounds(process, process.init(jax.random.key(draw)))
        arguments = {"place": work.place, "cohort": cohort, "draw": draw}
        with elsewhere(loop, arguments) as theirs:
            times = pairs.alternating_pairs((functools.partial(pairs.seconds, ours), theirs), runs)
        out += pairs.scaled(times, 1e6 / work.steps(np.asarray(data.sizes)[drawn]))
    return out


def elsewhere(function: Callable, arguments: dict[str, Any]) -> contextlib.AbstractContextManager[Callable]:
    """What the function gives; on a CPU in a process of its own, which has other threads than this one."""
    if jax.default_backend() != "cpu":  # one process takes an accelerator's memory
        return contextlib.nullcontext(function(**arguments))
    return fresh.server(__name__, function.__name__, arguments, (fl.devices.THREADS,))


def draw_of(data: fl.FederatedData, cohort: int, draw: int) -> np.ndarray:
    """A cohort, ``int[cohort]``."""
    return np.random.default_rng(draw).choice(data.num_clients, cohort, replace=False)


def loop(place: Sequence[Any], cohort: int, draw: int) -> Callable[[int], float]:
    """``repeats -> seconds`` of the hand-written loop over a cohort's batches.

    To be called :func:`elsewhere`, with a CPU of one device and as many threads as XLA chooses: ours, for several
    devices, would cost the loop a tenth to a half.
    """
    work = found(*place)
    data = work.data()
    rows = batches(work, data, draw_of(data, cohort, draw), draw)
    rows = rows if work.top_level else jax.device_put(rows)
    arrays = jax.device_put({name: np.asarray(leaf) for name, leaf in data.arrays.items()})
    train = functools.partial(hand_written(work), arrays, rows, work.params())
    return lambda repeats: pairs.seconds(train, repeats)


def matrix_products(size: int) -> Callable[[int], float]:
    """``runs -> float``, the best rate of a float32 product of two ``[size, size]`` in gigaflop per second."""
    product = jax.jit(lambda a: a @ a)
    a = jnp.ones((size, size), jnp.float32)
    return lambda runs: 2 * size**3 / min([pairs.seconds(lambda: product(a), 1) for _ in range(runs + 1)][1:]) / 1e9


def in_scan(work: Workload, data: fl.FederatedData, runs: int, steps: int = 3) -> list[pairs.Pair]:
    """Microseconds per hand-written step inside ``lax.scan`` ("ours"), and outside of any loop ("theirs")."""
    arrays = jax.device_put({name: np.asarray(leaf) for name, leaf in data.arrays.items()})
    rows = np.arange(steps * work.batch_size, dtype=np.int32).reshape(steps, work.batch_size)
    inside, outside = hand_written(work, top_level=False), hand_written(work, top_level=True)
    params = work.params()
    times = pairs.paired(lambda: inside(arrays, rows, params), lambda: outside(arrays, rows, params), runs)
    return pairs.scaled(times, 1e6 / steps)


def matrix_rate(size: int = 2048, runs: int = 5) -> float:
    """The best rate of a large float32 matrix product, in gigaflop per second, where the loops run."""
    with elsewhere(matrix_products, {"size": size}) as rate:
        return rate(runs)


def main(
    workloads: str = "w1",
    quick: bool = False,
    json: pathlib.Path | None = None,
    cohort: int | None = None,
    devices: int | None = None,
    in_scan_too: bool = False,
) -> None:
    """Time a round of FedAvg against a hand-written loop of as many SGD steps.

    Args:
      workloads: which ones, separated by commas.
      quick: one cohort and three pairs of timings, instead of three and fifteen.
      json: a file to write the figures to; a picture and all timings go beside it.
      cohort: clients a round, instead of the workload's own.
      devices: devices that our side uses, all cores by default.
      in_scan_too: time the hand-written step inside ``lax.scan`` as well, against the same outside of it.
    """
    works = chosen(workloads)
    engine.use_all_cores()
    pairs.begin(json)
    results = []
    for work in works:
        data = work.data()
        check_same_steps(work, data)
        for size in work.cohorts if cohort is None else (cohort,):
            runs, draws = (3, 1) if quick else (15, 3)
            times = measure(work, data, size, runs, draws, devices)
            against = "steps at top level" if work.top_level else "lax.scan"
            results.append(pairs.show(pairs.summary(work.name, size, against, times, "us per step")))
            if work.gigaflop > 0.1:
                peak = matrix_rate()
                rates = [p._replace(ours=work.gigaflop / p.ours * 1e6, theirs=peak) for p in times]
                results.append(pairs.show(pairs.summary(work.name, size, "matrix products", rates, "GFLOP/s")))
        if in_scan_too:
            times = in_scan(work, data, 3 if quick else 7)
            results.append(pairs.show(pairs.summary(f"{work.name} in scan", 1, "outside a loop", times, "us per step")))
    if json is not None:
        pairs.write(results, json, "A round of FedAvg against a hand-written loop")
