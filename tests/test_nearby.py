"""What a cohort reads is read first, and changes nothing."""

import jax
import numpy as np
import pytest

import fedjax_lab as fl
from fedjax_lab import nearby
from tests.compiling import in_a_process

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="for a CPU's caches")

PROGRAM = """
import jax, numpy as np, optax
import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab import nearby
{before}
rng = np.random.default_rng(0)
owners = np.repeat(np.arange(40), rng.integers(1, 9, 40))
arrays = {{"x": rng.normal(size=(len(owners), 5)).astype(np.float32), "y": rng.integers(0, 2, len(owners))}}
data = fl.FederatedData.from_assignment(arrays, owners)
model = fl.models.logistic_regression(2, input_shape=(5,))
learner = fedavg(model, optax.sgd(0.1, momentum=0.9), batch_size=4, keep_optimizer_state={keep})
process = fl.synchronous(learner, data, fl.uniform(12), mesh={mesh})
state = process.init(0)
print(len(jax.make_jaxpr(process.step)(state, process.data).pretty_print()))
for _ in range(5):
    state, _ = process.step(state, process.data)
for leaf in jax.tree.leaves((state.server, state.clients.table)):
    print(np.asarray(leaf).tobytes().hex())
"""


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("mesh", ["None", "fl.devices.mesh(2)"])
def test_the_same_bits(mesh, keep):
    cores = "" if mesh == "None" else "fl.devices.use_cores(2)\n"
    far = [f"{cores}nearby.CACHE = {size}" for size in (0, 1 << 40)]
    (longer, *read), (shorter, *plain) = [
        in_a_process(PROGRAM.format(before=b, mesh=mesh, keep=keep)).split() for b in far
    ]
    assert int(longer) > int(shorter)  # there is something to read
    assert read == plain


def _reads(size: int, clients: int = 40, stored: int = 0) -> bool:
    """Whether a cohort's clients of ``size`` examples of 8 numbers are read first."""
    rows = {"x": np.zeros((clients * size, 8), np.float32), "y": np.zeros(clients * size, np.int32)}
    data = fl.FederatedData.from_assignment(rows, np.repeat(np.arange(clients), size))
    states = fl.ClientStates({"c": np.zeros((clients, stored + 1), np.float32)}, np.zeros(clients, bool))
    ids, then = np.arange(5, dtype=np.int32), np.arange(3)
    traced = jax.make_jaxpr(lambda then, data, states: nearby.read_first(then, data, states, ids))(then, data, states)
    return bool(traced.jaxpr.eqns)


def test_only_small_clients_of_large_populations(monkeypatch):
    assert not _reads(10)  # all of it is in a core's cache
    monkeypatch.setattr(nearby, "CACHE", 0)
    assert _reads(10)
    assert not _reads(1000)
    assert not _reads(10, stored=1000)


def test_nobody_and_places_outside_are_not_read():
    """Seats of nobody are taken for the first: no row of another device, and none beyond the end."""
    data = fl.FederatedData.from_assignment({"x": np.arange(12, dtype=np.float32)}, np.repeat(np.arange(4), 3))
    lines = nearby._lines(data.arrays["x"], np.array([0, 9], np.int32), 3)
    np.testing.assert_allclose(lines, 0 + 3 + 9 + 11)  # a row's first number, and the one after its last, or the last
