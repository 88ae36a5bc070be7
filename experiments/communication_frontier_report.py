"""The frontier of accuracy against bytes and rounds: how it is found, drawn, tabled and put into words."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fedjax_lab as fl
from experiments import common

Row = Mapping[str, Any]


class Point(NamedTuple):
    """A combination after some rounds, as means over seeds."""

    link: str
    epochs: int
    round: int
    bytes: float
    accuracy: float

    @property
    def combination(self) -> str:
        return f"{self.link} E={self.epochs}"


def points(rows: Sequence[Row], results: Mapping[str, fl.Result], problem: str, both: bool) -> list[Point]:
    """Every combination at every evaluation after the first round."""
    found: dict[tuple[str, int], list[list[tuple[int, float, float]]]] = {}
    for row in rows:
        if row["problem"] == problem:
            found.setdefault((row["link"], row["epochs"]), []).append(_curve(results[row["run"]], both))
    out = []
    for (link, epochs), curves in found.items():
        for at in zip(*curves, strict=True):
            number, sent, accuracy = (float(np.mean([p[i] for p in at])) for i in range(3))
            out.append(Point(link, epochs, int(number), sent, accuracy))
    return out


def _curve(result: fl.Result, both: bool) -> list[tuple[int, float, float]]:
    """``(round, bytes so far, accuracy)`` at the evaluations of one run."""
    sent, out = 0, []
    for record in result.metrics:
        sent += record.get("uplink_bytes", 0) + (record.get("downlink_bytes", 0) if both else 0)
        if "accuracy" in record and record["round"]:
            out.append((record["round"], sent, record["accuracy"]))
    return out


def frontier(points: Sequence[Point], by: str) -> list[Point]:
    """The points that no other one beats: none is as accurate with less of ``"bytes"`` or ``"round"``."""
    best, out = -np.inf, []
    for point in sorted(points, key=lambda p: (getattr(p, by), -p.accuracy)):
        if point.accuracy > best:
            out.append(point)
            best = point.accuracy
    return out


def cost(points: Sequence[Point], link: str, epochs: int, target: float, by: str) -> float | None:
    """How many bytes or rounds a combination needs to reach an accuracy; ``None`` if it never does."""
    own = [p for p in points if (p.link, p.epochs) == (link, epochs) and p.accuracy >= target]
    return min((getattr(p, by) for p in own), default=None)


def last(points: Sequence[Point], link: str, epochs: int) -> Point:
    """A combination after its last round."""
    return max((p for p in points if (p.link, p.epochs) == (link, epochs)), key=lambda p: p.round)


def front_table(front: Sequence[Point]) -> common.Table:
    """The frontier in stretches of one combination each."""
    lines = []
    for combination, stretch in itertools.groupby(front, key=lambda p: p.combination):
        own = list(stretch)
        first, end = own[0], own[-1]
        lines.append((
            combination,
            _between(common.size(first.bytes), common.size(end.bytes)),
            _between(str(first.round), str(end.round)),
            _between(common.percent(first.accuracy), common.percent(end.accuracy)),
        ))  # fmt: skip
    return common.Table(("combination", "bytes", "rounds", "accuracy"), lines)


def _between(first: str, end: str) -> str:
    return first if first == end else f"{first} to {end}"


def cost_table(config: Any, points: Sequence[Point]) -> common.Table:
    """Each combination: its last accuracy, and the bytes and rounds that it needs to come near the best one."""
    best = max(last(points, "none", e).accuracy for e in config.epochs)
    columns = ["link", "epochs", "last accuracy", "against none", "sent"]
    columns += [f"to {common.percent(share * best)}: {what}" for share in config.near for what in ("bytes", "rounds")]
    lines = []
    for link in config.links:
        for epochs in config.epochs:
            end, plain = last(points, link, epochs), last(points, "none", epochs)
            cells = [link, str(epochs), common.percent(end.accuracy), f"{100 * (end.accuracy - plain.accuracy):+.1f}"]
            cells.append(common.size(end.bytes))
            for share in config.near:
                sent, rounds = (cost(points, link, epochs, share * best, by) for by in ("bytes", "round"))
                cells += ["never" if sent is None else common.size(sent), "" if rounds is None else f"{rounds:.0f}"]
            lines.append(cells)
    return common.Table(columns, lines)


def findings(config: Any, problem: str, points: Sequence[Point]) -> str:
    """This run's figures in words."""
    best = max((last(points, "none", e) for e in config.epochs), key=lambda p: p.accuracy)
    target = best.accuracy - 0.01
    reached = {
        (link, epochs): cost(points, link, epochs, target, "bytes") for link in config.links for epochs in config.epochs
    }
    known = {k: v for k, v in reached.items() if v is not None}
    plain = min(v for (link, _), v in known.items() if link == "none")
    (link, epochs), least = min(known.items(), key=lambda item: item[1])
    text = (
        f"- {problem}: without compression {common.percent(best.accuracy)} at best (E={best.epochs}). "
        f"Within one point of that comes soonest {link} with E={epochs}, for {common.size(least)} "
        f"({plain / least:.1f} times fewer than without compression"
    )
    text += ")." if link != "none" else ", which is to say that compression gained nothing)."
    never = [f"{link} E={epochs}" for (link, epochs), v in reached.items() if v is None]
    text += f" {len(never)} of {len(reached)} combinations never do: {', '.join(never)}." if never else ""
    if "top1" in config.links:
        gaps = [last(points, "top1", e).accuracy - last(points, "none", e).accuracy for e in config.epochs]
        each = ", ".join(f"{100 * gap:+.1f} points with E={e}" for gap, e in zip(gaps, config.epochs, strict=True))
        text += f" After the last round a hundredth of the entries with error feedback is at {each}."
    return text


