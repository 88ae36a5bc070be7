"""What experiments share: running all of their trainings, folders, tables, figures for people."""

import json

import jax
import pytest

import fedjax_lab as fl
from algorithms.fedsgd import fedsgd
from experiments import common
from tests.problems import assert_same_bits, softmax_data, softmax_model


@pytest.fixture(scope="module")
def process():
    import optax

    return fl.synchronous(fedsgd(softmax_model(), optax.sgd(0.1)), softmax_data(), fl.uniform(3))


def trainings(process, rounds=4, **options):
    def start(seed):
        return lambda folder, stop: fl.run(process, rounds, seed, out=folder, callbacks=[stop], every=2, **options)

    return {f"seed={seed}": start(seed) for seed in (3, 1, 2)}


def test_trainings_side_by_side_are_those_one_after_the_other(process, tmp_path):
    a = common.run_all(trainings(process), tmp_path / "a", lambda result: "done")
    b = common.run_all(trainings(process), tmp_path / "b", lambda result: "done", workers=3)
    assert list(a) == list(b) == ["seed=3", "seed=1", "seed=2"]
    for name in a:
        assert_same_bits(a[name].params, b[name].params)
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert [(r["run"], r["round"]) for r in lines] == [(n, i) for n in a for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_was_interrupted_goes_on_and_ends_in_the_same_bits(process, tmp_path, workers, capsys):
    whole = common.run_all(trainings(process), tmp_path / "whole", lambda result: "done")
    broken = trainings(process)
    inner = broken["seed=1"]

    def dies(folder, stop):
        inner(folder, lambda info: "enough" if info.round == 2 else None)
        raise KeyboardInterrupt

    broken["seed=1"] = dies
    with pytest.raises(KeyboardInterrupt):
        common.run_all(broken, tmp_path / "cut", lambda result: "done", workers)
    runs = {json.loads(line)["run"] for line in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()}
    assert "seed=1" not in runs
    again = common.run_all(trainings(process), tmp_path / "cut", lambda result: "done", workers)
    for name in whole:
        assert_same_bits(whole[name].params, again[name].params)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert capsys.readouterr().out.count("[3/3]") == 2


def test_a_process_that_is_full_of_programs_forgets_them_and_goes_on(process, tmp_path, monkeypatch):
    whole = common.run_all(trainings(process), tmp_path / "whole", lambda result: "done", workers=3)
    forgotten = []
    monkeypatch.setattr(common, "crowded", lambda: True)
    monkeypatch.setattr(common.jax, "clear_caches", lambda real=jax.clear_caches: (forgotten.append(1), real()))
    again = common.run_all(trainings(process), tmp_path / "again", lambda result: "done", workers=3)
    assert len(forgotten) == 3
    for name in whole:
        assert_same_bits(whole[name].params, again[name].params)


@pytest.mark.parametrize(("pieces", "most", "full"), [(6, "10\n", True), (5, "10\n", False), (9, "?", False)])
def test_a_process_is_crowded_beyond_half_of_the_most_pieces(tmp_path, pieces, most, full):
    (tmp_path / "maps").write_text("7f00-7f01 r--p\n" * pieces)
    (tmp_path / "most").write_text(most)
    assert common.crowded(tmp_path / "maps", tmp_path / "most") == full
    assert not common.crowded(tmp_path / "nothing", tmp_path / "most")


def test_checks_for_people():
    checks = [
        common.Check("a", 3, 3.14159, "exact", False, "s"),
        common.Check("b|c", "1 to 2", {"x": [1.0, 2.0]}, "inside", None, "s", "not run"),
    ]
    assert common.check_table(checks).markdown().splitlines()[2:] == [
        "| a | 3 | 3.142 | exact | NOT OK |",
        "| b\\|c | 1 to 2 | x 1 2 | inside | skipped: not run |",
    ]


def test_figures_for_people():
    sizes = [common.size(n) for n in (0, 999, 1000, 1.25e6, 3e9)]
    assert sizes == ["0 bytes", "999 bytes", "1.0 kB", "1.2 MB", "3.0 GB"]
    assert common.percent(0.1234) == "12.3%"


def test_the_last_value_of_a_metric_or_that_of_a_round():
    records = [{"round": 0, "a": 1.0}, {"round": 1, "a": 2.0}, {"round": 2}]
    result = fl.Result(None, None, records, 0, 0, 2, "", 0.0, 0.0)
    assert (common.at(result, "a"), common.at(result, "a", 0)) == (2.0, 1.0)
    with pytest.raises(ValueError, match="no record of a after round 2"):
        common.at(result, "a", 2)
