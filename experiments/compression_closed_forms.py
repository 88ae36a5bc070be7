"""Errors of quantizers against their papers' closed forms: DRIVE, EDEN, QSGD and TernGrad on unit vectors.

Vargaftik et al., "DRIVE: One-bit Distributed Mean Estimation", NeurIPS 2021, section 4, and "EDEN", ICML 2022, section
3: of a long rotated vector the squared error depends on nothing but the bits. Alistarh et al., "QSGD", NIPS 2017,
section 3.1, and Wen et al., "TernGrad", NIPS 2017, section 3: each entry is rounded at random by itself, so that the
expected error follows from the vector. Ours are means over draws of the rounding and the rotation.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_lab as fl
from experiments import common

DRIVE = "Vargaftik et al. 2021 (DRIVE), section 4 and theorem 4, for a random rotation"
EDEN = "Vargaftik et al. 2022 (EDEN), section 3: the Lloyd-Max error of a normal variable"
LOGNORMAL = "independent implementation: lognormal entries, one randomized Hadamard transform"
QSGD = "Alistarh et al. 2017, section 3.1: sum of f (1 - f) / s^2 with f = frac(s |v| / |v|_2)"
TERNGRAD = "Wen et al. 2017, section 3: sum of |v| (max |v| - |v|)"
TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class Config:
    effort: float = 1.0
    """Share of the draws that a tolerance of 2% needs."""
    seed: int = 0
    """Of vectors, rotations and roundings."""

    def __post_init__(self):
        fl.checks.positive(self.effort, "effort")


PAPER = Config()
QUICK = Config(effort=0.001)


class Case(NamedTuple):
    """A quantizer, the unit vectors that it is given, and the expected squared error.

    Attributes:
      name: of the check.
      link: the quantizer.
      vector: ``(key) -> float[d]``, to be made a unit.
      expected: the error, or ``(float64[d]) -> `` the error of this vector.
      draws: how many make the mean's standard error small against the tolerance.
      source: where the expected error stands.
      fresh: another vector for every draw.
    """

    name: str
    link: fl.wire.Wire
    vector: Callable[[jax.Array], jax.Array]
    expected: float | Callable[[np.ndarray], float]
    draws: int
    source: str
    fresh: bool = False


def normal(size: int) -> Callable:
    return lambda key: jax.random.normal(key, (size,))


def lognormal(size: int) -> Callable:
    return lambda key: jnp.exp(jax.random.normal(key, (size,)))


def qsgd_error(levels: int) -> Callable[[np.ndarray], float]:
    def error(v):
        f = np.modf(levels * np.abs(v) / np.linalg.norm(v))[0]
        return float((f * (1 - f)).sum() / levels**2)

    return error


def terngrad_error(v: np.ndarray) -> float:
    a = np.abs(v)
    return float((a * (a.max() - a)).sum())


def all_cases() -> list[Case]:
    """Row by row of the published figures."""
    long, small = normal(2**15), {"normal": normal(1024), "lognormal": lognormal(1024)}
    cases = [
        Case("DRIVE, biased", fl.wire.drive(unbiased=False), long, 1 - 2 / math.pi, 16, DRIVE),
        Case("DRIVE, unbiased", fl.wire.drive(), long, math.pi / 2 - 1, 16, DRIVE),
    ]
    for bits, error in enumerate((0.5708, 0.1331, 0.0358, 0.0096), 1):
        cases.append(Case(f"EDEN, {bits} bit{'s' * (bits > 1)}", fl.wire.eden(bits), long, error, 16, EDEN))
    for size, error, draws in ((128, 0.546, 8000), (1024, 0.564, 200), (8192, 0.569, 32), (2**17, 0.5705, 4)):
        link = fl.wire.eden(1, block=max(size, 128), passes=1)
        cases.append(Case(f"EDEN, 1 bit, {size} lognormal", link, lognormal(size), error, draws, LOGNORMAL, True))
    for kind, vector in small.items():
        for s in (1, 3, 7, 255):
            name = f"QSGD, s = {s}, 1024 {kind}"
            cases.append(Case(name, fl.wire.qsgd(levels=s), vector, qsgd_error(s), 6000, QSGD))
        cases.append(Case(f"TernGrad, 1024 {kind}", fl.wire.terngrad(), vector, terngrad_error, 2000, TERNGRAD))
    return cases


class Outcome(NamedTuple):
    """The expected error, the mean over draws, its standard error, and the bytes of one payload."""

    expected: float
    mean: float
    standard_error: float
    size: int


def measure(case: Case, count: int, seed: int) -> Outcome:
    """Send unit vectors ``count`` times, and see how far off they arrive."""
    key, draw_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0xC10))
    unit = lambda key: (lambda v: v / jnp.linalg.norm(v))(case.vector(key))
    fixed = unit(key)

    def draw(key):
        x = unit(jax.random.fold_in(key, 1)) if case.fresh else fixed
        got, size = fl.wire.round_trip(case.link, x, jax.random.fold_in(key, 2))
        return jnp.sum(jnp.square(got - x)), size

    batch = min(count, 64)
    errors, sizes = jax.jit(lambda keys: jax.lax.map(draw, keys, batch_size=batch))(jax.random.split(draw_key, count))
    errors = np.asarray(errors, np.float64)
    expected = case.expected(np.asarray(fixed, np.float64)) if callable(case.expected) else case.expected
    spread = float(errors.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
    return Outcome(expected, float(errors.mean()), spread, int(np.asarray(sizes).flat[0]))


def main(config: Config, out: Path) -> dict[str, Any]:
    """Measure every case and compare it with its closed form."""
    rows, checks = [], []
    reason = "" if config.effort >= PAPER.effort else f"effort is {config.effort:g} instead of {PAPER.effort:g}"
    for case in all_cases():
        begin, count = time.monotonic(), max(2, math.ceil(case.draws * config.effort))
        found = measure(case, count, config.seed)
        rows.append(row(case, found, count, time.monotonic() - begin))
        checks.append(check(case, found, reason))
        print(f"{case.name}: {found.mean:.4g}, expected {found.expected:.4g}", flush=True)
    records = [{"run": r["run"], "round": 0} | {k: r[k] for k in ("error", "expected", "uplink_bytes")} for r in rows]
    (out / "metrics.jsonl").write_text("".join(f"{json.dumps(record, allow_nan=False)}\n" for record in records))
    write(out, rows, checks)
    return common.summary(rows, checks)


def row(case: Case, found: Outcome, draws: int, seconds: float) -> dict[str, Any]:
    """A case's line in ``summary.json``; ``uplink_bytes`` are those of one payload."""
    return {
        "run": case.name,
        "error": found.mean,
        "standard_error": found.standard_error,
        "expected": found.expected,
        "draws": draws,
        "rounds": 0,
        "uplink_bytes": found.size,
        "seconds": seconds,
    }


