"""How a cohort is shared out among devices."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lab.lanes import UNEVEN, plan


def _loads(device, costs, devices):
    return np.bincount(device, costs + 1, minlength=devices)


@pytest.mark.parametrize("devices", [2, 4])
def test_clients_stay_at_home_where_that_keeps_the_devices_even(devices):
    rng, moved, least = np.random.default_rng(0), 0, 0
    for _ in range(20):
        work, home = rng.integers(500, 3500, 20).astype(np.int32), rng.integers(0, devices, 20).astype(np.int32)
        plain, stays = (plan(jnp.asarray(work), 1, devices, at) for at in (None, jnp.asarray(home)))
        slots = np.asarray(stays.slots)[:, 0]
        assert sorted(slots) == list(range(20))
        longest = [_loads(np.asarray(p.device), work[slots], devices).max() for p in (plain, stays)]
        assert longest[1] <= longest[0] * (1 + UNEVEN) * (1 + 1e-6)
        least += np.sum(np.asarray(plain.device) != home[slots])
        moved += np.sum(np.asarray(stays.device) != home[slots])
    assert moved < 0.75 * least


def test_equal_clients_that_lie_evenly_all_stay():
    home = np.array([1, 0, 0, 1, 1, 0], np.int32)
    shared_out = plan(jnp.full(6, 100, jnp.int32), 1, 2, jnp.asarray(home))
    np.testing.assert_array_equal(np.asarray(shared_out.device), home[np.asarray(shared_out.slots)[:, 0]])
