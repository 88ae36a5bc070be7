"""What test_devices.py runs with two CPU devices: one line of JSON for each wire."""

import json

import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab import wire
from tests.problems import softmax_data, softmax_model
from tests.promises.mesh_program import compare


def cases():
    base = fedavg(softmax_model(), optax.sgd(0.1), epochs=1, batch_size=10)
    up = lambda *links, **options: fl.compose(base, fl.uplink(*links, **options))
    yield "memory", up(wire.error_feedback(wire.chain(wire.top_k(0.3), wire.qsgd(6), wire.elias())))
    yield "summed", up(wire.hadamard(), wire.random_k(0.5), wire.quantize(6))
    yield "levels", up(wire.eden(5))  # more than sixteen levels are looked up in a table
    yield "server state", up(wire.error_feedback(wire.power_sgd(1)))
    yield "integers", up(wire.fixed_point(limit=4.0, clients=9), max_weight=30)
    yield "both ways", fl.compose(base, fl.downlink(wire.qsgd(6)), fl.uplink(wire.fetch_sgd(3, width=32, k=5)))


if __name__ == "__main__":
    for name, round in cases():
        print(json.dumps({"case": name, **compare(round, softmax_data(empty=1), 2, 2)}), flush=True)
