"""``peers``: the same rounds by other frameworks, each in an environment and a process of its own.

Before anything is timed, both sides train a population in which the order of examples can't matter, and
must reach the same parameters. Then processes run in turns, ours and the peer's; each runs one round to
compile and warm up, and times the next ones.
"""

import functools
import json as json_format
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

import fedjax_lab as fl
from experiments.benchmarks import engine, pairs
from experiments.benchmarks.peers import exchange
from experiments.benchmarks.peers.environments import PEERS, Peer, Unavailable, default_folder, environment
from experiments.benchmarks.workloads import Workload, chosen

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]


class UnknownPeer(ValueError):
    """A name that isn't a peer."""


class Failed(RuntimeError):
    """A side's process ended badly; the end of what it said."""


def chosen_peers(names: str) -> list[Peer]:
    """The peers of a comma-separated list. Raises UnknownPeer."""
    words = [word.strip() for word in names.split(",") if word.strip()]
    for word in words:
        if word not in PEERS:
            raise UnknownPeer(f"no peer {word!r}{fl.checks.nearest(word, PEERS)} (there are: {', '.join(PEERS)})")
    if not words:
        raise UnknownPeer(f"name at least one peer: {', '.join(PEERS)}")
    return [PEERS[word] for word in words]


# ---- one side, one process ----


def run_ours(task: pathlib.Path, outcome: pathlib.Path, work: Workload) -> exchange.Outcome:
    """A task by ``fl.synchronous``, in a fresh process."""
    command = [sys.executable, "-m", "experiments.benchmarks.peers.ours", str(task), str(outcome), work.name]
    return _outcome("ours", command, outcome, dict(os.environ), ROOT)


