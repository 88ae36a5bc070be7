"""Links on several devices: nothing is closed over, and nothing depends on where a client runs."""

import json
import subprocess
import sys

import pytest

from tests.compiling import environment


@pytest.mark.slow
def test_two_devices_agree_with_one():
    """After one round: later ones may round a level up where the other rounds it down."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.wire.mesh_program"],
        capture_output=True, text=True, env=environment(2), check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert set(rows) == {"memory", "summed", "levels", "server state", "integers", "both ways"}
    for name, row in rows.items():
        assert row["1"] < 1e-6, name
