"""FedJAX's side; runs in FedJAX's environment, and knows nothing of this project but the files' format.

``python fedjax_runner.py TASK.npz OUTCOME '{"backend": "jit"}'``; see exchange.py for the files.
"""

import json
import sys
import time
from importlib.metadata import version


def load(file):
    """The arrays of a task file, its settings, and its parameters by name."""
    import numpy as np

    with np.load(file, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    params = {name.removeprefix("params/"): arrays.pop(name) for name in list(arrays) if name.startswith("params/")}
    return arrays, json.loads(str(arrays.pop("task"))), params


def scores(settings, params):
    """The model in Haiku, as FedJAX writes its own: ``(x) -> scores``."""
    import haiku as hk
    import jax
    import jax.numpy as jnp

    classes = len(params["output/bias"])

    def linear(x):
        return hk.Linear(classes, name="output")(x)

    def cnn(x):
        x = jax.nn.relu(hk.Conv2D(32, (3, 3), padding="VALID", name="conv_0")(x))
        x = jax.nn.relu(hk.Conv2D(64, (3, 3), padding="VALID", name="conv_1")(x))
        x = hk.MaxPool((1, 2, 2, 1), (1, 2, 2, 1), "VALID")(x)
        x = jax.nn.relu(hk.Linear(128, name="dense")(hk.Flatten()(x)))
        return hk.Linear(classes, name="output")(x)

    def lstm(x):
        embedded = hk.Embed(*params["embed/embedding"].shape, name="embed")(jnp.transpose(x))
        units = params["lstm_0/recurrent"].shape[0]
        core = hk.DeepRNN([hk.LSTM(units, name="lstm_0"), hk.LSTM(units, name="lstm_1")])
        # FedJAX's own unrolls statically, which had not compiled after four minutes for 80 characters.
        out, _ = hk.dynamic_unroll(core, embedded, core.initial_state(embedded.shape[1]))
        return jnp.transpose(hk.Linear(classes, name="output")(out), (1, 0, 2))

    return {"linear": linear, "cnn": cnn, "lstm": lstm}[settings["model"]]


def to_haiku(params):
    """Our names and layouts -> Haiku's: gates as input, cell, forget, output; one is added to the forget gate."""
    import numpy as np

    tree = {}
    for name, value in params.items():
        module, leaf = name.rsplit("/", 1)
        if not module.startswith("lstm_"):
            leaf = {"kernel": "w", "bias": "b", "embedding": "embeddings"}[leaf]
            tree.setdefault(module, {})[leaf] = value
    for layer in sorted({name.split("/")[0] for name in params if name.startswith("lstm_")}):
        i, f, g, o = np.split(params[f"{layer}/input/bias"], 4)
        both = np.concatenate([params[f"{layer}/input/kernel"], params[f"{layer}/recurrent"]])
        tree[f"{layer}/linear"] = {"w": swapped(both), "b": np.concatenate([i, g, f - 1, o])}
    return tree


def from_haiku(tree, params):
    """The inverse of :func:`to_haiku`, for the names of ``params``."""
    import numpy as np

    out = {}
    for name in params:
        module, leaf = name.rsplit("/", 1)
        if not module.startswith("lstm_"):
            out[name] = np.asarray(tree[module][{"kernel": "w", "bias": "b", "embedding": "embeddings"}[leaf]])
            continue
        layer = name.split("/")[0]
        inputs = params[f"{layer}/input/kernel"].shape[0]
        w, b = (np.asarray(tree[f"{layer}/linear"][k]) for k in ("w", "b"))
        i, g, f, o = np.split(b, 4)
        bias = np.concatenate([i, f + 1, g, o])
        out[name] = {"input/kernel": swapped(w)[:inputs], "recurrent": swapped(w)[inputs:], "input/bias": bias}[
            name.split("/", 1)[1]
        ]
    return out


def swapped(w):
    """The second and third of four blocks of columns, exchanged."""
    import numpy as np

    first, second, third, fourth = np.split(w, 4, axis=1)
    return np.concatenate([first, third, second, fourth], axis=1)


def main(task, outcome, options):
    import jax
    import numpy as np

    jax.__dict__["tree_map"] = jax.tree_util.tree_map  # FedJAX 0.0.17 was written for a jax that still had it
    import fedjax
    import haiku as hk
    import jax.numpy as jnp

    arrays, settings, params = load(task)
    clients = [
        fedjax.ClientDataset({"x": arrays["x"][s : s + n], "y": arrays["y"][s : s + n]})
        for s, n in zip(arrays["starts"], arrays["sizes"], strict=True)
    ]
    network = scores(settings, params)

    def train_loss(batch, out):
        labels = jnp.take_along_axis(jax.nn.log_softmax(out), batch["y"][..., None], axis=-1)
        return -labels.reshape(len(out), -1).mean(axis=-1)

    sample = {"x": arrays["x"][:1], "y": arrays["y"][:1]}
    model = fedjax.create_model_from_haiku(hk.transform(lambda batch: network(batch["x"])), sample, train_loss)
    fedjax.set_for_each_client_backend(json.loads(options)["backend"])
    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        fedjax.model_grad(model),
        fedjax.optimizers.sgd(settings["learning_rate"]),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(settings["batch_size"], num_epochs=settings["epochs"], seed=0),
    )
    state = algorithm.init(jax.tree_util.tree_map(jnp.asarray, to_haiku(params)))
    key = jax.random.PRNGKey(0)
    seconds = []
    for cohort in arrays["cohorts"]:
        key, *keys = jax.random.split(key, len(cohort) + 1)
        start = time.perf_counter()
        chosen = [(int(k), clients[k], rng) for k, rng in zip(cohort, keys, strict=True)]
        state, _ = algorithm.apply(state, chosen)
        jax.block_until_ready(state.params)
        seconds.append(time.perf_counter() - start)
    np.savez(f"{outcome}.npz", **from_haiku(state.params, params))
    with open(f"{outcome}.json", "w") as file:
        json.dump({"seconds": seconds, "versions": {"fedjax": version("fedjax"), "jax": jax.__version__}}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
