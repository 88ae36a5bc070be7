"""The benchmarks of transforms and of links, as commands: what they compare, and the figures they write."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_lab as fl
from experiments.benchmarks import links, pairs, transforms, workloads
from experiments.benchmarks.__main__ import main
from experiments.benchmarks.peers import environments
from tests.problems import assert_close, steps

DEEP = workloads.W1._replace(
    name="deep",
    sizes=lambda rng: np.array([57, 31, 80]),
    model=lambda: fl.models.mlp(10, hidden=(4,), input_shape=(60,)),
    cohorts=(2,),
    epochs=1,
)


@pytest.fixture
def deep(monkeypatch):
    monkeypatch.setitem(workloads.WORKLOADS, "deep", DEEP)


# ---- transforms ----


def test_transforms_writes_a_row_for_each(deep, tmp_path, capsys):
    file = tmp_path / "transforms.json"
    assert main(["transforms", "--workloads", "deep", "--quick", "--json", str(file)]) == 0
    rows = [pairs.Row(**row) for row in json.loads(file.read_text())]
    assert [row.workload for row in rows] == [f"deep {added.name}" for added in transforms.ADDED]
    assert [row.against for row in rows] == ["FedAvg"] * 3 + ["FedAvg, 2 epochs"]
    assert all(row.cohort == 2 and row.runs == 3 and row.unit == "ms per round" for row in rows)
    assert "deep Ditto" in capsys.readouterr().out


def test_a_model_of_one_layer_is_refused(capsys):
    assert main(["transforms", "--workloads", "w1"]) == 2
    assert "choose among w2, w3, w4" in capsys.readouterr().err


def test_what_is_timed_makes_the_steps_it_is_timed_for():
    """Ditto's global model is FedAvg's; FedRep's body makes the steps of an epoch."""
    data, made = DEEP.data(), {added.name: added.build(DEEP) for added in transforms.ADDED}

    def final(round):
        process = fl.synchronous(round, data, fl.fixed([0, 1]))
        return process, steps(process, 1)[0]

    (plain, after), (ditto, other) = final(DEEP.algorithm()), final(made["Ditto"])
    assert_close(ditto.params(other), plain.params(after), atol=1e-6)
    process, _ = final(made["FedRep"])
    env = fl.Env(jnp.int32(0), jax.random.key(0), jnp.arange(1), jnp.ones(1, bool), jnp.ones(1, bool), 3, 1)
    server = process.round.init(jax.random.key(0), process.data)
    client = process.data.view(jnp.int32(0), env)
    state = process.round.init_client(server, client)
    message = process.round.broadcast(server, state, client, jax.random.key(0))
    out = process.round.client_update(message, state, client, jax.random.key(0))
    assert int(out.trained.steps) == DEEP.steps([57])  # those of the head come before


# ---- links ----


@pytest.fixture
def numpy_only(monkeypatch, tmp_path):
    """NumPy in a process of its own, without PyTorch beside it."""
    stub = "import contextlib\nno_grad = contextlib.nullcontext\nset_num_threads = from_numpy = lambda x: x\n"
    (tmp_path / "torch.py").write_text(stub)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(environments, "environment", lambda peer, folder, python: Path(sys.executable))

    def only(**ways):
        monkeypatch.setattr(links, "LINKS", {name: (make, [("numpy", way)]) for name, (make, way) in ways.items()})

    return only


def test_links_are_timed_against_what_loses_as_much(numpy_only, tmp_path):
    numpy_only(a=(lambda: fl.wire.top_k(0.01), "top_k"), b=(lambda: fl.wire.qsgd(8), "qsgd"))
    file = tmp_path / "links.json"
    assert main(["links", "--size", "20000", "--quick", "--json", str(file)]) == 0
    rows = [pairs.Row(**row) for row in json.loads(file.read_text())]
    assert [(row.workload, row.against, row.unit, row.runs) for row in rows] == [
        ("a", "numpy", "ms", 3),
        ("b", "numpy", "ms", 3),
    ]


def test_links_that_lose_something_else_are_not_timed(numpy_only, tmp_path, capsys):
    numpy_only(a=(lambda: fl.wire.top_k(0.2), "top_k"))
    file = tmp_path / "links.json"
    assert main(["links", "--size", "20000", "--quick", "--json", str(file)]) == 1
    assert "our squared error is" in capsys.readouterr().err
    assert not file.exists()
