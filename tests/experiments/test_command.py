"""The command: what it lists, runs, refuses, and the codes that it ends with. The experiment is a toy one."""

import dataclasses
import json
import types

import jax
import pytest

from experiments import cli, common, registry

CHECK = common.Check("a sum", 3, 3, "exact", True, "arithmetic")


@dataclasses.dataclass(frozen=True)
class Config:
    num_rounds: int = 3
    """How many rounds."""
    rate: float = 0.5
    """How fast."""
    data_dir: str | None = None
    """Where the data are."""

    def __post_init__(self):
        if self.rate <= 0:
            raise ValueError(f"rate must be positive; got {self.rate}")


def toy(checks=(), main=None):
    """An experiment that trains nothing."""

    def run(config, out):
        common.write_report(out, "Toy", {"Rounds": str(config.num_rounds)})
        return common.summary([{"run": "toy", "rounds": config.num_rounds}], checks)

    return types.SimpleNamespace(
        __doc__="A toy. \n\nMore.", Config=Config, main=main or run, QUICK=Config(1), PAPER=Config(2)
    )


@pytest.fixture
def experiments(monkeypatch, tmp_path):
    """Toys by name, in an empty current folder."""
    known = {"toy": toy([CHECK])}
    monkeypatch.setattr(registry, "find", lambda: known)
    monkeypatch.chdir(tmp_path)
    return known


def command(*argv: str) -> int:
    return cli.main([*argv, "--no-cache"] if argv and argv[0] != "list" else list(argv))


def test_list_shows_names_and_first_lines(capsys):
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line for line in lines}
    assert list(listed) == sorted(listed)
    assert {"digits", "fedavg_mnist", "fedprox_synthetic", "pfedme_mnist"} <= set(listed)
    reproduced = {name: line.endswith("[reproduce]") for name, line in listed.items()}
    assert reproduced["fedavg_mnist"] and reproduced["pfedme_mnist"] and not reproduced["digits"]
    assert "FedAvg, FedProx and local training on handwritten digits" in listed["digits"]


def test_run_writes_settings_summary_and_report(experiments, tmp_path, capsys):
    assert command("run", "toy", "--num-rounds", "7", "--out", "here") == 0
    assert json.loads((tmp_path / "here/config.json").read_text()) == {
        "experiment": "toy", "num_rounds": 7, "rate": 0.5,
    }  # fmt: skip
    summary = json.loads((tmp_path / "here/summary.json").read_text())
    assert summary["results"] == [{"run": "toy", "rounds": 7}]
    assert summary["checks"] == [
        {"name": "a sum", "paper": 3, "ours": 3, "tolerance": "exact", "ok": True, "source": "arithmetic"}
    ]
    assert "writing to here" in capsys.readouterr().out


def test_a_folder_of_its_own_by_default(experiments, tmp_path):
    assert command("run", "toy") == command("run", "toy") == 0
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert all(f.name.startswith("toy-20") and (f / "summary.json").is_file() for f in folders)


def test_quick_settings_can_be_changed_too(experiments, tmp_path):
    assert command("run", "toy", "--quick", "--rate", "0.1", "--out", "q") == 0
    config = json.loads((tmp_path / "q/config.json").read_text())
    assert (config["num_rounds"], config["rate"]) == (1, 0.1)


def test_the_same_folder_with_other_settings_is_refused(experiments, tmp_path, capsys):
    assert command("run", "toy", "--out", "a", "--data-dir", "x") == 0
    assert command("run", "toy", "--out", "a", "--data-dir", "y") == 0  # where the data lie is no setting
    before = (tmp_path / "a/summary.json").read_bytes()
    assert command("run", "toy", "--out", "a", "--rate", "0.25") == 2
    assert "rate was 0.5 there, is 0.25 here" in capsys.readouterr().err
    assert (tmp_path / "a/summary.json").read_bytes() == before


def test_a_folder_of_something_else_is_refused(experiments, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").touch()
    assert command("run", "toy", "--out", "photos") == 2
    assert "holds other files" in capsys.readouterr().err
    assert [f.name for f in (tmp_path / "photos").iterdir()] == ["cat.png"]


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["rum", "toy"], "did you mean 'run'"),
        (["run", "toi"], "unknown experiment 'toi'; did you mean 'toy'"),
        (["run", "zzz"], "there are toy"),
        (["reproduce", "toi"], "did you mean 'toy'"),
        (["run", "toy", "--num-round", "3"], "--num-rounds"),
        (["run", "toy", "--num-rounds", "three"], "--num-rounds"),
        (["run", "toy", "--rate", "-1"], "rate must be positive"),
        (["reproduce", "--quik"], "--quick"),
        (["run"], "one of: toy"),
        (["run", "--quick", "toy"], "name comes before its settings"),
    ],
)
def test_wrong_usage_names_the_nearest_and_ends_with_two(experiments, tmp_path, capsys, argv, hint):
    assert command(*argv) == 2
    told = capsys.readouterr()
    assert hint in told.err + told.out
    assert "Traceback" not in told.err
    assert not list(tmp_path.iterdir())


