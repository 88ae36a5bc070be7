"""Wide convolutions on two CPU devices, with more clients than a few on each."""

import numpy as np
import pytest

from experiments.benchmarks import devices, fresh
from experiments.benchmarks.workloads import WORKLOADS
from fedjax_lab import devices as fl_devices


def agree(began: float, clients: int) -> int:
    """In a process of its own: one round of W3 on one and on two devices, within 1e-6."""
    fl_devices.use_cores(2)
    work = WORKLOADS["w3"]
    devices.check_same(work, work.data(), np.arange(clients), 2)
    return clients


@pytest.mark.slow
def test_the_eleventh_client_of_a_device_is_trained_like_the_first():
    """The gradient of the first layer's kernel is XLA's convolution. Where devices held all of its threads, the queues
    of these were full after some fifty steps, and that gradient wrong (8e-5 in the mean; jax 0.10.2)."""
    assert fresh.call(__name__, "agree", {"clients": 24}, {"XLA_FLAGS": ""}) == 24
