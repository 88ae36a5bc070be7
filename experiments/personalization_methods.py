"""The methods of the personalisation study, each in the line that builds it."""

from collections.abc import Callable
from typing import Any

import jax
import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.fedem import fedem
from algorithms.fedrecon import fedrecon
from algorithms.fedrep import fedrep
from algorithms.ifca import ifca
from algorithms.knn_per import knn_per
from algorithms.local_only import local_only
from algorithms.mocha import mocha
from algorithms.mocha_couplings import mean_regularized
from algorithms.pfedhn import pfedhn
from algorithms.virtual import virtual

LOCAL, FEDAVG, MOCHA = "local", "FedAvg", "MOCHA"
HEAD, BODY = fl.transforms.leaves("params/output/*"), fl.transforms.leaves("params/hidden_*")


def methods(config: Any, classes: int) -> dict[str, Callable[[], fl.Round]]:
    """By name: what builds each method's Round. MOCHA's losses are for two classes."""
    model, sgd = fl.models.mlp(classes, hidden=(config.hidden,)), optax.sgd(config.learning_rate)
    work: dict[str, Any] = {"epochs": config.epochs, "batch_size": config.batch_size}
    base = fedavg(model, sgd, **work)
    over = lambda *transforms: lambda: fl.compose(base, *transforms)
    transforms = fl.transforms
    gentle = optax.sgd(config.learning_rate / config.pfedme_lam)  # pFedMe's gradients are lam times a distance
    made: dict[str, Callable[[], fl.Round]] = {
        LOCAL: lambda: local_only(model, sgd, **work),
        FEDAVG: lambda: base,
        "fine-tuned": over(transforms.fine_tuning()),
        "Ditto": over(transforms.personal_model(config.ditto_lam)),
        "pFedMe": lambda: fl.compose(
            fedavg(model, gentle, **work),
            transforms.pfedme(config.pfedme_lam, inner_learning_rate=config.learning_rate / 2, inner_steps=5),
        ),
        "APFL": over(transforms.apfl(0.5, learn_alpha=True)),
        "FedPer": over(transforms.private(HEAD)),
        "FedRep": lambda: fedrep(model, sgd, head=HEAD, head_epochs=config.epochs, **work),
        "LG-FedAvg": over(transforms.private(BODY)),
        "FedRecon": lambda: fedrecon(model, sgd, private=HEAD, reconstruction_steps=30, **work),
        "Per-FedAvg": over(transforms.per_fedavg(config.learning_rate, support_batch_size=config.batch_size)),
        "kNN-Per": lambda: knn_per(model, sgd, features=hidden_layer, **work),
        "pFedHN": lambda: pfedhn(model, sgd, embedding_learning_rate=0.1, **work),
        "coupled": over(transforms.coupling(config.ditto_lam)),
        "IFCA": lambda: ifca(model, sgd, k=config.clusters, **work),
        "FedEM": lambda: fedem(model, sgd, M=config.clusters, **work),
        "VIRTUAL": lambda: virtual(
            model, optax.adam(0.01), prior_scale=0.1, kl_weight=0.1, damping=1 / config.cohort_size, private=HEAD,
            predictions=8, **work,
        ),
    }  # fmt: skip
    if classes == 2:
        made[MOCHA] = lambda: mocha(
            loss="logistic", coupling=mean_regularized(1.0, 1.0), bias=True, epochs=config.epochs
        )
    return made


def hidden_layer(variables: fl.Variables, x: jax.Array) -> jax.Array:
    """What kNN-Per compares: the activations of the hidden layer, ``[batch, hidden]``."""
    layer = variables.params["hidden_0"]
    return jax.nn.relu(x.reshape(x.shape[0], -1) @ layer["kernel"] + layer["bias"][None])
