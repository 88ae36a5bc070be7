"""The table of methods in docs/methods.md: paper, what is kept and travels, laws and reproduced figures.

Made from module docstrings and docstrings of transforms, which say it in the sentences "Kept ...:" and "Travels: ...".
"""

import ast
import inspect
import json
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEAD = ("Method", "Paper", "Kept", "Travels", "Laws", "Reproduced by")


def _said(doc: str) -> tuple[str, str, str]:
    """The paper, what is kept and what travels, as far as a docstring says them."""
    doc = " ".join(doc.split()).replace("``", "`")
    kept = re.search(r"Kept (per client|on the server)[^:.]*: (.*?)\.(?= [A-Z]|$)", doc)
    travels = re.search(r"Travels[^:.]*: (.*?)\.(?= [A-Z]|$)", doc)
    paper = re.search(r"\((?=[^()]*\b(?:19|20)\d\d\b)((?:[^()]|\([^()]*\))*)\)", doc)
    where = "" if not kept or kept[1] == "per client" else "on the server: "
    return (paper[1] if paper else ""), (where + kept[2] if kept else ""), (travels[1] if travels else "")


def _experiments() -> dict[str, list[str]]:
    """``{name of a method: experiments whose code names it}``."""
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / "experiments").glob("[!_]*.py")):
        words = set(re.findall(r"algorithms\.(\w+) import|transforms\.(\w+)", file.read_text()))
        for name in {a or b for a, b in words}:
            found.setdefault(name, []).append(file.stem)
    return found


def _checks(names: list[str]) -> str:
    """Experiments with a kept summary, and how many of its checks hold."""
    out = []
    for name in names:
        file = ROOT / "docs" / "figures" / f"{name}.summary.json"
        if file.exists():
            checks = json.loads(file.read_text())["checks"]
            out.append(f"`{name}`: {sum(c['ok'] for c in checks)} of {len(checks)} checks")
    return "; ".join(out)


def rows() -> list[tuple[str, ...]]:
    """A row for each algorithm and transform."""
    from fedjax_lab import transforms

    laws = (ROOT / "tests" / "laws" / "table.py").read_text()
    matrix = (ROOT / "tests" / "laws" / "composition.py").read_text()
    used = _experiments()
    out = []
    for file in sorted((ROOT / "algorithms").glob("[!_]*.py")):
        tree = ast.parse(file.read_text())
        if any(isinstance(f, ast.FunctionDef) and f.name == file.stem for f in tree.body):
            held = "oracle, lanes, one compilation, state" if re.search(rf"\b{file.stem}\(", laws) else ""
            name = f"[`{file.stem}`](../algorithms/{file.name})"
            out.append((name, *_said(ast.get_docstring(tree) or ""), held, _checks(used.get(file.stem, []))))
    for name, f in sorted(vars(transforms).items()):
        if inspect.isfunction(f) and re.search("Transform|Round", str(inspect.signature(f).return_annotation)):
            table = "oracle, lanes, one compilation, state" if re.search(rf"\b{name}\(", laws) else ""
            pairs = "[composition](composition.md)" if re.search(rf"t\.{name}\(", matrix) else ""
            held = "; ".join(filter(None, (table, pairs)))
            out.append((f"`fl.transforms.{name}`", *_said(inspect.getdoc(f) or ""), held, _checks(used.get(name, []))))
    return out


def table() -> str:
    """All rows in Markdown."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows()]
    return "\n".join(lines) + "\n"
