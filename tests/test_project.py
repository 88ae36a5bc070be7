"""What holds for the project as a whole: imports, documents, and the files around the code."""

import ast
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("fedjax_lab", "algorithms", "experiments")
# Never imported by importing our modules, which must work where they are not installed.
OPTIONAL = (
    "array_record", "matplotlib", "pandas", "pyarrow", "sklearn", "tensorboardX", "tensorflow",
    "tensorflow_datasets", "jupytext", "nbclient",
)  # fmt: skip
COMMAND_LINE = ("argparse", "tyro")
# What everything else in fedjax_lab builds on, and which knows none of it.
CORE = ("checks", "data_checks", "shuffle", "client", "data", "models", "round", "aggregators", "local")
ABOVE_CORE = (
    "datasets", "transforms", "wire", "schedules", "privacy", "analytics", "diagnostics",
    "sampling", "cohort", "simulation", "evaluation", "run", "oracle",
)  # fmt: skip


def sources(package: str) -> list[pathlib.Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(file: pathlib.Path, *, at_import: bool) -> set[str]:
    """The modules that a file imports, with dots; only those outside functions if ``at_import``."""
    found = set()

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if at_import and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}:{child.lineno}: a relative import"
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child)

    visit(ast.parse(file.read_text()))
    return found


def inside(modules: set[str], *packages: str) -> list[str]:
    """Those of ``modules`` that are one of the packages, or part of one."""
    return sorted(m for m in modules if any(m == p or m.startswith(f"{p}.") for p in packages))


def names(files) -> list[str]:
    return [str(f.relative_to(ROOT)) for f in files]


