"""The command ``python -m experiments``: list, run, reproduce.

Exit codes: 0, all well; 1, a published figure was not met; 2, something in the request is wrong (one line
says what); 130, interrupted.
"""

import contextlib
import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import tyro

from experiments import common, registry
from fedjax_lab import checkpoint, checks, devices, hosts

PROGRAM = "python -m experiments"
USAGE = f"""usage: {PROGRAM} list
       {PROGRAM} run NAME [--key value ...]      (--help shows the settings of NAME)
       {PROGRAM} reproduce [NAME ...] [--quick]  run with the paper's settings, compare with its figures"""


class WrongUsage(ValueError):
    """The command line isn't one that the command understands."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How to run."""

    out: Path | None = None
    """Folder to write to, by default a new one, runs/NAME-DATE-TIME; one that was interrupted is gone on with."""
    quick: bool = False
    """Start from tiny settings, which take seconds and only show that everything works."""
    cache: bool = True
    """Whether compiled programs are kept for the next run, in the user's cache folder."""
    devices: int | None = None
    """Devices that share the clients of a cohort; by default all there are, the cores of a CPU counted as devices."""
    coordinator: str | None = None
    """host:port of process 0, if several processes run together; "cluster" if its environment says it."""
    num_processes: int | None = None
    """How many processes run together."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    debug: bool = False
    """Show the whole traceback of an error."""


@dataclasses.dataclass(frozen=True)
class ReproduceOptions:
    """Run experiments with their papers' settings and compare with the published figures."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Which; all by default."""
    out: Path | None = None
    """Folder that gets one folder for each experiment; by default new ones below runs/."""
    quick: bool = False
    """Tiny settings. Figures that can't be met with them are listed as skipped."""
    data_dir: str | None = None
    """Folder with the data sets, such as mnist/; by default FEDJAX_LAB_DATA."""
    devices: int | None = None
    """Devices that share the clients of a cohort; by default all there are, the cores of a CPU counted as devices."""
    cache: bool = True
    """Whether compiled programs are kept for the next run, in the user's cache folder."""
    debug: bool = False
    """Show the whole traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except SystemExit as stop:  # tyro, after showing help or what it didn't understand
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        _complain(error, "--debug" in argv)
        return 2


def _complain(error: Exception, debug: bool, where: str = "") -> None:
    if debug:
        traceback.print_exception(error)
    hint = "" if debug or isinstance(error, WrongUsage | registry.UnknownExperiment) else "\n(--debug shows where)"
    print(f"error: {where}{error}{hint}", file=sys.stderr)


def _dispatch(argv: list[str]) -> int:
    commands = {"list": _list, "run": _run, "reproduce": _reproduce}
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in commands:
        raise WrongUsage(f"unknown command {argv[0]!r}{checks.nearest(argv[0], commands)}\n{USAGE}")
    return commands[argv[0]](argv[1:])


# ---- list ----


def _list(argv: list[str]) -> int:
    if argv and argv[0] not in ("-h", "--help"):
        raise WrongUsage(f"list takes no arguments; got {argv[0]!r}")
    published = registry.published()
    for name, module in registry.find().items():
        print(f"{name:<20} {registry.headline(module)}{' [reproduce]' if name in published else ''}")
    return 0


# ---- run ----


def _run(argv: list[str]) -> int:
    known = registry.find()
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        raise WrongUsage(
            f"the experiment's name comes before its settings: {PROGRAM} run NAME {argv[0]} ...\n"
            f"NAME is one of: {', '.join(known)}"
        )
    if not argv or argv[0].startswith("-"):
        print(f"usage: {PROGRAM} run NAME [--key value ...]\n       NAME is one of: {', '.join(known)}")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    name, module = argv[0], registry.get(argv[0], known)
    config, options = _settings(name, module, argv[1:])
    _set_up(options.cache)
    _choose_devices(options.devices)
    if options.coordinator is not None or options.num_processes is not None or options.process_id is not None:
        _join(options)
    summary = execute(name, module, config, options.out or common.new_folder(name))
    return int(any(not check["ok"] for check in summary["checks"]))


def _settings(name: str, module: ModuleType, argv: list[str]) -> tuple[Any, RunOptions]:
    """An experiment's settings and the command's options, in one command line."""
    default = module.QUICK if "--quick" in argv else module.Config()
    both = dataclasses.make_dataclass(
        "Settings",
        [
            ("experiment", tyro.conf.OmitArgPrefixes[module.Config], dataclasses.field(default=default)),
            ("command", tyro.conf.OmitArgPrefixes[RunOptions], dataclasses.field(default=RunOptions())),
        ],
        frozen=True,
    )
    description = (module.__doc__ or "").strip()
    given = tyro.cli(
        tyro.conf.FlagCreatePairsOff[both], args=argv, prog=f"{PROGRAM} run {name}", description=description
    )
    return given.experiment, given.command


def execute(name: str, module: ModuleType, config: Any, out: Path) -> dict[str, Any]:
    """Run an experiment in a folder; returns what it wrote to ``summary.json``."""
    checks.optional("matplotlib.figure", "an experiment's pictures", "plots")  # now, and not after training
    begin = time.monotonic()
    fresh = not (out / "config.json").is_file()
    common.open_folder(out, name, config)
    print(f"{name}: {registry.headline(module)}\nwriting to {out}", flush=True)
    try:
        found = module.main(config, out)
    except KeyboardInterrupt:
        print(f"interrupted: the same command with --out {out} goes on where it was", file=sys.stderr)
        raise
    except ValueError:
        if fresh and hosts.leads() and not (out / "runs").exists():
            (out / "config.json").unlink()  # nothing ran: other settings may have the folder
        raise
    summary = {"experiment": name, **found, "seconds": round(time.monotonic() - begin, 2)}
    if not hosts.leads():
        return summary
    checkpoint.write_json(out / "summary.json", summary)
    print(f"report: {out / 'report.md'}   pictures: {', '.join(p.name for p in sorted(out.glob('*.png')))}")
    return summary


# ---- reproduce ----


def _reproduce(argv: list[str]) -> int:
    known = registry.published()
    options = tyro.cli(tyro.conf.FlagCreatePairsOff[ReproduceOptions], args=argv, prog=f"{PROGRAM} reproduce")
    for name in options.names:
        if name in registry.find() and name not in known:
            raise WrongUsage(f"{name} reproduces no published figures; see: {PROGRAM} run {name} --help")
        registry.get(name, known)
    _set_up(options.cache)
    _choose_devices(options.devices)
    names = list(dict.fromkeys(options.names or known))
    summaries, failed = {}, []
    for name in names:
        config = known[name].QUICK if options.quick else known[name].PAPER
        if options.data_dir is not None and hasattr(config, "data_dir"):
            config = dataclasses.replace(config, data_dir=options.data_dir)
        try:
            out = options.out / name if options.out else common.new_folder(name)
            summaries[name] = execute(name, known[name], config, out)
        except (ValueError, OSError, ImportError) as error:
            _complain(error, options.debug, f"{name}: ")
            failed.append(name)
    met = _show_checks(summaries)
    if failed:
        print(f"not run: {', '.join(failed)}", file=sys.stderr)
    return 2 if failed else int(not met)


def _show_checks(summaries: dict[str, dict[str, Any]]) -> bool:
    """Print all checks; whether none of those evaluated has failed."""
    done = [(name, common.Check(**c)) for name, summary in summaries.items() for c in summary["checks"]]
    shown = common.check_table([check for _, check in done])
    rows = [(name, *row) for (name, _), row in zip(done, shown.rows, strict=True)]
    columns = ("experiment", *shown.columns)
    common.Table(columns, rows).show("Published figures and ours", left=len(columns))
    for name, summary in summaries.items():
        for reason in dict.fromkeys(c["reason"] for c in summary["skipped"]):
            names = [c["name"] for c in summary["skipped"] if c["reason"] == reason]
            print(f"skipped, {name}, because {reason}: {'; '.join(names)}")
    met, skipped = sum(bool(c.ok) for _, c in done), sum(len(s["skipped"]) for s in summaries.values())
    print(f"{met} of {len(done)} evaluated checks ok, {skipped} skipped")
    return met == len(done)


# ---- the process ----


def _choose_devices(count: int | None) -> None:
    """A CPU's cores as devices of their own, as far as JAX doesn't run yet."""
    if count is not None:
        checks.positive(count, "devices", integer=True)
        if count > (cores := os.cpu_count() or 1):
            print(f"note: on {cores} CPU cores, {count} devices only take turns; leave out --devices to use {cores}")
    common.DEVICES = count
    with contextlib.suppress(RuntimeError):
        devices.use_cores(count)


def _join(options: RunOptions) -> None:
    """Join the other processes of the run, which share its folder."""
    if options.out is None:
        raise ValueError("several processes need a folder that all of them see: --out FOLDER")
    if options.coordinator == "cluster":
        hosts.connect()
    else:
        hosts.connect(options.coordinator, options.num_processes, options.process_id)


def _set_up(cache: bool) -> None:
    """Keep what JAX compiles, unless the user has said where or that it shouldn't."""
    if not cache or os.environ.get("JAX_COMPILATION_CACHE_DIR") is not None:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "fedjax_lab" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
