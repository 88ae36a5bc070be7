"""The notebooks: stored clean, run from the first cell to the last, and what they compute is right."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

COLAB = pathlib.Path(__file__).resolve().parents[2] / "colab"
NOTEBOOKS = sorted(COLAB.glob("*.ipynb"))
FIRST = COLAB / "01_first_experiment.ipynb"


def stored(path: pathlib.Path) -> dict:
    return json.loads(path.read_text())


def code(path: pathlib.Path) -> list[str]:
    return ["".join(cell["source"]) for cell in stored(path)["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_is_stored_clean(path):
    notebook = stored(path)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    cells = notebook["cells"]
    assert all(not c["outputs"] and c["execution_count"] is None for c in cells if c["cell_type"] == "code")
    assert all(not c["metadata"] for c in cells)
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(path, as_version=4))


def test_every_notebook_begins_with_the_same_installation():
    assert FIRST in NOTEBOOKS
    assert {tuple(code(path)[:2]) for path in NOTEBOOKS} == {tuple(code(FIRST)[:2])}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_names_no_machine(path):
    text = path.read_text()
    assert "file://" not in text and "/content" not in text and "http://" not in text


# ---- the installation ----


def install(monkeypatch, tmp_path, repository="", importable=False, checkout=False):
    """What the first two cells do in an empty folder: ``(commands, constraints, sys.path)``."""
    commands, kept = [], []

    def run(command, check=False):
        words = [str(word) for word in command]
        commands.append(words)
        if "--constraint" in words:
            kept.append(pathlib.Path(words[words.index("--constraint") + 1]).read_text())
        return subprocess.CompletedProcess(words, 0)

    here = tmp_path / "colab"
    here.mkdir()
    if checkout:
        (tmp_path / "fedjax_lab").mkdir()
    path = list(sys.path)
    found = lambda name: "a spec" if importable or str(tmp_path) in path else None
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", path)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", found)
    settings, cell = code(FIRST)[:2]
    assert settings.splitlines()[-1].startswith('REPOSITORY = ""  # @param')
    scope: dict = {}
    exec(settings, scope)
    exec(cell, scope | {"REPOSITORY": repository})
    return commands, "".join(kept), path


def test_nothing_is_installed_where_the_project_is(monkeypatch, tmp_path):
    commands, _, path = install(monkeypatch, tmp_path, "https://example.com/repository", importable=True)
    assert not commands and str(tmp_path) not in path


def test_a_checkout_around_the_notebook_is_used(monkeypatch, tmp_path):
    commands, _, path = install(monkeypatch, tmp_path, checkout=True)
    assert not commands and path[0] == str(tmp_path)


def test_elsewhere_an_address_is_asked_for(monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="fill in REPOSITORY in the cell above"):
        install(monkeypatch, tmp_path)


def test_the_repository_is_installed_beside_the_runtimes_own_jax(monkeypatch, tmp_path):
    import jax

    commands, constraints, _ = install(monkeypatch, tmp_path, "https://example.com/repository")
    clone, pip = commands
    assert clone[:2] == ["git", "clone"] and "https://example.com/repository" in clone
    assert pip[:4] == [sys.executable, "-m", "pip", "install"] and f"./{clone[-1]}[plots]" in pip
    assert f"jax=={jax.__version__}\n" in constraints and "jaxlib==" in constraints


# ---- running them ----

CHECKS = {
    "01_first_experiment.ipynb": """
import json
runs = {"FedAvg": result, "FedProx": proximal_result, "own": own_result}
print(json.dumps({
    "accuracy": {name: run.metrics[-1]["accuracy"] for name, run in runs.items()},
    "worst": result.metrics[-1]["accuracy_worst10"],
    "bytes": [result.uplink_bytes, result.downlink_bytes],
    "weight": float(output.weight), "size": int(data.train.client(7).size), "steps": int(output.trained.steps),
    "clients": [len(a) for a in accuracies.values()],
}))
"""
}


@pytest.mark.filterwarnings("ignore")  # of Jupyter's own machinery
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_runs_from_the_first_cell_to_the_last(path, monkeypatch):
    """Some 20 s on two cores; nothing of it is kept."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.setenv("PYTHONWARNINGS", "default")  # shown in the cells, and looked for below
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(CHECKS[path.name]))
    before = path.read_bytes()
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()  # raises for an error in any cell
    assert path.read_bytes() == before
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "Warning" not in json.dumps([cell.outputs for cell in cells])
    assert sum("image/png" in o.get("data", {}) for cell in cells for o in cell.outputs) == 5  # its pictures
    said = json.loads("".join(o.text for o in cells[-1].outputs))
    assert all(0.7 < value <= 1 for value in said["accuracy"].values())  # chance is 0.1
    assert 0.2 < said["worst"] <= said["accuracy"]["FedAvg"]
    # Rounds, clients, bytes, parameters of the model: 64 x 64 + 64 + 64 x 10 + 10.
    assert said["bytes"] == [50 * 10 * 4 * 4810] * 2
    assert said["weight"] == said["size"] and said["steps"] == 5 * -(-said["size"] // 10)
    assert said["clients"] == [50, 50, 50]
