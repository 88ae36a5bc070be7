"""A run's folder: whose it is, what was set up in it, and that only one process works in it."""

import contextlib
import errno
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab import checkpoint, stored
from fedjax_lab.data import FederatedData
from fedjax_lab.process import HostStep, Process
from fedjax_lab.records import Journal, Record
from fedjax_lab.state_leaves import state_digest

PyTree = Any
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)  # what such file systems say


def setup(process: Process, seed: int, params: PyTree) -> dict[str, Any]:
    """What a run computes with, apart from its program: compared when it is resumed."""
    data = process.data
    return {
        "seed": seed,
        "params": "the model's own" if params is None else state_digest(params)[:16],
        "clients": data.num_clients,
        "examples": data.num_examples,
        "data": data_digest(data),
    }


def data_digest(data: FederatedData) -> str:
    """A fingerprint of sizes, attributes and arrays, computed where they are.

    Two position-dependent 32-bit sums a leaf: they tell data sets apart but resist no adversary. Of data on
    the host, a sample.
    """
    if any(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(data.arrays)):
        return stored.fingerprint(data)
    sums = np.asarray(_checksums(data), np.uint32)
    return hashlib.sha256(sums.tobytes()).hexdigest()[:16]


@jax.jit
def _checksums(data: FederatedData) -> jax.Array:
    def one(leaf):
        bits = jnp.asarray(leaf)
        if bits.dtype == bool or bits.dtype.itemsize < 4:
            wide = bits.astype(jnp.float32 if jnp.issubdtype(bits.dtype, jnp.inexact) else jnp.int32)
            bits = jax.lax.bitcast_convert_type(wide, jnp.uint32)
        else:
            bits = jax.lax.bitcast_convert_type(bits, jnp.uint32)
        where = jnp.zeros(bits.shape, jnp.uint32)
        for axis in range(bits.ndim):  # a number for each position, mixed so that swaps show
            index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            where = (where + index + 1) * np.uint32(0x9E3779B1)
        where = (where ^ (where >> 15)) * np.uint32(0x85EBCA77)
        mixed = (bits ^ where) * np.uint32(0xC2B2AE3D)
        mixed = (mixed ^ (mixed >> 13)) * np.uint32(0x27D4EB2F)
        mixed = mixed ^ (mixed >> 16)
        return jnp.stack([jnp.sum(mixed), jnp.sum(mixed * (where | 1))])

    return jnp.stack([one(leaf) for leaf in jax.tree.leaves(data)])


def program_digest(step: Any, state: PyTree, data: FederatedData) -> dict[str, str]:
    """A fingerprint of the compiled step, and the versions that it may be compared under.

    It sees what no argument shows: learning rates, the algorithm, the model, the sampler. Programs that
    call back into Python hold addresses, which differ from process to process: they have none.
    """
    import fedjax_lab

    text = step.program() if isinstance(step, HostStep) else jax.jit(step).lower(state, data).as_text()
    digest = "" if "callback" in text else hashlib.sha256(text.encode()).hexdigest()[:16]
    return {
        "program": digest,
        "jax": jax.__version__,
        "backend": f"{jax.default_backend()} x {jax.device_count()}",
        "fedjax_lab": getattr(fedjax_lab, "__version__", ""),
    }


def compare_programs(
    there: Mapping[str, str], here: Mapping[str, str], folder: Path, strict: bool = True
) -> str | None:
    """A warning to give when versions or (if not ``strict``) programs differ, else ``None``.

    Raises:
      ValueError: the same versions compile the step to another program.
    """
    names = [n for n in here if there[n] != here[n]]
    changed = ", ".join(f"{n} {there[n]} (now {here[n]})" for n in names)
    if names and (names != ["program"] or not strict):
        return f"the run in {folder} was begun with {changed}: its bits may differ from here on"
    if names and there["program"] and here["program"]:
        raise ValueError(
            f"the run in {folder} computes something else: program was {there['program']}, is "
            f"{here['program']}. A hyper-parameter, the algorithm, the model, the sampler, lanes or "
            "the library's code differ. Use another folder (out=...), or resume='anyway' to go on "
            "with the change from here"
        )
    return None