def test_help_explains_the_settings(experiments, capsys):
    assert command("run", "toy", "--help") == 0
    told = capsys.readouterr().out
    assert "How many rounds." in told and "--data-dir" in told and "--quick" in told
    assert command("reproduce", "--help") == command("--help") == command("run", "--help") == 0
    assert cli.main([]) == 2


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("a client has no arrays"), "error: a client has no arrays"),
        (FileNotFoundError("MNIST is in none of the folders"), "error: MNIST is in none"),
        (ImportError("needs pandas: pip install 'fedjax-lab[data]'"), "fedjax-lab[data]"),
    ],
)
def test_errors_are_one_message_unless_debugging(experiments, capsys, error, told):
    def main(config, out):
        raise error

    experiments["toy"] = toy(main=main)
    assert command("run", "toy", "--out", "a") == 2
    shown = capsys.readouterr().err
    assert told in shown and "Traceback" not in shown
    assert command("run", "toy", "--out", "a", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_ends_with_130(experiments, capsys):
    def main(config, out):
        raise KeyboardInterrupt

    experiments["toy"] = toy(main=main)
    assert command("run", "toy", "--out", "a") == 130
    assert "the same command with --out a goes on" in capsys.readouterr().err


def test_reproduce_takes_the_papers_settings_and_fails_if_one_figure_is_not_met(experiments, tmp_path, capsys):
    experiments["other"] = toy([CHECK, CHECK._replace(name="a product", ours=5, ok=False)])
    experiments["plain"] = toy()
    del experiments["plain"].PAPER
    assert command("reproduce", "toy", "--out", "r") == 0
    assert json.loads((tmp_path / "r/toy/config.json").read_text())["num_rounds"] == 2
    assert command("reproduce", "--out", "s") == 1
    assert sorted(f.name for f in (tmp_path / "s").iterdir()) == ["other", "toy"]
    told = capsys.readouterr().out
    assert "NOT OK" in told and "2 of 3 evaluated checks ok, 0 skipped" in told
    assert command("reproduce", "plain") == 2
    assert "reproduces no published figures" in capsys.readouterr().err


def test_reproduce_lists_what_it_could_not_evaluate_and_does_not_call_it_ok(experiments, tmp_path, capsys):
    experiments["toy"] = toy([CHECK._replace(ok=None, reason="num_rounds is 1 instead of 2")])
    assert command("reproduce", "toy", "--quick", "--out", "r") == 0
    summary = json.loads((tmp_path / "r/toy/summary.json").read_text())
    assert summary["checks"] == []
    assert summary["skipped"] == [
        {"name": "a sum", "paper": 3, "tolerance": "exact", "source": "arithmetic",
         "reason": "num_rounds is 1 instead of 2"},
    ]  # fmt: skip
    assert "0 of 0 evaluated checks ok, 1 skipped" in capsys.readouterr().out


def test_reproduce_goes_on_behind_an_experiment_that_cannot_run(experiments, tmp_path, capsys):
    def main(config, out):
        raise FileNotFoundError(f"no data in {config.data_dir}")

    experiments["absent"] = toy(main=main)
    assert command("reproduce", "--out", "r", "--data-dir", "nowhere") == 2
    assert "absent: no data in nowhere" in capsys.readouterr().err
    assert (tmp_path / "r/toy/summary.json").is_file()


def test_compiled_programs_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    changed = {}
    monkeypatch.setattr(jax.config, "update", changed.__setitem__)
    cli._set_up(cache=False)
    assert not changed
    cli._set_up(cache=True)
    assert changed["jax_compilation_cache_dir"] == str(tmp_path / "fedjax_lab" / "compiled")
    changed.clear()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    cli._set_up(cache=True)
    assert not changed


def test_settings_that_are_refused_late_leave_the_folder_free(experiments, capsys):
    def refuses(config, out):
        if config.num_rounds > 5:
            raise ValueError("too many rounds")
        (out / "runs").mkdir()
        return common.summary([])

    experiments["toy"] = toy(main=refuses)
    assert command("run", "toy", "--num-rounds", "9", "--out", "here") == 2
    assert "too many rounds" in capsys.readouterr().err
    assert command("run", "toy", "--num-rounds", "2", "--out", "here") == 0
    # What ran is not given up for a refusal.
    assert command("run", "toy", "--num-rounds", "9", "--out", "here") == 2
    assert "num_rounds was 2 there" in capsys.readouterr().err
