"""``growth``: what a round costs as the cohort, the population, the model and the number of seeds grow."""

import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from experiments.benchmarks import engine, fresh, handwritten, limit, pairs
from experiments.benchmarks.workloads import W1, Workload, chosen, found


class UnknownPart(ValueError):
    """A name that isn't one of :data:`PARTS`."""


def cohort(quick: bool, work: Workload = W1) -> list[pairs.Measured]:
    """Time per SGD step in cohorts of other sizes, as many as the population has, against a cohort of 10."""
    data, out = work.data(), []

    def one(size):
        ids = np.random.default_rng(size).choice(data.num_clients, size, replace=False)
        # One client can't be shared out: it has a device to itself.
        process = engine.process(work.algorithm(), data, fl.fixed(ids), devices=min(size, len(jax.devices())))
        return engine.rounds(process, process.init(jax.random.key(0))), work.steps(np.asarray(data.sizes)[ids])

    base, base_steps = one(10)
    for size in (1, 100) if quick else (1, 30, 100, 300, 1000):
        if size > data.num_clients:
            continue
        call, steps = one(size)
        times = pairs.scaled(pairs.paired(call, base, 3 if quick else 9), 1e6 / steps, 1e6 / base_steps)
        out.append(pairs.show(pairs.summary(work.name, size, "cohort 10", times, "us per step")))
    return out


# ---- population ----

FEATURES, CLASSES, EXAMPLES = 10, 2, 10
TOGETHER = 20  # rounds of a dispatch


def many_clients(clients: int) -> fl.FederatedData:
    """``clients`` clients of 10 examples of 10 features."""
    rng = np.random.default_rng(0)
    x = rng.random((clients * EXAMPLES, FEATURES), np.float32)
    y = rng.integers(0, CLASSES, clients * EXAMPLES).astype(np.int32)
    return fl.FederatedData.from_assignment({"x": x, "y": y}, np.repeat(np.arange(clients), EXAMPLES))


def stateful() -> fl.Round:
    """FedAvg whose clients keep a momentum of their own between their rounds."""
    model = fl.models.logistic_regression(CLASSES, input_shape=(FEATURES,))
    return fedavg(model, optax.sgd(0.01, momentum=0.9), batch_size=10, keep_optimizer_state=True)


def set_up(clients: int, size: int):
    """The process and its first state, and the seconds that took from data in memory."""
    data = many_clients(clients)
    arrays = {name: np.asarray(leaf) for name, leaf in data.arrays.items()}
    owners = np.repeat(np.arange(clients), EXAMPLES)
    start = time.perf_counter()
    process = engine.process(stateful(), fl.FederatedData.from_assignment(arrays, owners), fl.uniform(size))
    state = jax.block_until_ready(process.init(jax.random.key(0)))
    return process, state, time.perf_counter() - start


def population(quick: bool) -> list[pairs.Measured]:
    """A round of a run and the set-up of a cohort with per-client state, against the same in 10,000 clients.

    Rounds are timed as ``fl.run`` makes them, several in one dispatch that takes its state over. A step that is called
    by itself leaves its argument as it was: it copies all clients' states.
    """
    size = 100 if quick else 1000
    base, out = 10_000, []
    few, few_state, _ = set_up(base, size)
    theirs = engine.dispatches(few, few_state, TOGETHER)
    for clients in (100_000,) if quick else (100_000, 1_000_000):
        took = [pairs.alternating(run, lambda side, n=clients: set_up((n, base)[side], size)[2]) for run in range(3)]
        process, state, _ = set_up(clients, size)
        ours = engine.dispatches(process, state, TOGETHER)
        times = pairs.scaled(pairs.paired(ours, theirs, 3 if quick else 15), 1e3 / TOGETHER)
        name = f"{clients:,} clients"
        out.append(pairs.show(pairs.summary(name, size, f"{base:,} clients", times, "ms per round")))
        out.append(pairs.show(pairs.summary(name, size, f"{base:,} clients", took, "s to set up")))
    return out


# ---- model ----


def wide(width: int) -> Workload:
    """A perceptron with two hidden layers of ``width`` on W1's features; 50 clients of 100 examples, 1 epoch."""
    arithmetic = 60 * width + width**2 + 10 * width
    return W1._replace(
        name=f"mlp {width}",
        sizes=lambda rng: np.full(50, 100),
        model=lambda: fl.models.mlp(10, hidden=(width, width), input_shape=(60,)),
        mean_loss=handwritten.mlp,
        epochs=1,
        cohorts=(10,),
        gigaflop=2 * 3 * arithmetic * W1.batch_size / 1e9,
        made=(__name__, "wide", width),
    )


