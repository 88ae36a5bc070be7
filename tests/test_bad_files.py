"""The issue's list of bad input, case by case as a user meets it: commands, data sets, files, run folders, checkpoints.

What is wrong is named before anything is compiled, and what was there is left as it was.
"""

import dataclasses
import gzip
import json
import shutil
import struct

import jax
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedadam import fedadam
from algorithms.fedavg import fedavg
from experiments import cli, common, digits, registry
from tests.datasets import federated_files
from tests.problems import softmax_data, softmax_model
from tests.refusals import COMPILED, COPIES, PROGRAMS, contents, raises, refused, warm

# ---- the command line ----


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """``command(arguments, *words)``: exit code 2, the words on standard error, no traceback, nothing trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")

    def check(arguments: str, *words: str) -> str:
        warm()
        COMPILED.clear()
        assert cli.main([*arguments.split(), "--no-cache"]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert [w for w in words if w not in said] == [], said
        assert "Traceback" not in said
        assert set(COMPILED) <= COPIES
        assert not list(tmp_path.rglob("metrics.jsonl"))
        return said

    return check


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("run digit", ["unknown experiment 'digit'", "did you mean 'digits'?"]),
        ("run xyzzy", ["unknown experiment 'xyzzy'", "there are", "digits"]),
        ("rum digits", ["unknown command 'rum'", "did you mean 'run'?"]),
        ("reproduce fedprox_syntetic", ["unknown experiment 'fedprox_syntetic'", "did you mean 'fedprox_synthetic'?"]),
        ("run digits --learning-rat 0.1", ["--learning-rat", "Perhaps you meant", "--learning-rate"]),
        ("run digits --quick --cohort-size 11", ["cohort_size 11", "10 clients"]),
        ("run digits --cohort-size 0", ["cohort_size must be positive", "got 0"]),
        ("run digits --batch-size 0", ["batch_size must be positive", "got 0"]),
        ("run digits --epochs -1", ["epochs must be positive", "got -1"]),
        ("run digits --epochs 1.5", ["--epochs", "1.5"]),
        ("run digits --num-clients 5000", ["1797 rows", "5000 clients"]),
        ("run digits --alpha 0", ["alpha must be positive"]),
        ("run digits --mu -1", ["mu must be a number of at least 0"]),
        ("run digits --seed -1", ["seed must be an integer of at least 0"]),
    ],
)
def test_a_wrong_command(arguments, words, command):
    command(arguments, *words)


RATES = [
    (name, field.name)
    for name, module in registry.find().items()
    for field in dataclasses.fields(module.Config)
    if "learning_rate" in field.name
]


@pytest.mark.parametrize(("experiment", "field"), RATES)
@pytest.mark.parametrize("value", ["0", "-0.1", "nan", "quick"])
def test_the_learning_rates_of_every_experiment(experiment, field, value, command):
    command(f"run {experiment} --{field.replace('_', '-')} {value}", field if value != "quick" else "quick")


# ---- data sets and files ----


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and neither data nor cache of whoever runs the tests."""
    monkeypatch.delenv("FEDJAX_LAB_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def refuse(request, *_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("fedjax_lab.datasets.tfds_reader.available", lambda *_: False)
    return tmp_path


def test_an_unknown_data_set():
    refused(lambda: fl.datasets.emist_federated, "did you mean 'emnist_federated'?", error=AttributeError)
    pytest.importorskip("tensorflow_datasets")
    refused(lambda: fl.datasets.from_tfds("mnits", fl.datasets.iid(5)), "'mnits'", "did you mean 'mnist'?")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (fl.datasets.mnist, ["train-images-idx3-ubyte.gz", "tfds build mnist", "storage.googleapis.com"]),
        (fl.datasets.emnist_federated, ["emnist_all.sqlite", "storage.googleapis.com"]),
        (fl.datasets.shakespeare_federated, ["shakespeare", "storage.googleapis.com"]),
    ],
)
def test_a_data_set_that_can_not_be_downloaded(call, words, offline):
    ways = ["could not be downloaded", "no network in this test", "data_dir", "FEDJAX_LAB_DATA"]
    refused(call, *ways, *words, error=FileNotFoundError)
    assert contents(offline) == {}


def test_the_command_says_so_too(command, offline):
    command("run fedavg_mnist --quick", "could not be downloaded", "FEDJAX_LAB_DATA")


def _csv(folder):
    path = folder / "people.csv"
    path.write_text("who,height,kind\nann,1.5,0\nbob,1.25,1\nbob,1.75,0\n")
    return path, lambda: fl.FederatedData.from_table(path, client="who", features=["height"], label="kind")


def _parquet(folder):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    path = folder / "people.parquet"
    pandas.DataFrame({"who": ["ann", "bob"], "height": [1.5, 1.25], "kind": [0, 1]}).to_parquet(
        path, write_page_checksum=True
    )
    return path, lambda: fl.FederatedData.from_table(path, client="who", features=["height"], label="kind")


