"""Live progress of a run: one bar on a terminal or in a notebook, occasional lines elsewhere."""

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Update = Callable[[int, str], None]
LINE_SECONDS = 10.0


def headline(record: dict[str, Any], evaluation: dict[str, Any], limit: int = 4) -> str:
    """The numbers worth a line: the loss or the first metric, then the evaluation's first ones."""
    numbers = {n: v for n, v in record.items() if isinstance(v, int | float) and n != "round"}
    first = [n for n in ("loss", "train_loss") if n in numbers and n not in evaluation]
    measured = [n for n in numbers if n not in evaluation and isinstance(numbers[n], float)]
    names = dict.fromkeys([*(first or measured)[:1], *evaluation])
    numbers |= evaluation
    return "  ".join(f"{name} {numbers[name]:.4g}" for name in list(names)[:limit])


@contextlib.contextmanager
def progress(num_rounds: int, done: int, show: bool | None) -> Iterator[Update]:
    """Show a run's progress.

    Args:
      num_rounds: rounds in all.
      done: rounds done before (resuming).
      show: True: a live bar, or plain lines at most every ten seconds where there is no terminal;
        False: nothing; None: a live bar, or nothing where there is no terminal.

    Yields:
      ``update(rounds done, text)``.
    """
    from rich.console import Console

    console = Console(stderr=True)
    notebook = console.is_jupyter
    widgets = not notebook or importlib.util.find_spec("ipywidgets") is not None
    if show is False or num_rounds == done:
        yield lambda round, text: None
    elif (notebook and widgets) or console.is_terminal:
        with _bar(console, num_rounds, done) as update:
            yield update
    elif show or notebook:
        yield _lines(num_rounds)
    else:
        yield lambda round, text: None


@contextlib.contextmanager
def _bar(console: Any, num_rounds: int, done: int) -> Iterator[Update]:
    from rich import progress as rich_progress
    from rich.markup import escape

    columns = (
        rich_progress.TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
        rich_progress.BarColumn(bar_width=24),
        rich_progress.TextColumn("{task.fields[text]}"),
        rich_progress.TextColumn("{task.fields[rate]}"),
        rich_progress.TimeRemainingColumn(),
    )
    bar = rich_progress.Progress(*columns, console=console, refresh_per_second=5)
    with bar:
        task = bar.add_task("", total=num_rounds, completed=done, text="compiling", rate="")
        speed = _speed()

        def update(round: int, text: str) -> None:
            bar.update(task, completed=round, text=escape(text), rate=speed(round))

        yield update


def _lines(num_rounds: int) -> Update:
    speed = _speed()
    last = time.monotonic()

    def update(round: int, text: str) -> None:
        nonlocal last
        rate = speed(round)
        if round == num_rounds or time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            print(f"round {round}/{num_rounds}  {text}  {rate}", file=sys.stderr, flush=True)

    return update


def _speed() -> Callable[[int], str]:
    """Rounds a second since the first report, which came after compiling."""
    first: tuple[int, float] | None = None

    def speed(round: int) -> str:
        nonlocal first
        now = time.monotonic()
        if first is None or round <= first[0]:
            first = (round, now)
            return ""
        return f"{(round - first[0]) / max(now - first[1], 1e-9):,.1f} rounds/s"

    return speed