def compare_setups(there: Mapping[str, Any], here: Mapping[str, Any], folder: Path) -> None:
    """Refuse a folder that holds another run, naming the first key that differs and both values."""
    old, new = _flat(there), _flat(here)
    for key in dict.fromkeys([*old, *new]):
        if old.get(key, "nothing") != new.get(key, "nothing"):
            raise ValueError(
                f"{folder} holds a run of another configuration: {key} was "
                f"{old.get(key, 'nothing')!r} there, is {new.get(key, 'nothing')!r} here. "
                "Use another folder (out=...), or go back to that configuration"
            )


def plain_config(config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The configuration as JSON would return it. Raises ValueError naming what isn't JSON."""
    if config is None:
        return None
    if not isinstance(config, Mapping):
        raise ValueError(f"config must be a dict; got {type(config).__name__}")
    for key, value in config.items():
        try:
            json.dumps({key: value}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"config entry {key!r} can't be written as JSON: {error}") from None
    return json.loads(json.dumps(dict(config)))


def holds_a_run(folder: Path) -> bool:
    """Whether a folder has metrics or checkpoints in it."""
    metrics = folder / "metrics.jsonl"
    begun = metrics.is_file() and metrics.stat().st_size > 0
    return begun or any((folder / "checkpoints").glob("*"))


def prepare(folder: Path, resume: bool | str, config: dict[str, Any] | None) -> None:
    """Make a run folder, or check that this run may go on in it; writes ``config.json``."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={str(folder)!r} is a file; give a folder")
    if resume is False and holds_a_run(folder):
        raise ValueError(
            f"{folder} already holds a run and resume=False; give another folder, or move or remove "
            "this one yourself: nothing is overwritten"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    if config is None:
        return
    if path.is_file():
        try:
            there = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({error}); repair or remove it") from None
        if resume != "anyway":
            compare_setups(there if isinstance(there, dict) else {}, config, folder)
    checkpoint.write_json(path, config)


class Disk(NamedTuple):
    """A run folder at work.

    Attributes:
      append: ``(records)``, to ``metrics.jsonl``.
      due: whether it is time for a checkpoint.
      save: ``(round, state, kept)``, once a round.
    """

    append: Callable[[list[Record]], None]
    due: Callable[[], bool]
    save: Callable[[int, PyTree, dict[str, Any]], None]


NO_FOLDER = Disk(lambda records: None, lambda: False, lambda round, state, kept: None)


class Start(NamedTuple):
    """Where a session begins: at round 0, or at a checkpoint. ``kept`` holds bytes and times so far."""

    state: PyTree
    done: int = 0
    records: Sequence[Record] = ()
    kept: Mapping[str, Any] = {}


def open_folder(
    folder: Path,
    state: PyTree,
    setup: dict[str, Any],
    resume: bool | str,
    every: int,
    checkpoint_every: float,
    program: dict[str, str],
) -> tuple[Disk, Start]:
    """Go on in a run folder, or begin in it. Raises ValueError if it holds another run."""
    journal, store = Journal(folder / "metrics.jsonl"), folder / "checkpoints"
    checkpoint.clean(store)

    def same_setup(extra):
        if resume == "anyway":
            return
        for part, here in setup.items():
            if here is not None and extra[part] is not None:
                compare_setups(extra[part], here, folder)

    found = checkpoint.restore_newest(store, state, same_setup)
    if found is None:
        journal.begin(every)
        start = Start(state)
    else:
        strict = resume != "anyway"
        if message := compare_programs(found.extra["program"], program, folder, strict):
            warnings.warn(message, stacklevel=3)
        records = journal.rewind(found.round)
        if journal.digest() != found.extra["journal"]:
            warnings.warn(f"{journal.path} was altered since it was written", stacklevel=3)
        start = Start(found.state, found.round, records, found.extra["kept"])

    saved_round = None if found is None else found.round
    saved_at = time.monotonic() if found is not None else -float("inf")

    def due() -> bool:
        return time.monotonic() - saved_at >= checkpoint_every

    def save(round: int, state: PyTree, kept: dict[str, Any]) -> None:
        nonlocal saved_round, saved_at
        if round == saved_round:
            return
        extra = setup | {"program": program, "journal": journal.digest(), "kept": kept}
        checkpoint.save(store, round, state, extra)
        saved_round, saved_at = round, time.monotonic()

    return Disk(journal.append, due, save), start


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder against other processes; the lock ends with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is running in {folder}; wait for it, or give another folder (out=...)"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            said = f"the file system of {folder} has no locks: start no other run in it while this one goes on"
            warnings.warn(said, stacklevel=3)
        yield


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