def _leaf(folder):
    for part in ("train", "test"):
        (folder / part).mkdir()
        user = {"users": ["u1"], "num_samples": [1], "user_data": {"u1": {"x": [[1.0]], "y": [0]}}}
        (folder / part / "a.json").write_text(json.dumps(user))
    return folder / "train" / "a.json", lambda: fl.datasets.leaf(folder)


def _idx(folder):
    for split, count in (("train", 30), ("t10k", 20)):
        images = struct.pack(">HBB3I", 0, 8, 3, count, 28, 28) + bytes(range(count)) * 784
        labels = struct.pack(">HBBI", 0, 8, 1, count) + bytes(i % 10 for i in range(count))
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    partition = fl.datasets.iid(3)
    return folder / "t10k-images-idx3-ubyte.gz", lambda: fl.datasets.mnist(partition, data_dir=folder)


def _sqlite(folder):
    federated_files.emnist_folder(folder, "tff")
    return folder / "emnist_all.sqlite", lambda: fl.datasets.emnist_federated(data_dir=folder)


@pytest.mark.parametrize("make", [_csv, _parquet, _leaf, _idx, _sqlite])
@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_a_file_that_is_not_what_it_was(make, damage, offline):
    path, read = make(offline)
    read()
    whole = path.read_bytes()
    place = 40 if path.suffix == ".parquet" else len(whole) // 2  # it has statistics in the middle, which nobody reads
    altered = whole[:place] + b"\xff" * 8 + whole[place + 8 :]
    path.write_bytes({"truncated": whole[:-3], "altered": altered, "empty": b""}[damage])
    before = contents(offline)
    refused(read, path.name)
    assert contents(offline) == before


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("bob,nan,0", ["line 5", "'height'", "empty or NaN"]),
        ("bob,tall,0", ["line 5", "'height'", "'tall'"]),
        ("bob,1.0", ["line 5"]),
        ("bob,1.0,two", ["line 5", "'kind'", "'two'"]),
        (",1.0,0", ["line 5", "'who'"]),
    ],
)
def test_a_bad_line_of_a_table(line, words, tmp_path):
    path, read = _csv(tmp_path)
    path.write_text(path.read_text() + line + "\n")
    refused(read, "people.csv", *words)


# ---- run folders and checkpoints ----


def problem(model=None, rate=0.1, seed=0, algorithm=fedavg):
    return fl.synchronous(algorithm(model or softmax_model(), optax.sgd(rate)), softmax_data(seed=seed), fl.uniform(3))


def test_a_table_without_rows(tmp_path):
    path, read = _csv(tmp_path)
    path.write_text(path.read_text().splitlines()[0] + "\n")
    refused(read, "people.csv", "no rows")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    fl.run(problem(), 2, out=folder, config={"rate": 0.1})
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"config": {"rate": 0.2}}, ["another configuration", "rate was 0.1 there, is 0.2 here"]),
        ({"seed": 1}, ["another configuration", "seed was 0 there, is 1 here"]),
        ({"process": lambda: problem(seed=1)}, ["another configuration", "data was"]),
        ({"process": lambda: problem(rate=0.2)}, ["computes something else", "hyper-parameter"]),
        ({"process": lambda: problem(algorithm=fedadam)}, ["from other code", "server/"]),
        ({"process": lambda: problem(softmax_model(3, 4)._replace(init=_wider))}, ["from other code", "server/"]),
        ({"resume": False}, ["already holds a run"]),
        ({"num_rounds": 1}, ["holds a run of 2 rounds already", "num_rounds=1"]),
    ],
)
def test_a_folder_of_another_run(begun, arguments, words, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    before = contents(folder)
    made = arguments.get("process", problem)()
    call = {"num_rounds": 4, "config": {"rate": 0.1}} | arguments | {"process": made, "out": folder}
    COMPILED.clear()
    raises(lambda: fl.run(**call), *words, str(folder))
    assert not PROGRAMS - {"jit(start)"} & set(COMPILED)  # no round; a state was made, to compare with
    assert contents(folder) == before


def _wider(key):
    return {"w": jax.numpy.zeros((4, 3)), "b": jax.numpy.zeros(3), "more": jax.numpy.zeros(1)}, ()


def test_an_experiments_folder_with_other_settings(command, tmp_path):
    out = common.open_folder(tmp_path / "there", "digits", digits.QUICK)
    before = contents(out)
    command(f"run digits --quick --alpha 0.5 --out {out}", str(out), "alpha was 0.3 there, is 0.5 here")
    command(f"run fedprox_synthetic --quick --out {out}", str(out), "experiment was 'digits' there")
    assert contents(out) == before