def check(case: Case, found: Outcome, reason: str) -> common.Check:
    """Whether the mean over draws is within 2% of the expected error."""
    return common.Check(
        name=f"{case.name}: squared error of a unit vector", paper=round(found.expected, 6), ours=found.mean,
        tolerance=f"{TOLERANCE:.0%}", ok=None if reason else abs(found.mean / found.expected - 1) <= TOLERANCE,
        source=case.source, reason=reason,
    )  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> common.Table:
    """One line for each case."""
    lines = [
        (r["run"], f"{r['expected']:.5g}", f"{r['error']:.5g}", f"{100 * (r['error'] / r['expected'] - 1):+.2f}%",
         f"{100 * r['standard_error'] / r['expected']:.2f}%", str(r["draws"]), str(r["uplink_bytes"]))
        for r in rows
    ]  # fmt: skip
    return common.Table(("", "closed form", "ours", "off by", "standard error", "draws", "bytes"), lines)


def picture(rows: Sequence[dict[str, Any]]):
    """How far each mean is off, with two standard errors to both sides."""
    figure, ((panel,),) = fl.plots.new_figure(width=6.4, height=0.24 * len(rows) + 1)
    off = [100 * (r["error"] / r["expected"] - 1) for r in rows]
    bars = [200 * r["standard_error"] / r["expected"] for r in rows]
    panel.axvspan(-100 * TOLERANCE, 100 * TOLERANCE, color="0.92", zorder=0)
    panel.errorbar(off, range(len(rows)), xerr=bars, fmt="o", markersize=4, color=fl.plots.COLOURS[0])
    panel.set_yticks(range(len(rows)), [r["run"] for r in rows], fontsize="small")
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlabel("squared error against the closed form, percent (bars: two standard errors; grey: tolerance)")
    return figure


def write(out: Path, rows: Sequence[dict[str, Any]], checks: Sequence[common.Check]) -> None:
    """Table, picture and ``report.md``."""
    shown = table(rows)
    shown.show()
    common.save(picture(rows), out / "errors.png")
    common.write_report(
        out,
        "Quantizers against their closed forms",
        {
            "What was run": "Unit vectors through each quantizer, many times; the mean squared error beside its "
            "expectation. DRIVE and EDEN rotate by randomized Hadamard transforms, the vectors are normal of length "
            "32,768 where nothing else is said. Bytes are those of one payload.",
            "The errors": shown.markdown(),
            "Against the published figures": common.check_table(checks).markdown(),
            "The picture": "![errors](errors.png)",
        },
    )
