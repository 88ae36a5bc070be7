"""Promise 9: a client whose data or update is NaN, infinite or absurdly large harms no one.

It is as if it were absent, bit for bit, for the server and for every client's state, and it is counted.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedadam import fedadam
from algorithms.fedavg import fedavg
from tests.problems import assert_same_bits, softmax_data, softmax_model

MODEL = softmax_model()
BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "1e38": 1e38}


def roll_call(data) -> fl.Sampler:
    """Everyone is invited; the sampler's state says who answers, so that one compiled step serves all cases."""
    ids = jnp.arange(data.num_clients)
    return fl.Sampler(
        lambda data: jnp.ones(data.num_clients, bool), lambda state, key, data, probe: (ids, state, state)
    )


def without(state, k):
    return state._replace(sampler=state.sampler.at[k].set(False))


@pytest.fixture(scope="module", params=["fedavg_with_state", "fedadam"])
def process(request):
    data = softmax_data()
    kept = {"keep_optimizer_state": True, "epochs": 1}
    round = {
        "fedavg_with_state": fedavg(MODEL, optax.sgd(0.1, momentum=0.9), **kept),
        "fedadam": fedadam(MODEL, optax.sgd(0.1)),
    }[request.param]
    return fl.synchronous(round, data, roll_call(data), lanes=3)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("k", [0, 2, 3])
def test_poisoned_data(process, bad, k):
    data, state = process.data, process.init(jax.random.key(0))
    row = int(data.starts[k]) + int(data.sizes[k]) // 2
    poisoned = dataclasses.replace(data, arrays=data.arrays | {"x": data.arrays["x"].at[row, 1].set(BAD[bad])})
    harmed, metrics = process.step(state, poisoned)
    absent, reference = process.step(without(state, k), data)
    assert_same_bits(harmed._replace(sampler=absent.sampler), absent)
    assert (int(metrics["non_finite"]), int(reference["non_finite"])) == (1, 0)
    assert int(metrics["survivors"]) == int(reference["survivors"]) == data.num_clients - 1
    assert float(metrics["loss"]) == float(reference["loss"])


@pytest.mark.parametrize("leaf", ["w", "b"])
@pytest.mark.parametrize("bad", BAD)
def test_poisoned_updates(leaf, bad):
    """A client that sends garbage in one entry of one leaf."""
    data, inner, villain = softmax_data(), fedavg(MODEL, optax.sgd(0.1)), 4

    def client_update(message, state, client, key, tilt=fl.identity):
        out = inner.client_update(message, state, client, key, tilt)
        update = out.upload.params
        wrong = jnp.where(client.id == villain, BAD[bad], 0.0)
        spoilt = update | {leaf: update[leaf].at[0].add(wrong)}
        return out._replace(upload=out.upload._replace(params=spoilt))

    process = fl.synchronous(inner._replace(client_update=client_update), data, roll_call(data))
    state = process.init(jax.random.key(0))
    harmed, metrics = process.step(state, process.data)
    absent, _ = process.step(without(state, villain), process.data)
    assert_same_bits(harmed.server, absent.server)
    assert int(metrics["non_finite"]) == 1
