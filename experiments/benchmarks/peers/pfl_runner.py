"""pfl-research's side, in PyTorch; runs in pfl's environment.

``python pfl_runner.py TASK.npz OUTCOME '{"threads": 1}'``; see exchange.py for the files.
"""

import json
import sys
import time
import types
from importlib.metadata import version


def main(task, outcome, options):
    import asyncio

    import numpy as np
    import torch
    import torch_models
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    asyncio.set_event_loop(asyncio.new_event_loop())  # which pfl expects to find
    torch.set_num_threads(json.loads(options)["threads"])
    arrays, settings, params = torch_models.load(task)
    x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]).long()
    clients = {
        k: Dataset((x[s : s + n], y[s : s + n]), user_id=str(k))
        for k, (s, n) in enumerate(zip(arrays["starts"], arrays["sizes"], strict=True))
    }
    model = torch_models.network(settings, params)
    model.loss = types.MethodType(lambda self, x, y: torch_models.loss(self(x), y), model)
    model.metrics = types.MethodType(lambda self, x, y: {"examples": Weighted(len(y), 1)}, model)

    order = iter(arrays["cohorts"].ravel().tolist())
    population = FederatedDataset(lambda k: clients[k], lambda: next(order, 0))
    moments = [time.perf_counter()]

    class Clock(TrainingProcessCallback):
        def on_train_begin(self, *, model):
            moments[0] = time.perf_counter()
            return Metrics()

        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            moments.append(time.perf_counter())
            return False, Metrics()

    rounds, cohort = arrays["cohorts"].shape
    FederatedAveraging().run(
        # Its metrics are asked for in the first round only, which is not timed.
        NNAlgorithmParams(rounds, evaluation_frequency=rounds + 1, train_cohort_size=cohort, val_cohort_size=0),
        SimulatedBackend(population, population, postprocessors=[WeightByDatapoints()]),
        PyTorchModel(model, torch.optim.SGD, torch.optim.SGD(model.parameters(), lr=1.0)),
        NNTrainHyperParams(
            local_batch_size=settings["batch_size"],
            local_num_epochs=settings["epochs"],
            local_learning_rate=settings["learning_rate"],
        ),
        callbacks=[Clock()],
    )
    np.savez(f"{outcome}.npz", **torch_models.result(model, params))
    versions = {"pfl": version("pfl"), "torch": torch.__version__}
    with open(f"{outcome}.json", "w") as file:
        json.dump({"seconds": np.diff(moments).tolist(), "versions": versions}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
