"""run: drive a process for many rounds; the only loop that touches the host."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from fedjax_lab import checks, hosts, run_folder, shared_folder
from fedjax_lab.callbacks import Callback
from fedjax_lab.process import HostStep, Process
from fedjax_lab.progress import progress as show_progress
from fedjax_lab.result import Result
from fedjax_lab.session import Clock, Session, run_rounds
from fedjax_lab.state_leaves import own_copy

PyTree = Any


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the rounds under way were finished and saved; ``result`` holds what there is."""

    def __init__(self, message: str, result: Result):
        super().__init__(message)
        self.result = result


def run(
    process: Process,
    num_rounds: int,
    seed: int = 0,
    params: PyTree = None,
    evaluate: Callable[[Process, PyTree], dict[str, Any]] | None = None,
    every: int = 1,
    out: str | os.PathLike | None = None,
    resume: bool | str = True,
    callbacks: Sequence[Callback] = (),
    *,
    config: dict[str, Any] | None = None,
    progress: bool | None = None,
    checkpoint_every: float = 30.0,
) -> Result:
    """Run a process for a number of rounds.

    Logging points are the rounds divisible by ``every``, and the last. There the run evaluates, calls
    callbacks, writes metrics and, now and then, a checkpoint. Metrics are kept for every round.

    Args:
      process: what to run, for instance from :func:`fedjax_lab.synchronous`.
      num_rounds: rounds in all, those of a resumed run included.
      seed: of everything random.
      params: parameters to start from instead of the model's own initialisation.
      evaluate: ``(process, state) -> {name: number}``, called before the first round and at logging
        points. Where a name is also one of the rounds' metrics, these are recorded as ``train_...``.
        The state's memory is reused afterwards: copy what should be kept of it.
      every: rounds between logging points, run in one dispatch.
      out: a folder for ``metrics.jsonl`` and ``checkpoints/``; a run that is called again with the
        same folder goes on where it was, bit for bit.
      resume: False refuses a folder that already holds a run. ``"anyway"`` goes on in it although
        its configuration, data or program are others.
      callbacks: see :mod:`fedjax_lab.callbacks`.
      config: plain settings to keep in ``config.json`` and to compare on resuming; leave out what may
        change, such as the number of rounds.
      progress: True, False, or None for a live bar on terminals and in notebooks only.
      checkpoint_every: seconds between checkpoints, which are written at logging points. The first
        logging point, the end and Ctrl-C write one in any case.

    Returns:
      A :class:`fedjax_lab.result.Result`. A run that was finished before returns its result without
      training.

    Raises:
      ValueError: bad arguments; a folder that holds another configuration, a checkpoint of other code,
        or no intact one. Nothing is lost in any of these.
      Interrupted: Ctrl-C, after the rounds under way were finished and saved (a second one stops at
        once). It is a KeyboardInterrupt with a ``result``.
    """
    num_rounds, every = checks.integer(num_rounds, "num_rounds", 0), checks.integer(every, "every", 1)
    seed = checks.integer(seed, "seed", 0)
    _check(process, evaluate, resume, checkpoint_every, params)
    callbacks = _callbacks(callbacks)
    if out == "":
        raise ValueError("out is an empty string: name a folder, or leave it out to keep nothing")
    folder, config = None if out is None else Path(out), run_folder.plain_config(config)
    settings = {"num_rounds": num_rounds, "every": every, "seed": seed, "out": str(out), "config": config}
    hosts.agree(settings | {"callbacks": len(callbacks), "an evaluation": evaluate is not None})
    if folder is not None and hosts.leads():
        run_folder.prepare(folder, resume, config)
    clock = Clock()
    with contextlib.ExitStack() as stack:
        disk, start = _begin(stack, process, seed, params, folder, config, resume, every, checkpoint_every)
        if start.done > num_rounds:
            raise ValueError(
                f"{folder} holds a run of {start.done} rounds already, more than num_rounds={num_rounds}: "
                "ask for at least as many, or use another folder (out=...)"
            )
        clock.compiling = clock.elapsed()
        if not hosts.leads():  # they write, and what they answer is asked of the leading process
            callbacks = (lambda info: None,) * len(callbacks)
        for callback in callbacks:
            stack.callback(getattr(callback, "close", lambda: None))
        interrupted = hosts.decided(stack.enter_context(_interruptible()))
        shown = progress if hosts.leads() else False
        update = stack.enter_context(show_progress(num_rounds, start.done, shown))
        stack.enter_context(hosts.lost_ones_named(folder))
        session = Session(process, start, disk, clock)
        stopped = run_rounds(session, num_rounds, every, evaluate, callbacks, interrupted, update)
        result = session.result(stopped)
        if interrupted():
            saved = f"saved in {folder}: make the same call to go on" if folder else "not saved (no out=...)"
            message = f"interrupted after {result.rounds} of {num_rounds} rounds, {saved}"
    if interrupted():
        print(message, file=sys.stderr, flush=True)
        raise Interrupted(message, result)
    return result


def _begin(
    stack: contextlib.ExitStack,
    process: Process,
    seed: int,
    params: PyTree,
    folder: Path | None,
    config: dict[str, Any] | None,
    resume: bool | str,
    every: int,
    checkpoint_every: float,
) -> tuple[run_folder.Disk, run_folder.Start]:
    """Where a run begins, and the folder it writes to, which stays locked until ``stack`` closes."""
    state = process.init(jax.random.key(seed), params)
    state = state if isinstance(process.step, HostStep) else own_copy(state)
    if folder is None:
        return run_folder.NO_FOLDER, run_folder.Start(state)
    setup = {"setup": run_folder.setup(process, seed, params), "config": config}
    return shared_folder.open_folder(stack, folder, process, state, setup, resume, every, checkpoint_every)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Make the first Ctrl-C a question, asked by the value yielded; the second is as ever."""
    asked = False

    def handler(number, frame):
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print("finishing the rounds under way; press Ctrl-C again to stop at once", file=sys.stderr)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False  # somebody else decides what Ctrl-C does
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _callbacks(callbacks: Any) -> tuple[Callback, ...]:
    every = (callbacks,) if callable(callbacks) else callbacks
    every = tuple(every if isinstance(every, Iterable) else (every,))
    for callback in every:
        if not callable(callback):
            raise ValueError(f"a callback must be a function of one Info; got {callback!r}")
    return every


def _check(process: Any, evaluate: Any, resume: Any, checkpoint_every: Any, params: Any) -> None:
    if not callable(getattr(process, "step", None)):
        raise ValueError(
            f"run takes a Process, such as fl.synchronous(round, data) makes; got {type(process).__name__}"
        )
    if evaluate is not None and not callable(evaluate):
        raise ValueError(f"evaluate must be a function of (process, state); got {evaluate!r}")
    if resume not in (True, False, "anyway"):
        raise ValueError(f"resume must be True, False or 'anyway'; got {resume!r}")
    checks.not_negative(checkpoint_every, "checkpoint_every")
    for name, leaf in checks.named_leaves(params):
        if checks.not_finite(leaf):
            raise ValueError(f"params leaf {name} is NaN or infinite in places: nothing could be trained from it")
