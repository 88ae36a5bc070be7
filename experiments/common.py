"""What experiments share: their folder, the runs they consist of, tables, checks, and the report."""

import concurrent.futures
import dataclasses
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

import fedjax_lab as fl
from fedjax_lab import devices, hosts, run_folder

# Where data lie is no part of what an experiment computes.
_NOT_COMPARED = ("data_dir",)

# (the run's folder, a callback that ends it when the experiment is interrupted) -> what it came to
Training = Callable[[Path, Callable], fl.Result]


class Table(NamedTuple):
    """A table of strings, for the terminal and for the report."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines)

    def show(self, title: str = "", left: int = 1) -> None:
        """Print it, its first ``left`` columns flush left and the others, numbers, flush right."""
        from rich import box
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for i, name in enumerate(self.columns):
            table.add_column(escape(name), justify="left" if i < left else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*(escape(str(cell)) for cell in row))
        console = Console()
        console = console if console.is_terminal else Console(width=140)
        console.print(table)


class Check(NamedTuple):
    """A published figure and ours.

    Attributes:
      name: what is compared.
      paper: the published figure, or range, or statement.
      ours: numbers of this run, comparable with it.
      tolerance: when ours counts as the same.
      ok: whether it does; ``None`` if it was not evaluated, for the reason given.
      source: where the figure stands.
      reason: why it was skipped.
    """

    name: str
    paper: Any
    ours: Any
    tolerance: str
    ok: bool | None
    source: str
    reason: str = ""


def check_table(checks: Sequence[Check]) -> Table:
    """Checks for people."""
    words = {True: "ok", False: "NOT OK", None: "skipped"}
    rows = [(c.name, _short(c.paper), _short(c.ours), c.tolerance, words[c.ok] + (f": {c.reason}" if c.reason else ""))
            for c in checks]  # fmt: skip
    return Table(("check", "paper", "ours", "tolerance", "result"), rows)


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return " ".join(_short(v) for v in value)
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def summary(results: Sequence[Mapping[str, Any]], checks: Sequence[Check] = (), **more: Any) -> dict[str, Any]:
    """What ``summary.json`` holds.

    Args:
      results: one dict of plain values for each run.
      checks: those that were evaluated are listed under ``checks``, with their six fields; the others
        under ``skipped``, with the reason.
      more: further entries.
    """
    fields = Check._fields[:6]
    done = [{f: getattr(c, f) for f in fields} for c in checks if c.ok is not None]
    skip = [{f: getattr(c, f) for f in (*fields, "reason") if f not in ("ours", "ok")} for c in checks if c.ok is None]
    return {"results": [dict(r) for r in results], **more, "checks": done, "skipped": skip}


def open_folder(out: Path, name: str, config: Any) -> Path:
    """Make an experiment's folder, or go on in it. Writes ``config.json``.

    Raises:
      ValueError: it holds another experiment, other settings (the first that differs is named), or files
        of something else.
    """
    if not hosts.leads():
        return out
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise ValueError(f"{out} holds other files and no experiment; give a new folder (--out)")
    settings = {n: v for n, v in dataclasses.asdict(config).items() if n not in _NOT_COMPARED}
    run_folder.prepare(out, True, run_folder.plain_config({"experiment": name, **settings}))
    return out


def run_all(
    trainings: Mapping[str, Training],
    out: Path,
    describe: Callable[[fl.Result], str],
    workers: int = 1,
) -> dict[str, fl.Result]:
    """Run an experiment's trainings, each in a folder of its own below ``out/runs``.

    A line is printed for each when it is done. ``out/metrics.jsonl`` holds the records of all, in their
    order, each with the name of its ``run``. What was done in an earlier session is not done again.

    Args:
      trainings: by name.
      out: the experiment's folder.
      describe: what a result came to, in a few words.
      workers: how many train at the same time. The results don't depend on it.
    """
    results: dict[str, fl.Result] = {}
    stop = threading.Event()

    def one(name: str) -> tuple[str, fl.Result]:
        folder = out / "runs" / "".join(c if c.isalnum() or c in ".-" else "_" for c in name)
        return name, trainings[name](folder, lambda info: "interrupted" if stop.is_set() else None)

    def done(name: str, result: fl.Result) -> None:
        results[name] = result
        spent = result.seconds + result.compile_seconds
        count = f"[{len(results)}/{len(trainings)}] " if len(trainings) > 1 else ""
        print(f"{count}{name}: {describe(result)} ({result.rounds} rounds, {spent:.1f} s)", flush=True)
        if crowded():
            jax.clear_caches()  # compiled programs; what is still needed comes back from the user's cache folder
            gc.collect()

    try:
        if workers == 1:
            for name in trainings:
                done(*one(name))
        else:
            with concurrent.futures.ThreadPoolExecutor(workers) as pool:
                futures = [pool.submit(one, name) for name in trainings]
                try:
                    for future in concurrent.futures.as_completed(futures):
                        done(*future.result())
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        print("finishing and saving the rounds under way", file=sys.stderr, flush=True)
                    stop.set()  # those that wait don't begin
                    pool.shutdown(cancel_futures=True)
                    raise
    finally:
        _write_metrics(out / "metrics.jsonl", {name: results[name] for name in trainings if name in results})
    return {name: results[name] for name in trainings}


def crowded(maps: Path = Path("/proc/self/maps"), most: Path = Path("/proc/sys/vm/max_map_count")) -> bool:
    """Whether the process has taken up more than half of the pieces of memory that Linux gives one.

    Every compiled program takes some, and a study of some hundred of them ended with "Cannot allocate memory" in
    the midst of free memory.
    """
    try:
        with maps.open() as pieces:
            return 2 * sum(1 for _ in pieces) > int(most.read_text())
    except (OSError, ValueError):  # another system
        return False


DEVICES: int | None = None  # how many the command was told to use; None: all


def mesh(cohort: int) -> Mesh | None:
    """The devices that a cohort is shared out among: those of all processes, or as many as it can fill.

    Not for trainings that run side by side: their devices would wait for one another.
    """
    if hosts.several():
        return devices.mesh()
    count = min(DEVICES or jax.device_count(), cohort)
    return devices.mesh(count) if count > 1 else None


def default_workers() -> int:
    """How many small trainings are worth running side by side: one for each core, up to 4."""
    return min(os.cpu_count() or 1, 4) if jax.default_backend() == "cpu" else 1


def _write_metrics(path: Path, results: Mapping[str, fl.Result]) -> None:
    if not hosts.leads():
        return
    whole = path.with_suffix(".jsonl.part")
    with whole.open("w") as file:
        for name, result in results.items():
            for record in result.metrics:
                file.write(json.dumps({"run": name, **record}, allow_nan=False) + "\n")
    whole.replace(path)


def at(result: fl.Result, name: str, round: int | None = None) -> float:
    """A metric after a round, by default the last one that has it. Raises ValueError if none has."""
    found = [r[name] for r in result.metrics if name in r and round in (None, r["round"])]
    if not found:
        raise ValueError(f"no record of {name} after round {round}")
    return found[-1]


def save(figure: Any, path: Path) -> None:
    """Write a picture as PNG."""
    if hosts.leads():
        figure.savefig(path, dpi=120)


def write_report(out: Path, title: str, sections: Mapping[str, str]) -> None:
    """Write ``report.md``: a title, and a heading and text for each section."""
    if not hosts.leads():
        return
    body = "".join(f"\n## {heading}\n\n{text.strip()}\n" for heading, text in sections.items())
    (out / "report.md").write_text(f"# {title}\n{body}")


def write_study(
    out: Path,
    title: str,
    sections: Mapping[str, str],
    shown: Table,
    checks: Sequence[Check],
    figure: Any,
    name: str = "accuracy",
    left: int = 1,
) -> None:
    """Show the table, save the picture and write a report that ends with the checks and the picture.

    Args:
      out: the run's folder.
      title, sections: of the report.
      shown: the study's table, for the terminal; its Markdown belongs into one of the sections.
      checks: against published figures.
      figure, name: the picture, and its file's name without ``.png``.
      left: columns of the table that are words.
    """
    shown.show(left=left)
    save(figure, out / f"{name}.png")
    ending = {
        "Against the published figures": check_table(checks).markdown(),
        "The picture": f"![{name}]({name}.png)",
    }
    write_report(out, title, {**sections, **ending})


def other_settings(config: Any, paper: Any, names: Iterable[str]) -> str:
    """Why a run can't be compared with the paper's: the first named setting that differs, in words; or ``""``."""
    for name in names:
        own, theirs = getattr(config, name), getattr(paper, name)
        if own != theirs:
            return f"{name} is {own} instead of {theirs}"
    return ""


def new_folder(name: str) -> Path:
    """``runs/NAME-YYYYmmdd-HHMMSS``, not there yet."""
    stamp = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidates = [stamp, *(stamp.with_name(f"{stamp.name}-{i}") for i in range(2, 100))]
    return next(c for c in candidates if not c.exists())


def size(count: float) -> str:
    """A number of bytes for people: ``1.2 MB``."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} bytes"


def percent(share: float) -> str:
    """``0.123`` as ``12.3%``."""
    return f"{100 * share:.1f}%"