def width(quick: bool) -> list[pairs.Measured]:
    """Models from narrow to wide, each against a hand-written loop of as many steps on it."""
    out = []
    for units in (32, 128) if quick else (16, 64, 256, 1024):
        work = wide(units)
        data = work.data()
        limit.check_same_steps(work, data)
        times = limit.measure(work, data, 10, runs=3 if quick else 9, draws=1)
        out.append(pairs.show(pairs.summary(work.name, 10, "lax.scan", times, "us per step")))
    return out


# ---- seeds ----


def seeds(quick: bool, work: Workload = W1) -> list[pairs.Measured]:
    """Eight runs that differ in their seed, as one program, against a single run; with and without compiling.

    Each side has a process of its own. First as anybody calls them, where a CPU is one device; then with its cores as
    devices, which share out the cells of a sweep, and the clients of a single run's cohorts. A run's first dispatch
    compiles and isn't in its ``seconds``, and a sweep has its own fixed costs; the difference between a long and a
    short run leaves the rounds.
    """
    short, long, out = (25, 75, []) if quick else (200, 600, [])
    for devices in (1, None):
        label = f"{work.name}, 8 seeds" + ("" if devices else ", cores as devices")
        given = {"place": work.place, "every": short, "devices": devices}
        one, many = (functools.partial(fresh.server, __name__, f.__name__, given, (fl.devices.THREADS,)) for f in SIDES)
        timed: list[tuple[pairs.Pair, ...]] = []
        with many() as ours, one() as theirs:
            for run in range(1 if quick else 5):
                found = {}

                def measure(side: int, found=found, asked=(ours, theirs)) -> float:
                    found[side] = [asked[side](rounds) for rounds in (short, long)]
                    return 0.0

                load = pairs.alternating(run, measure).load
                of = lambda time, found=found, load=load: pairs.Pair(time(*found[0]), time(*found[1]), load)
                timed.append((of(lambda a, b: b[0] - a[0]), of(lambda a, b: sum(a)), of(lambda a, b: sum(b))))
        units = (f"s/{long - short} rounds", f"s for {short}", f"s for {long}")
        for unit, times in zip(units, zip(*timed, strict=True), strict=True):
            out.append(pairs.show(pairs.summary(label, 10, "1 run", list(times), unit)))
    return out


def single_run(place: Sequence[Any], every: int, devices: int | None) -> Callable[[int], list[float]]:
    """``rounds -> [seconds, seconds of compiling]`` of a run, in a process of its own."""
    work, data = _placed(place, devices)

    def measure(rounds: int) -> list[float]:
        process = engine.process(work.algorithm(), data, fl.uniform(10))
        result = fl.run(process, int(rounds), every=every, progress=False)
        return [result.seconds, result.compile_seconds]

    return measure


def eight_seeds(place: Sequence[Any], every: int, devices: int | None) -> Callable[[int], list[float]]:
    """The same of a sweep."""
    work, data = _placed(place, devices)

    def measure(rounds: int) -> list[float]:
        make = lambda: fl.synchronous(work.algorithm(), data, fl.uniform(10))
        result = fl.sweep(make, int(rounds), range(8), every=every, progress=False)
        return [result.seconds, result.compile_seconds]

    return measure


SIDES = (single_run, eight_seeds)


def _placed(place: Sequence[Any], devices: int | None) -> tuple[Workload, fl.FederatedData]:
    if devices is None:
        engine.use_all_cores()
    work = found(*place)
    return work, work.data()


PARTS = {"cohort": cohort, "population": population, "width": width, "seeds": seeds}
OF_WORKLOADS = ("cohort", "seeds")  # the others have data and models of their own


def main(
    parts: str = "cohort,population,width,seeds",
    workloads: str = "w1",
    quick: bool = False,
    json: pathlib.Path | None = None,
) -> None:
    """Time rounds as the cohort, the population, the model and the number of seeds grow.

    Args:
      parts: which of them, separated by commas.
      workloads: which of w1, w2, w3 and w4, separated by commas: for the cohort and the seeds.
      quick: fewer sizes and pairs of timings.
      json: a file to write the figures to; a picture and all timings go beside it.
    """
    words = [word.strip() for word in parts.split(",") if word.strip()]
    for word in words:
        if word not in PARTS:
            near = fl.checks.nearest(word, PARTS)
            raise UnknownPart(f"growth has no part {word!r}{near} (there are: {', '.join(PARTS)})")
    works = chosen(workloads)
    engine.use_all_cores()
    pairs.begin(json)
    of = lambda word: [(quick, work) for work in works] if word in OF_WORKLOADS else [(quick,)]
    results = [measured for word in words for given in of(word) for measured in PARTS[word](*given)]
    if json is not None and results:
        pairs.write(results, json, "What a round costs as things grow")
