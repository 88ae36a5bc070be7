"""What tests/promises/test_devices.py runs with eight CPU devices: one line of JSON for each case."""

import json
import sys

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import fedjax_lab as fl
from algorithms.fedadam import fedadam
from algorithms.fedavg import fedavg
from fedjax_lab import sharding, states
from tests.problems import softmax_data, softmax_model

MODEL = softmax_model()


def median() -> fl.Aggregator:
    """An aggregator that isn't additive: it must see every upload."""

    def reduce(uploads, weights, ok, messages, env):
        return jax.tree.map(
            lambda x: jax.numpy.nanmedian(
                jax.numpy.where(ok.reshape(-1, *[1] * (x.ndim - 1)), x, jax.numpy.nan), axis=0
            ),
            uploads,
        )

    return fl.aggregators.mean()._replace(reduce=reduce)


def cases():
    yield "fedavg", fedavg(MODEL, optax.sgd(0.1), epochs=2, batch_size=10)
    kept = fedavg(MODEL, optax.sgd(0.1, momentum=0.9), keep_optimizer_state=True, epochs=1, batch_size=10)
    yield "client_state", kept
    yield "server_state", fedadam(MODEL, optax.sgd(0.1), epochs=1, batch_size=10)
    yield "median", fedavg(MODEL, optax.sgd(0.1), epochs=1, batch_size=10)._replace(aggregate=median())


def difference(a, b) -> float:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max((float(np.max(np.abs(np.asarray(x, float) - np.asarray(y, float)))) for x, y in leaves), default=0.0)


def compare(round, data, count: int, rounds: int) -> dict:
    one = fl.synchronous(round, data, fl.uniform(max(7, count)))
    many = fl.synchronous(round, data, fl.uniform(max(7, count)), mesh=fl.devices.mesh(count))
    a, b, out = one.init(0), many.init(0), {}
    for done in range(1, rounds + 1):
        (a, m), (b, n) = one.step(a, one.data), many.step(b, many.data)
        if done in (1, rounds):
            clients = [p.clients(s) for p, s in ((one, a), (many, b))]
            out[done] = max(difference(one.params(a), many.params(b)), difference(clients[0], clients[1]))
    out["same_bytes"] = all(np.array_equal(m[k], n[k]) for k in ("uplink_bytes", "downlink_bytes", "survivors"))
    accuracy = [fl.per_client_accuracy(data)(p, s)["accuracy"] for p, s in ((one, a), (many, b))]
    out["accuracy"] = abs(accuracy[0] - accuracy[1])
    return out


def model_axis() -> float:
    """One round over two clients' devices times two that share a layer's columns, against one device."""
    round, data = fedavg(fl.models.mlp(3, hidden=(8,), input_shape=(4,)), optax.sgd(0.1)), softmax_data()
    both = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("clients", "model"))
    one, many = (fl.synchronous(round, data, fl.uniform(4), mesh=mesh) for mesh in (None, both))
    columns = lambda x: jax.device_put(x, NamedSharding(both, P(None, "model") if x.shape == (4, 8) else P()))
    state = many.init(0)
    state = state._replace(server=jax.tree.map(columns, state.server))
    return difference(one.params(one.step(one.init(0), data)[0]), many.params(many.step(state, many.data)[0]))


def slopes(data) -> list[float]:
    """The gradient through two rounds of Ditto by the learning rate: one device, four, and four by forward mode."""

    def objective(rate, mesh):
        plain = fedavg(MODEL, optax.sgd(rate), steps=2, batch_size=5, static=True)
        process = fl.synchronous(
            fl.compose(plain, fl.transforms.personal_model(lam=0.3)), data, fl.uniform(7), mesh=mesh
        )
        state = process.init(jax.random.key(0))
        for _ in range(2):
            state, _ = process.step(state, process.data)
        kept = jax.tree.leaves((process.params(state), process.clients(state).table))
        return sum(jax.numpy.sum(x**2) for x in kept)

    four = fl.devices.mesh(4)
    found = (jax.grad(objective), None), (jax.grad(objective), four), (jax.jacfwd(objective), four)
    return [float(jax.jit(slope, static_argnums=1)(0.1, mesh)) for slope, mesh in found]


def copies() -> int:
    """In how many places a CPU's devices have a data set; the caller's own counts as well."""
    x = np.zeros((1000, 2), np.float32)
    data = fl.FederatedData.from_arrays({"x": x, "y": np.zeros(len(x), int)}, np.zeros(len(x), int))
    there = sharding.placed(data, fl.devices.mesh()).data.arrays["x"]
    places = {shard.data.unsafe_buffer_pointer() for shard in there.addressable_shards}
    return len(places | {x.ctypes.data})


if __name__ == "__main__":
    print(json.dumps({"case": "placed", "devices": jax.device_count(), "copies": copies()}), flush=True)
    print(json.dumps({"case": "model_axis", "devices": 4, "apart": model_axis()}), flush=True)
    data = softmax_data(empty=1)
    rounds = int(sys.argv[1])
    for name, round in cases():
        for count in (2, 4, 8) if name == "fedavg" else (4,):
            print(json.dumps({"case": name, "devices": count, **compare(round, data, count, rounds)}), flush=True)
    print(json.dumps({"case": "slopes", "devices": 4, "slopes": slopes(data)}), flush=True)
    states.LARGE_ROW = 0  # from one device to another one by one
    alone = compare(dict(cases())["client_state"], data, 4, rounds)
    print(json.dumps({"case": "large_state", "devices": 4, **alone}), flush=True)
    print(json.dumps({"case": "large_slopes", "devices": 4, "slopes": slopes(data)}), flush=True)