def test_the_import_finder_sees_what_it_should(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("import x.y\nfrom u import v\ndef f():\n    import hidden\nif 1:\n    import z\n")
    assert imported(file, at_import=True) == {"x.y", "u.v", "z"}
    assert inside(imported(file, at_import=False), "hidden", "x", "z.q") == ["hidden", "x.y"]


@pytest.mark.parametrize("file", names(sources("fedjax_lab") + sources("algorithms")))
def test_imports_point_one_way(file):
    above = ("experiments", "algorithms", "tests") if file.startswith("fedjax_lab") else ("experiments", "tests")
    assert not inside(imported(ROOT / file, at_import=False), *above)


@pytest.mark.parametrize("file", names(sources("fedjax_lab")))
def test_the_core_imports_no_data_set_plot_or_command_line(file):
    if file == "fedjax_lab/__init__.py":  # which is the shop window
        return
    modules = imported(ROOT / file, at_import=True)
    part = file.split("/")[1].removesuffix(".py")
    assert not inside(modules, *COMMAND_LINE)
    if part != "datasets":
        assert not inside(modules, "fedjax_lab.datasets")
    if part in CORE:
        assert not inside(modules, *(f"fedjax_lab.{name}" for name in ABOVE_CORE))


@pytest.mark.parametrize("file", names(f for package in PACKAGES for f in sources(package)))
def test_optional_packages_are_imported_where_they_are_used(file):
    assert not inside(imported(ROOT / file, at_import=True), *OPTIONAL)


def test_everything_imports_without_the_optional_packages():
    """In a process in which none of them can be found, as where they are not installed."""
    script = f"""
import importlib, pkgutil, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Missing())
for package in {PACKAGES!r}:
    package = importlib.import_module(package)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- documents ----


def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_tables_are_current():
    module = generate()
    texts = {page.name: page.read_text() for page in module.PAGES}
    assert {m[2] for text in texts.values() for m in module.BLOCK.finditer(text)} == set(module.BLOCKS)
    for name, text in texts.items():
        assert module.regenerated(text) == text, f"{name} lists something else than what exists; run: make docs"


def test_a_table_by_hand(monkeypatch):
    module = generate()
    monkeypatch.setitem(module.BLOCKS, "toy", lambda: module.table(("A", "B"), [("x", "y")]))
    text = "before\n<!-- generated: toy -->\nold\n<!-- end -->\nafter"
    new = "before\n<!-- generated: toy -->\n\n| A | B |\n|---|---|\n| x | y |\n\n<!-- end -->\nafter"
    assert module.regenerated(text) == new
    assert module.regenerated(new) == new
    assert module.summary_of("\n  Says ``a|b``.\n\n  More.", "f") == "Says `a\\|b`"
    with pytest.raises(ValueError, match="f has no docstring"):
        module.summary_of(None, "f")


def test_the_readmes_example_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len(code.strip().splitlines()) <= 15
    for written, small in (
        ("num_clients=100", "num_clients=6"),
        ("cohort_size=10", "cohort_size=3"),
        ("num_rounds=200", "num_rounds=4"),
        ("every=10", "every=2"),
    ):
        assert code.count(written) == 1, f"the example no longer says {written}: adapt this test"
        code = code.replace(written, small)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    result = scope["result"]
    assert len(result.metrics) >= 2
    assert all(np.isfinite(result.metrics[-1][name]) for name in ("loss", "accuracy"))
    assert result.uplink_bytes == 4 * 3 * 4 * 4810  # rounds, clients, bytes, parameters of the model


def test_the_documents_name_only_targets_and_files_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    for document in documents:
        text = document.read_text()
        unknown = set(re.findall(r"\bmake ([a-z][a-z-]*)\b(?=[`;\s]*(?:#|`|$))", text, re.MULTILINE)) - targets
        assert not unknown, f"{document.name} names make {unknown}"
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert "://" in link or (document.parent / link).exists(), f"{document.name} links to {link}"


def test_the_skeleton_stays_short():
    file = ROOT / "algorithms" / "_template.py"
    tree = ast.parse(file.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node):
            skipped.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(file.read_text().splitlines(), 1)
    code = [line for n, line in lines if n not in skipped and line.strip() and not line.strip().startswith("#")]
    assert len(code) < 30


# ---- files around the code ----


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_are_names_and_versions_and_cover_every_requirement():
    pin = re.compile(r'([A-Za-z0-9][\w.-]*)==(\d[\w.]*)( ; python_version (<|>=) "3\.12")?')
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {}
    for line in lines:
        match = pin.fullmatch(line)
        assert match, f"constraints.txt: {line!r} is more than a name and a version"
        pins.setdefault(canonical(match[1]), []).append(match[4])
    assert all(markers in ([None], ["<", ">="]) for markers in pins.values()), "a pin for one Python only, or twice"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    needed = {canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in wanted} - {"fedjax-lab"}
    assert needed <= set(pins)


def test_no_file_names_a_machine_or_a_package_index():
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and the repository to list the project's files")
    listed = subprocess.run(
        [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    # Put together here, so that this file does not name them either.
    banned = [f"/{folder}/" for folder in ("work", "root", "farm")]
    banned += [
        "-".join(words) for words in (("", "", "index", "url"), ("extra", "index", "url"), ("", "", "find", "links"))
    ]
    banned += ["python" + "hosted", "pypi" + ".org/simple"]
    found = []
    for name in filter(None, listed.stdout.decode().split("\0")):
        file = ROOT / name
        content = file.read_bytes() if file.is_file() else b""
        found += [f"{name}: {word}" for word in banned if word.encode() in content]
    assert not found


@pytest.mark.skipif(os.name == "nt" or shutil.which("make") is None, reason="needs make")
def test_make_refuses_an_old_python(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo Python 3.9.1; else exit 1; fi\n')
    old.chmod(0o755)
    command = ["make", "lint", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "needs Python 3.11 or newer" in result.stdout
    assert "Python 3.9.1" in result.stdout
    assert not (tmp_path / "venv").exists()


def test_continuous_integration_lints_and_runs_the_readmes_test_command():
    file = ROOT / ".ci" / "run"
    assert os.access(file, os.X_OK)
    text = file.read_text()
    assert "set -euo pipefail" in text
    assert text.index("make lint") < text.index("make test")
    assert re.search(r"^make test\b", (ROOT / "README.md").read_text(), re.MULTILINE)
