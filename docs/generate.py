"""Rewrite the tables of README.md and docs/methods.md that list what is in the project: ``make docs``.

They stand between ``<!-- generated: NAME -->`` and ``<!-- end -->`` and are made of the first lines of
docstrings, so that a thing is described in one place. With ``--check`` nothing is written, and the
exit status says whether they are up to date.
"""

import ast
import importlib.util
import inspect
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterable
from types import ModuleType

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "figures"
PAGES = (ROOT / "README.md", ROOT / "docs" / "methods.md", ROOT / "docs" / "speed.md")
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def summary_of(docstring: str | None, of: str) -> str:
    """A docstring's first paragraph, fit for a table. Raises ValueError if there is none."""
    if not docstring:
        raise ValueError(f"{of} has no docstring to describe it in the README")
    summary = " ".join(docstring.strip().split("\n\n")[0].split())
    summary = summary if summary.endswith("...") else summary.removesuffix(".")
    return summary.replace("``", "`").replace("|", "\\|")


def table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    """A Markdown table of two columns."""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {a} | {b} |" for a, b in rows]) + "\n"


def functions(module: ModuleType, prefix: str, keep: Callable[[Callable], bool] = lambda f: True) -> str:
    """A table of a module's public functions."""
    names = getattr(module, "__all__", None) or [n for n in dir(module) if not n.startswith("_")]
    found = [(n, getattr(module, n)) for n in sorted(names)]
    rows = [
        (f"`{prefix}.{name}`", summary_of(inspect.getdoc(f), f"{prefix}.{name}"))
        for name, f in found
        if inspect.isfunction(f) and keep(f)
    ]
    return table(("Name", "What it is"), rows)


def algorithms() -> str:
    """Every file of ``algorithms/`` that defines a function of its own name."""
    rows = []
    for file in sorted((ROOT / "algorithms").glob("[!_]*.py")):
        tree = ast.parse(file.read_text())
        builders = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == file.stem]
        if builders:
            line = summary_of(ast.get_docstring(builders[0]), f"algorithms.{file.stem}")
            rows.append((f"[`{file.stem}`](algorithms/{file.name})", line))
    return table(("Algorithm", "What it does"), rows)


def datasets() -> str:
    from fedjax_lab import datasets

    return functions(datasets, "fl.datasets")


def models() -> str:
    from fedjax_lab import models

    returns = lambda f: inspect.signature(f).return_annotation
    return functions(models, "fl.models", keep=lambda f: returns(f) in (models.Model, "Model"))


def transforms() -> str:
    from fedjax_lab import transforms

    returns = lambda f: inspect.signature(f).return_annotation
    keep = lambda f: "Transform" in str(returns(f)) or "Round" in str(returns(f))
    return functions(transforms, "fl.transforms", keep=keep)


def wire() -> str:
    """The links."""
    from fedjax_lab import wire

    return functions(wire, "fl.wire", keep=lambda f: "Wire" in str(inspect.signature(f).return_annotation))


def experiments() -> str:
    from experiments import registry

    rows = [(f"`{name}`", summary_of(module.__doc__, name)) for name, module in registry.find().items()]
    return table(("Experiment", "What it shows"), rows)


def figure(value: object) -> str:
    """A check's entry as a table shows it: numbers to three significant digits, published ones as they are."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {figure(number)}" for name, number in value.items())
    if isinstance(value, list):
        return ", ".join(map(figure, value))
    text = re.sub(r"\d+\.\d{4,}", lambda m: f"{float(m[0]):.3g}", str(value))
    return text.replace("|", "\\|")


def reproduced() -> str:
    """The checks that ``reproduce`` made, from the summaries kept in ``docs/figures/``."""
    lines = ["| Experiment | Check | Paper | Here | Tolerance | Holds | Source |", "|---|---|---|---|---|---|---|"]
    for file in sorted(FIGURES.glob("*.summary.json")):
        summary = json.loads(file.read_text())
        for check in summary["checks"]:
            cells = [figure(check[k]) for k in ("name", "paper", "ours", "tolerance")]
            holds = "yes" if check["ok"] else "**no**"
            lines.append("| " + " | ".join([f"`{summary['experiment']}`", *cells, holds, check["source"]]) + " |")
    return "\n".join(lines) + "\n"


def number(value: float) -> str:
    """Three digits, thousands set apart."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def measured(*names: str) -> str:
    """Benchmarks' figures, as ``python -m experiments.benchmarks NAME --json docs/figures/NAME.json`` wrote them.

    Rates against matrix products are told in experiments/benchmarks/README.md.
    """
    lines = ["| Workload | Clients a round | Against | Ratio | Ours | Theirs | Runs |", "|---|---|---|---|---|---|---|"]
    for name in names:
        for row in json.loads((FIGURES / f"{name}.json").read_text()):
            if row["against"] == "matrix products":  # a rate, of which more is better
                continue
            times = " | ".join(f"{number(row[side])} {row['unit']}" for side in ("ours", "theirs"))
            ratio = f"{row['ratio']:.2f}" if row["ratio"] >= 0.1 else f"{row['ratio']:.3f}"
            lines.append(
                f"| {row['workload']} | {row['cohort']} | {row['against']} | {ratio} | {times} | {row['runs']} |"
            )
    return "\n".join(lines) + "\n"


def speed() -> str:
    """Against a hand-written loop and other frameworks."""
    return measured("limit", "peers")


def costs() -> str:
    """Start-up, growth, and what transforms and links cost."""
    return measured("startup", "growth", "transforms", "links")


def methods() -> str:
    """What is kept, what travels, what is held, for every method."""
    spec = importlib.util.spec_from_file_location("methods", ROOT / "docs" / "methods.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.table()


BLOCKS = {
    "methods": methods,
    "reproduced": reproduced,
    "speed": speed,
    "costs": costs,
    "algorithms": algorithms,
    "datasets": datasets,
    "models": models,
    "transforms": transforms,
    "wire": wire,
    "experiments": experiments,
}


def regenerated(text: str) -> str:
    """The text with every generated block made anew. Raises KeyError for an unknown block."""
    return BLOCK.sub(lambda m: m[1] + "\n" + BLOCKS[m[2]]() + "\n" + m[3], text)


def main(arguments: list[str]) -> int:
    sys.path.insert(0, str(ROOT))
    status = 0
    for page in PAGES:
        old = page.read_text()
        new = regenerated(old)
        if new == old:
            print(f"{page.name} is up to date")
        elif "--check" in arguments:
            print(f"{page.name} lists something else than what exists; run: make docs", file=sys.stderr)
            status = 1
        else:
            page.write_text(new)
            print(f"{page.name} rewritten")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