def picture(config: Any, points: Mapping[str, Sequence[Point]], both: bool):
    """A row for each problem: accuracy against bytes and against rounds, all combinations and the frontier."""
    figure, axes = fl.plots.new_figure(len(points), 2, width=5.4, height=3.4)
    for line, (problem, own) in zip(axes, points.items(), strict=True):
        for ax, by in zip(line, ("bytes", "round"), strict=True):
            for i, link in enumerate(config.links):
                for j, epochs in enumerate(config.epochs):
                    curve = [p for p in own if (p.link, p.epochs) == (link, epochs)]
                    xs, ys = [getattr(p, by) for p in curve], [p.accuracy for p in curve]
                    label = link if not j else None
                    style = {"color": fl.plots.look(i)["color"], "linestyle": fl.plots.STYLES[j % 4]}
                    ax.plot(xs, ys, linewidth=1, alpha=0.7, label=label, **style)
            front = frontier(own, by)
            ax.plot([getattr(p, by) for p in front], [p.accuracy for p in front], "k.", markersize=5, label="frontier")
            ax.set_ylabel(f"test accuracy, {problem}")
        line[0].set_xscale("log")
        line[0].set_xlabel("bytes, both ways" if both else "bytes sent by clients")
        line[1].set_xlabel("round")
    axes[0][0].legend(frameon=False, fontsize="x-small", ncols=2)
    styles = ", ".join(
        f"{name} E={e}" for name, e in zip(("solid", "dashed", "dash-dot", "dotted"), config.epochs, strict=False)
    )
    figure.suptitle(f"means over {len(config.seeds)} seeds; {styles}", fontsize="small", color="0.4")
    return figure


def write(
    out: Path, config: Any, rows: Sequence[Row], results: Mapping[str, fl.Result], problems: Mapping[str, Any]
) -> dict[str, Any]:
    """Tables, picture and ``report.md``; returns the frontiers for ``summary.json``."""
    own = {problem: points(rows, results, problem, config.both) for problem in config.problems}
    fronts = {problem: {by: frontier(own[problem], by) for by in ("bytes", "round")} for problem in own}
    sections = {
        "What was run": f"FedAvg, {config.cohort_size} clients a round, {config.num_rounds} rounds, batches of "
        f"{config.batch_size}, {len(config.seeds)} seeds. A combination is a link and a number of local epochs E.",
        "What came out": "\n".join(findings(config, problem, own[problem]) for problem in own),
        "The picture": "![frontier](frontier.png)",
    }
    for problem in own:
        kind = "convex" if problems[problem].convex else "not convex"
        tables = [front_table(fronts[problem][by]) for by in ("bytes", "round")]
        costs = cost_table(config, own[problem])
        tables[0].show(f"{problem} ({kind}): the frontier by bytes")
        costs.show(f"{problem}: every combination", left=2)
        sections[f"{problem} ({kind})"] = (
            f"The frontier by bytes:\n\n{tables[0].markdown()}\n\nThe frontier by rounds:\n\n{tables[1].markdown()}\n\n"
            f"Every combination:\n\n{costs.markdown()}"
        )
    print(sections["What came out"])
    common.save(picture(config, own, config.both), out / "frontier.png")
    common.write_report(out, "What a byte buys", sections)
    plain = lambda front: [p._asdict() for p in front]
    return {
        "frontiers": {problem: {by: plain(front) for by, front in both.items()} for problem, both in fronts.items()}
    }
