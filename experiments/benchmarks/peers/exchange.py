"""What both sides of a comparison are given and give back, as files: a task, and an outcome.

A task is one ``.npz`` file, and nothing in it needs unpickling:

- ``x: [rows, ...]``, ``y: [rows, ...]``, ``starts, sizes: int[clients]``: client ``k`` owns the rows
  ``starts[k] : starts[k] + sizes[k]``;
- ``cohorts: int[rounds, cohort]``, the clients of every round;
- ``params/NAME``: the initial parameters, ``NAME`` as in ``conv_0/kernel``. Dense kernels are ``[in, out]``,
  convolutions' ``[height, width, in, out]``, images ``[height, width, channels]``; gates of an LSTM lie in the
  order input, forget, cell, output and have one bias;
- ``task``: JSON with ``model`` (``linear``, ``cnn``, ``lstm``), ``learning_rate``, ``batch_size``, ``epochs``.

An outcome is ``NAME.npz`` with the parameters after the last round under the same names, and ``NAME.json`` with
``seconds``, the time of each round, and ``versions``, what ran.
"""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

import fedjax_lab as fl
from experiments.benchmarks.workloads import Workload

PyTree = Any


class Task(NamedTuple):
    """The work of some rounds, as read back from its file."""

    arrays: dict[str, np.ndarray]
    starts: np.ndarray
    sizes: np.ndarray
    cohorts: np.ndarray
    params: dict[str, np.ndarray]


class Outcome(NamedTuple):
    """What a side reached: seconds of each round, the parameters by name, versions of what ran."""

    seconds: list[float]
    params: dict[str, np.ndarray]
    versions: dict[str, str]


def named(tree: PyTree) -> dict[str, np.ndarray]:
    """Nested dicts of arrays as one dict: ``{"conv_0/kernel": ...}``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in leaves}


def nested(params: dict[str, np.ndarray]) -> PyTree:
    """The inverse of :func:`named`."""
    tree: dict[str, Any] = {}
    for name, value in params.items():
        *path, last = name.split("/")
        inner = tree
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return tree


def write_task(file: pathlib.Path, work: Workload, data: fl.FederatedData, cohorts: np.ndarray) -> None:
    """The task of training ``work`` on the given cohorts; clients that never take part are left out."""
    used, where = np.unique(cohorts, return_inverse=True)
    starts, sizes = np.asarray(data.starts)[used], np.asarray(data.sizes)[used]
    rows = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, sizes, strict=True)])
    settings = {
        "model": work.peer_model,
        "learning_rate": work.learning_rate,
        "batch_size": work.batch_size,
        "epochs": work.epochs,
    }
    stored: dict[str, Any] = {
        "x": np.asarray(data.arrays["x"])[rows],
        "y": np.asarray(data.arrays["y"])[rows],
        "starts": np.cumsum(sizes) - sizes,
        "sizes": sizes,
        "cohorts": where.reshape(np.shape(cohorts)),
        "task": np.array(json.dumps(settings)),
        **{f"params/{name}": value for name, value in named(work.params()).items()},
    }
    np.savez(file, **stored)


def read_task(file: pathlib.Path) -> Task:
    """What :func:`write_task` wrote; nothing is unpickled."""
    with np.load(file, allow_pickle=False) as stored:
        params = {n.removeprefix("params/"): stored[n] for n in stored.files if n.startswith("params/")}
        arrays = {"x": stored["x"], "y": stored["y"]}
        return Task(arrays, stored["starts"], stored["sizes"], stored["cohorts"], params)


def write_outcome(file: pathlib.Path, outcome: Outcome) -> None:
    """``file`` without a suffix; both files of an outcome."""
    stored: dict[str, Any] = dict(outcome.params)
    np.savez(file.with_suffix(".npz"), **stored)
    file.with_suffix(".json").write_text(json.dumps({"seconds": outcome.seconds, "versions": outcome.versions}))


def read_outcome(file: pathlib.Path) -> Outcome:
    """What a runner wrote under ``file``, a name without a suffix."""
    said = json.loads(file.with_suffix(".json").read_text())
    with np.load(file.with_suffix(".npz"), allow_pickle=False) as stored:
        return Outcome(said["seconds"], {name: stored[name] for name in stored.files}, said["versions"])


# ---- do both sides compute the same? ----


class Mismatch(RuntimeError):
    """The two sides don't compute the same, so that no time means anything."""


def alike(work: Workload, clients: int, seed: int = 0) -> fl.FederatedData:
    """A small population in which the order of examples can't matter: each client repeats one example.

    Sizes are one to three batches, so that a wrong number of steps, or a wrong weight of a client in the
    average, shows. Clients differ in their example.
    """
    rng = np.random.default_rng(seed)
    source = work.make_data(np.full(clients, 1))
    sizes = work.batch_size * (1 + rng.permutation(clients) % 3)
    repeated = {name: np.repeat(np.asarray(leaf), sizes, axis=0) for name, leaf in source.arrays.items()}
    return fl.FederatedData.from_assignment(repeated, np.repeat(np.arange(clients), sizes))


def check_equal(name: str, start: dict, ours: dict, theirs: dict, tolerance: float = 2e-3) -> float:
    """Both must have moved from ``start`` to the same place.

    Returns:
      The distance between the two, as a share of the way.

    Raises:
      Mismatch: other parameters, or a larger distance than ``tolerance``, or no way at all.
    """
    if set(ours) != set(theirs) or any(ours[n].shape != theirs[n].shape for n in ours):
        shapes = [{n: v.shape for n, v in side.items()} for side in (ours, theirs)]
        raise Mismatch(f"{name}: the sides have other parameters: {shapes[0]} and {shapes[1]}")
    norm = lambda a, b: float(np.sqrt(sum(np.sum((a[n].astype(np.float64) - b[n]) ** 2) for n in a)))
    way, apart = norm(ours, start), norm(ours, theirs)
    if not way > 0 or not apart <= tolerance * way:
        raise Mismatch(
            f"{name}: after the same rounds the parameters are {apart:.2e} apart, having moved by {way:.2e} "
            f"(at most {tolerance:g} of that is allowed); nothing was timed"
        )
    return apart / way


def check_losses(name: str, work: Workload, task: Task, ours: dict, theirs: dict, tolerance: float = 0.5) -> None:
    """On the timed data, whose order is each side's own, both must have lowered the loss by about as much.

    After so few rounds, an order decides over a third of the fall (EMNIST CNN, two rounds of two clients); that the
    work is the same is for :func:`check_equal` to show.

    Raises:
      Mismatch: a loss that didn't fall, or falls that differ by more than the share ``tolerance``.
    """
    start, one, other = (_loss(work, task, params) for params in (task.params, ours, theirs))
    falls = start - one, start - other
    if not min(falls) > 0 or not abs(falls[0] - falls[1]) <= tolerance * max(falls):
        raise Mismatch(f"{name}: the loss fell from {start:.4f} to {one:.4f} on our side, to {other:.4f} on theirs")


def _loss(work: Workload, task: Task, params: dict[str, np.ndarray], examples: int = 256) -> float:
    """The mean loss on some examples spread over all rows."""
    rows = np.unique(np.linspace(0, len(task.arrays["x"]) - 1, examples).astype(int))
    loss = jax.jit(work.mean_loss)
    return float(loss(nested(params), task.arrays["x"][rows], task.arrays["y"][rows]))
