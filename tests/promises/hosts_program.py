"""One of two processes of two CPU devices each; tests/promises/test_hosts.py starts both."""

import json
import sys

import jax

import fedjax_lab as fl

if __name__ == "__main__":
    port, index, case = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    fl.devices.use_cores(2)
    fl.hosts.connect(f"localhost:{port}", 2, index)

import optax

from algorithms.fedavg import fedavg
from tests.problems import softmax_data, softmax_model


def algorithm():
    return fedavg(softmax_model(), optax.sgd(0.1, momentum=0.9), keep_optimizer_state=True, epochs=1, batch_size=10)


def result(mesh, rounds, out=None, **more) -> dict:
    data = softmax_data(empty=1)
    process = fl.synchronous(algorithm(), data, fl.uniform(7), mesh=mesh)
    got = fl.run(process, rounds, every=max(rounds // 4, 1), evaluate=fl.per_client_accuracy(data), out=out, **more)
    flat = [float(x) for leaf in jax.tree.leaves(got.params) for x in leaf.ravel()]
    return {"params": flat, "uplink": got.uplink_bytes, "accuracy": [m.get("accuracy") for m in got.metrics][-1]}


if __name__ == "__main__":
    if case == "compare":
        for rounds in (1, 100):
            print(json.dumps(result(fl.devices.mesh(), rounds)), flush=True)
    elif case == "killed":  # the run that a host leaves; resumed by the same call
        out, rounds = sys.argv[4], int(sys.argv[5])
        print(json.dumps(result(fl.devices.mesh(), rounds, out=out, checkpoint_every=0.0)), flush=True)
    elif case == "unlike":
        data = softmax_data(empty=1 + index)
        fl.synchronous(algorithm(), data, fl.uniform(7), mesh=fl.devices.mesh())
    elif case == "seeds":
        process = fl.synchronous(algorithm(), softmax_data(), fl.uniform(7), mesh=fl.devices.mesh())
        fl.run(process, 2, seed=index)
