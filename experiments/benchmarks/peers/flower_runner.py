"""Flower's side: its simulation on Ray, with clients in PyTorch; runs in Flower's environment.

``python flower_runner.py TASK.npz OUTCOME '{"actors": 2}'``; see exchange.py for the files. There are as
many nodes as clients in a cohort; in each round, a node is another client.
"""

import json
import os
import sys
import time
from importlib.metadata import version


def main(task, outcome, options):
    import numpy as np
    import torch_models
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    task = os.path.abspath(task)
    arrays, settings, params = torch_models.load(task)
    rounds, cohort = arrays["cohorts"].shape
    moments, final = [], {}

    client_app = ClientApp()

    @client_app.train()
    def train(message, context):
        import torch
        import torch_models

        torch.set_num_threads(1)
        arrays, settings, params = torch_models.load(task)
        k = arrays["cohorts"][message.content["config"]["server-round"] - 1, context.node_config["partition-id"]]
        rows = slice(arrays["starts"][k], arrays["starts"][k] + arrays["sizes"][k])
        x, y = torch.from_numpy(arrays["x"][rows]), torch.from_numpy(arrays["y"][rows]).long()
        model = torch_models.network(settings, params)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=settings["learning_rate"])
        size = settings["batch_size"]
        for _ in range(settings["epochs"]):
            order = torch.randperm(len(y))
            for batch in order.split(size):
                optimizer.zero_grad()
                torch_models.loss(model(x[batch]), y[batch]).backward()
                optimizer.step()
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(y)})}
        return Message(content=RecordDict(content), reply_to=message)

    class Timed(FedAvg):
        def configure_train(self, *args, **kwargs):
            moments.append([time.perf_counter()])
            return super().configure_train(*args, **kwargs)

        def aggregate_train(self, *args, **kwargs):
            out = super().aggregate_train(*args, **kwargs)
            moments[-1].append(time.perf_counter())
            return out

    server_app = ServerApp()

    @server_app.main()
    def serve(grid, context):
        model = torch_models.network(settings, params)
        strategy = Timed(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=cohort, min_available_nodes=cohort
        )  # fmt: skip
        result = strategy.start(grid=grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=rounds)
        model.load_state_dict(result.arrays.to_torch_state_dict())
        final.update(torch_models.result(model, params))

    run_simulation(
        server_app,
        client_app,
        num_supernodes=cohort,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": json.loads(options)["actors"], "include_dashboard": False},
        },
    )
    np.savez(f"{outcome}.npz", **final)
    versions = {"flower": version("flwr"), "ray": version("ray"), "torch": version("torch")}
    with open(f"{outcome}.json", "w") as file:
        json.dump({"seconds": [end - start for start, end in moments], "versions": versions}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
