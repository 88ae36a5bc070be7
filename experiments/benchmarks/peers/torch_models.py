"""The workloads' models in PyTorch, for the runners of peers that use it; knows nothing of this project."""

import functools
import json


@functools.cache
def load(file):
    """The arrays of a task file, its settings, and its parameters by name; images as PyTorch has them.

    Read once in each process.
    """
    import numpy as np

    with np.load(file, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    params = {name.removeprefix("params/"): arrays.pop(name) for name in list(arrays) if name.startswith("params/")}
    settings = json.loads(str(arrays.pop("task")))
    if settings["model"] == "cnn":
        arrays["x"] = np.ascontiguousarray(arrays["x"].transpose(0, 3, 1, 2))
    return arrays, settings, params


def network(settings, params):
    """The model, with the given parameters: ``(x) -> scores``."""
    import torch
    from torch import nn

    classes = len(params["output/bias"])
    if settings["model"] == "linear":
        model = nn.Sequential()
        model.add_module("output", nn.Linear(params["output/kernel"].shape[0], classes))
    elif settings["model"] == "cnn":
        model = nn.Sequential()
        model.add_module("conv_0", nn.Conv2d(params["conv_0/kernel"].shape[2], 32, 3))
        model.add_module("relu_0", nn.ReLU())
        model.add_module("conv_1", nn.Conv2d(32, 64, 3))
        model.add_module("relu_1", nn.ReLU())
        model.add_module("pool", nn.MaxPool2d(2))
        model.add_module("flatten", nn.Flatten())
        model.add_module("dense", nn.Linear(params["dense/kernel"].shape[0], 128))
        model.add_module("relu_2", nn.ReLU())
        model.add_module("output", nn.Linear(128, classes))
    else:
        model = _characters(params)
    with torch.no_grad():
        own = dict(model.named_parameters())
        for name, value in _to_torch(params).items():
            own[name].copy_(torch.from_numpy(value.copy()))
    return model


def _characters(params):
    from torch import nn

    vocabulary, embed = params["embed/embedding"].shape
    units = params["lstm_0/recurrent"].shape[0]

    class Characters(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(vocabulary, embed)
            self.lstm = nn.LSTM(embed, units, num_layers=2, batch_first=True)
            self.output = nn.Linear(units, vocabulary)
            for layer in (0, 1):  # PyTorch has two biases where one would do: the second stays zero
                bias = getattr(self.lstm, f"bias_hh_l{layer}")
                nn.init.zeros_(bias)
                bias.requires_grad_(False)

        def forward(self, x):
            return self.output(self.lstm(self.embed(x))[0])

    return Characters()


def loss(out, y):
    """Mean cross-entropy over all labels; ``[batch, classes]`` or ``[batch, time, classes]``."""
    import torch

    return torch.nn.functional.cross_entropy(out.reshape(-1, out.shape[-1]), y.reshape(-1).long())


def result(model, params):
    """The model's parameters under our names and in our layouts."""
    import numpy as np

    own = {name: value.detach().numpy() for name, value in model.named_parameters()}
    out = {}
    for name, value in params.items():
        torch_name, back = _layout(name, params)[0], _layout(name, params)[2]
        out[name] = np.ascontiguousarray(back(own[torch_name])).reshape(value.shape)
    return out


def _to_torch(params):
    return {_layout(name, params)[0]: _layout(name, params)[1](value) for name, value in params.items()}


def _layout(name, params):
    """PyTorch's name for one of ours, and the way there and back between the layouts."""
    import numpy as np

    same = lambda a: a
    module, leaf = name.split("/", 1)
    if module.startswith("lstm_"):
        layer = module.removeprefix("lstm_")
        names = {"input/kernel": "weight_ih", "recurrent": "weight_hh", "input/bias": "bias_ih"}
        turn = same if leaf == "input/bias" else np.transpose
        return f"lstm.{names[leaf]}_l{layer}", turn, turn
    if leaf == "embedding":
        return "embed.weight", same, same
    if leaf == "bias":
        return f"{module}.bias", same, same
    if module.startswith("conv_"):
        return f"{module}.weight", lambda a: a.transpose(3, 2, 0, 1), lambda a: a.transpose(2, 3, 1, 0)
    if module == "dense":  # after the flattening: [height, width, channels] here, [channels, height, width] there
        rows, units = params[name].shape
        channels = params["conv_1/kernel"].shape[3]
        side = round((rows // channels) ** 0.5)
        there = lambda a: a.reshape(side, side, channels, units).transpose(3, 2, 0, 1).reshape(units, rows)
        back = lambda a: a.reshape(units, channels, side, side).transpose(2, 3, 1, 0).reshape(rows, units)
        return f"{module}.weight", there, back
    return f"{module}.weight", np.transpose, np.transpose
