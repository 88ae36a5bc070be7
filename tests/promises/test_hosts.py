"""Promise 5, its second half: two processes give one process's result, and say when one of them is lost."""

import json
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import fedjax_lab as fl
from tests.compiling import environment
from tests.promises.hosts_program import result
from tests.refusals import refused


def start(case: str, *arguments: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.promises.hosts_program", port, str(index), case, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        )
        for index in range(2)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen], seconds: float = 240) -> list[tuple[int, list[dict], str]]:
    out = []
    for process in processes:
        try:
            stdout, stderr = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            stdout, stderr = process.communicate()
        lines = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
        out.append((process.returncode, lines, stderr))
    return out


def test_two_processes_of_two_devices_agree_with_one():
    (code, first, errors), (other, second, _) = finish(start("compare"))
    assert code == other == 0, errors[-2000:]
    assert first == second
    for rounds, got, tolerance in zip((1, 100), first, (1e-6, 1e-5), strict=True):
        alone = result(None, rounds)
        np.testing.assert_allclose(got["params"], alone["params"], rtol=0, atol=tolerance)
        assert got["uplink"] == alone["uplink"]
        assert got["accuracy"] == pytest.approx(alone["accuracy"], abs=1e-6)


@pytest.mark.parametrize(("case", "named"), [("unlike", "the clients' sizes"), ("seeds", "seed")])
def test_processes_that_differ_are_refused(case, named):
    for code, _, errors in finish(start(case)):
        assert code != 0
        assert "of this run differ in" in errors and named in errors.splitlines()[-1], errors[-2000:]


def test_a_lost_process_is_named_and_the_run_resumes(tmp_path):
    """One of two is killed after the first checkpoint; the other says so, and both go on from there."""
    out, rounds = tmp_path / "run", 1200
    processes = start("killed", str(out), str(rounds))
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/0*")) and time.monotonic() < deadline and processes[0].poll() is None:
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    survivor = finish(processes, 150)[0]
    saved = max(int(p.name) for p in out.glob("checkpoints/0*") if p.name.isdigit())
    assert survivor[0] != 0 and saved < rounds, "the run was over before its process was killed"
    assert "lost another process" in survivor[2] or "coordination service" in survivor[2].lower(), survivor[2][-2000:]
    (code, first, errors), (other, second, _) = finish(start("killed", str(out), str(rounds)))
    assert code == other == 0, errors[-2000:]
    assert first == second
    np.testing.assert_allclose(first[0]["params"], result(None, rounds)["params"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("host:1234", 2, None), ["process_id is missing"]),
        (("host", 2, 0), ["host:port", "'host'"]),
        ((":1234", 2, 0), ["host:port"]),
        (("host:70000", 2, 0), ["host:port", "70000"]),
        ((1234, 2, 0), ["host:port", "1234"]),
        (("host:1234", "2", 0), ["num_processes must be a positive integer"]),
        (("host:1234", 2, 2), ["0..1", "got 2"]),
        (("host:1234", 2, True), ["process_id must be an integer", "True"]),
        (("host:1234", 2, 0.5), ["process_id must be an integer", "0.5"]),
    ],
)
def test_processes_that_cannot_be_joined_are_refused_without_waiting(given, words):
    refused(lambda: fl.hosts.connect(*given), *words)


def test_outside_of_a_cluster_one_must_say_who_there_is():
    call = [sys.executable, "-c", "import fedjax_lab as fl; fl.hosts.connect()"]
    done = subprocess.run(call, capture_output=True, text=True, env=environment(1), check=False, timeout=100)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: no cluster's environment was found") and "give coordinator" in last