def run_peer(
    peer: Peer, python: pathlib.Path, task: pathlib.Path, outcome: pathlib.Path, options: dict[str, Any]
) -> exchange.Outcome:
    """A task by the peer, in a fresh process of its environment, which sees nothing of ours."""
    command = [str(python), str(HERE / peer.runner), str(task), str(outcome), json_format.dumps(options)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JAX_", "XLA_"))}
    return _outcome(peer.name, command, outcome, {**kept, **peer.environment}, task.parent)


def _outcome(name: str, command: list[str], outcome: pathlib.Path, environ: dict, folder: pathlib.Path):
    for suffix in (".npz", ".json"):
        outcome.with_suffix(suffix).unlink(missing_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=folder)
    if done.returncode or not outcome.with_suffix(".json").is_file():
        said = (done.stderr or done.stdout).strip().splitlines()[-15:]
        raise Failed("\n  ".join([f"{name}'s process ended with status {done.returncode}:", *said]))
    return exchange.read_outcome(outcome)


# ---- a comparison ----


def per_step(work: Workload, task: exchange.Task, outcome: exchange.Outcome) -> float:
    """The median over the rounds but the first of a round's microseconds per SGD step."""
    rounds = zip(outcome.seconds[1:], task.cohorts[1:], strict=True)
    return statistics.median(1e6 * s / work.steps(task.sizes[cohort]) for s, cohort in rounds)


def check_peer(peer: Peer, python: pathlib.Path, work: Workload, folder: pathlib.Path) -> None:
    """Both sides must reach the same parameters where the order of examples can't matter; one line says so.

    Raises:
      Mismatch: they don't.
      Failed: a side's process ended badly.
    """
    task = folder / "check.npz"
    exchange.write_task(task, work, exchange.alike(work, 5), np.array([[0, 1, 2], [4, 3, 1]]))
    ours = run_ours(task, folder / "ours", work)
    start = exchange.read_task(task).params
    for setting, options in peer.settings.items():
        theirs = run_peer(peer, python, task, folder / peer.name, options)
        name = f"{work.name} against {peer.name} ({setting})"
        apart = exchange.check_equal(name, start, ours.params, theirs.params)
        print(f"{name}: the same parameters within {apart:.1e} of the way, {_versions(theirs)}", flush=True)


def _versions(outcome: exchange.Outcome) -> str:
    return ", ".join(f"{name} {number}" for name, number in outcome.versions.items())


def compare(
    peer: Peer, python: pathlib.Path, work: Workload, cohorts: np.ndarray, runs: int, folder: pathlib.Path
) -> pairs.Measured:
    """Our time per step against that of the peer's best setting, over ``runs`` pairs of processes."""
    file = folder / "timed.npz"
    exchange.write_task(file, work, work.data(whole_batches=True), cohorts)
    task = exchange.read_task(file)
    first = {s: run_peer(peer, python, file, folder / peer.name, peer.settings[s]) for s in peer.settings}
    best = min(first, key=lambda s: per_step(work, task, first[s]))
    shown = ", ".join(f"{s}: {per_step(work, task, o):.4g} us" for s, o in first.items())
    print(f"{work.name} by {peer.name}, {shown}; first round {first[best].seconds[0]:.1f} s", flush=True)
    name = f"{work.name} against {peer.name} ({best})"

    def measure(side: int, last: dict) -> float:
        last[side] = (
            run_peer(peer, python, file, folder / peer.name, peer.settings[best])
            if side
            else run_ours(file, folder / "ours", work)
        )
        return per_step(work, task, last[side])

    out = []
    for run in range(runs):
        last: dict[int, exchange.Outcome] = {}
        out.append(pairs.alternating(run, functools.partial(measure, last=last)))
        exchange.check_losses(name, work, task, last[0].params, last[1].params)
    return pairs.summary(work.name, cohorts.shape[1], f"{peer.name} ({best})", out, "us per step")


def drawn_cohorts(work: Workload, cohort: int, rounds: int) -> np.ndarray:
    """Cohorts at random, ``int[rounds, cohort]``; clients are distinct in each."""
    rng = np.random.default_rng(0)
    population = len(work.sizes(np.random.default_rng(1)))
    return np.stack([rng.choice(population, cohort, replace=False) for _ in range(rounds)])


def main(
    workloads: str = "w1,w2,w3,w4",
    quick: bool = False,
    json: pathlib.Path | None = None,
    peers: str = "fedjax,pfl,flower",
    cohort: int | None = None,
    cache: pathlib.Path | None = None,
    python: str = sys.executable,
) -> int:
    """Time the same rounds by other frameworks, after checking that the results are the same.

    Args:
      workloads: which ones, separated by commas.
      quick: one pair of processes and one timed round, instead of five and three.
      json: a file to write the figures to; a picture and all timings go beside it.
      peers: which ones, separated by commas.
      cohort: clients a round, instead of the workload's own.
      cache: the folder of the environments; ``$FEDJAX_LAB_CACHE/peers`` or ``~/.cache/fedjax_lab/peers`` by default.
      python: the interpreter that new environments are made with.
    """
    works, wanted = chosen(workloads), chosen_peers(peers)
    runs, rounds = (1, 2) if quick else (5, 4)
    results, wrong = [], []
    pythons = {}
    for peer in wanted:
        try:
            pythons[peer.name] = environment(peer, cache or default_folder(), python)
        except Unavailable as error:
            print(error, flush=True)
    engine.use_all_cores()
    pairs.begin(json)
    for work in works:
        for peer in (p for p in wanted if p.name in pythons):
            with tempfile.TemporaryDirectory(prefix="fedjax_lab_peers_") as folder:
                place = pathlib.Path(folder)
                try:
                    check_peer(peer, pythons[peer.name], work, place)
                    for size in work.cohorts if cohort is None else (cohort,):
                        cohorts = drawn_cohorts(work, size, rounds)
                        measured = compare(peer, pythons[peer.name], work, cohorts, runs, place)
                        results.append(pairs.show(measured))
                except (exchange.Mismatch, Failed) as error:
                    wrong.append(str(error))
                    print(f"error: {error}", file=sys.stderr, flush=True)
    if json is not None and results:
        pairs.write(results, json, "A round of FedAvg against other frameworks")
    return 1 if wrong else 0
