"""Callbacks of :func:`fedjax_lab.run`: called at its logging points, and able to end it.

A callback is any ``callback(info: Info)``. What it returns, if it is true, ends the run; a string is
kept as the reason (``Result.stopped``). If it has an attribute ``close``, that is called when the run ends.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_lab import checks
from fedjax_lab.evaluation import worse_when_higher
from fedjax_lab.process import Process
from fedjax_lab.records import Record, check_name

Callback = Callable[["Info"], Any]


class Info(NamedTuple):
    """What a callback is told.

    Attributes:
      round: rounds done.
      metrics: the record of the last of them.
      records: the records of all rounds, from the first.
      state: the process's state. The run reuses its memory: copy what should outlive the call.
      process: the process.
      begun: rounds that were done when this session of the run began (0 unless it was resumed).
    """

    round: int
    metrics: Record
    records: Sequence[Record]
    state: Any
    process: Process
    begun: int


def lower_is_better(name: str) -> bool:
    """Whether a metric's name says that less is better (:func:`fedjax_lab.evaluation.worse_when_higher`)."""
    return worse_when_higher(name)


def stop_at(name: str, target: float, below: bool | None = None) -> Callback:
    """End the run at the first logging point where a metric has reached a target.

    Args:
      name: of the metric.
      target: to reach or pass.
      below: whether lower is better; by default so for losses, errors and perplexities.

    Raises:
      ValueError: a name that is no text, a target that is no finite number; at the first logging point, if no record
        has such a metric.
    """
    _check_name(name)
    checks.finite(target, "target")
    lower = lower_is_better(name) if below is None else below

    def callback(info: Info) -> str | None:
        if name not in info.metrics:
            _known(name, info)
            return None
        value = info.metrics[name]
        # In the metrics' own precision: 0.7 in float32 is a little less than 0.7.
        gain = np.float32(target) - np.float32(value) if lower else np.float32(value) - np.float32(target)
        if gain >= 0:
            return f"{name} reached {target:g} in round {info.round} ({value:.6g})"
        return None

    return callback


def stop_without_progress(name: str, patience: int, least: float = 0.0, below: bool | None = None) -> Callback:
    """End the run when a metric hasn't improved for a number of rounds.

    Args:
      name: of the metric.
      patience: rounds to wait since the best value.
      least: how much better counts as better.
      below: whether lower is better; by default so for losses, errors and perplexities.
    """
    _check_name(name)
    checks.positive(patience, "patience", integer=True)
    checks.not_negative(least, "least")
    lower = lower_is_better(name) if below is None else below

    def callback(info: Info) -> str | None:
        _known(name, info)
        best, since = None, info.round
        for record in info.records:
            value = record.get(name)
            if value is None:
                continue
            gain = None if best is None else (best - value if lower else value - best)
            if gain is None or gain > least:
                best, since = value, record["round"]
        if info.round - since >= patience:
            return f"{name} has not improved since round {since} ({best:.6g})"
        return None

    return callback


def tensorboard(folder: str | os.PathLike) -> Callback:
    """Write every round's numbers for TensorBoard (``tensorboard --logdir folder``).

    A resumed run goes on in the same folder; what an interrupted session wrote behind the checkpoint
    is superseded.
    """
    module = checks.optional("tensorboardX", "writing for TensorBoard", "tensorboard")
    writer: Any = None
    written = -1

    def callback(info: Info) -> None:
        nonlocal writer, written
        if writer is None:
            written = info.begun if info.begun else -1
            # Files are named by the second; the suffix keeps quick sessions apart.
            suffix = f".from{info.begun}"
            writer = module.SummaryWriter(os.fspath(folder), purge_step=written + 1, filename_suffix=suffix)
        for record in info.records:
            if record["round"] <= written:
                continue
            for name, value in record.items():
                if name != "round" and isinstance(value, int | float):
                    writer.add_scalar(name, value, record["round"])
        written = info.round
        writer.flush()

    def close() -> None:
        nonlocal writer
        if writer is not None:
            writer.close()
            writer = None

    callback.close = close
    return callback


def _check_name(name: str) -> None:
    if not isinstance(name, str):
        raise ValueError(f"the name of a metric comes first, such as 'accuracy'; got {checks.shown(name)}")


def _known(name: str, info: Info) -> None:
    """Refuse a metric that no record has, once there is a round that somebody survived."""
    if info.round and info.metrics.get("survivors", 1):
        check_name(name, info.records)
