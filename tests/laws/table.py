"""One table of algorithms, which every law goes through. A new algorithm joins here."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
import pytest

import fedjax_lab as fl
from algorithms._template import template
from algorithms.adaptive_fedavg import adaptive_fedavg
from algorithms.adaptive_fedprox import adaptive_fedprox
from algorithms.afl import afl
from algorithms.clustered_fl import clustered_fl
from algorithms.divide_and_conquer import divide_and_conquer
from algorithms.fedadagrad import fedadagrad
from algorithms.fedadam import fedadam
from algorithms.fedavg import fedavg
from algorithms.fedavgm import fedavgm
from algorithms.feddane import feddane
from algorithms.feddyn import feddyn
from algorithms.fedem import fedem
from algorithms.federated_dropout import federated_dropout
from algorithms.fedlin import fedlin
from algorithms.fedlora import fedlora
from algorithms.fednova import fednova
from algorithms.fedpa import fedpa
from algorithms.fedpara import fedpara
from algorithms.fedpd import fedpd
from algorithms.fedprox import fedprox
from algorithms.fedrecon import fedrecon
from algorithms.fedrep import fedrep
from algorithms.fedsgd import fedsgd
from algorithms.fedyogi import fedyogi
from algorithms.heterofl import heterofl
from algorithms.hypcluster import hypcluster
from algorithms.ifca import ifca
from algorithms.knn_per import knn_per
from algorithms.l2gd import l2gd
from algorithms.local_only import local_only
from algorithms.matched_averaging import matched_averaging
from algorithms.mime import mime
from algorithms.mime_lite import mime_lite
from algorithms.mocha import mocha
from algorithms.mocha_couplings import graphical, mean_regularized
from algorithms.one_shot import one_shot
from algorithms.pfedbayes import pfedbayes
from algorithms.pfedhn import pfedhn
from algorithms.pfedpara import pfedpara
from algorithms.q_fedavg import q_fedavg
from algorithms.q_fedsgd import q_fedsgd
from algorithms.scaffold import scaffold
from algorithms.term import term
from algorithms.virtual import virtual
from fedjax_lab.transforms import (
    apfl,
    cmfl,
    coupling,
    fine_tuning,
    lag_ps,
    lag_wk,
    leaves,
    local_accuracy,
    local_gradients,
    meta_sgd,
    partial_averaging,
    per_fedavg,
    periods,
    personal_model,
    pfedme,
    private,
    pruning,
    reptile,
    with_rates,
)
from tests.problems import softmax_model
from tests.transforms.networks import network

MODEL = softmax_model()
SGD = optax.sgd(0.1)
LOCAL = {"epochs": 2, "batch_size": 10}
BIAS = leaves("params/b")
NETWORK = network()


class Entry(NamedTuple):
    """``make()`` builds the Round on the shared problem."""

    make: Callable[[], fl.Round]


def over_fedavg(*transforms):
    """FedAvg under transforms that personalise it."""
    return Entry(lambda: fl.compose(fedavg(MODEL, SGD, **LOCAL), *transforms))


ALGORITHMS = {
    "fedavg": Entry(lambda: fedavg(MODEL, SGD, **LOCAL)),
    "fedavg_full_batch_steps": Entry(lambda: fedavg(MODEL, SGD, steps=3, batch_size=None, weighting="uniform")),
    "fedavg_adam_kept": Entry(lambda: fedavg(MODEL, optax.adam(0.05), keep_optimizer_state=True, **LOCAL)),
    "fedavg_nesterov": Entry(lambda: fedavg(MODEL, optax.sgd(0.05, 0.9, nesterov=True), **LOCAL)),
    "fedavg_adagrad": Entry(lambda: fedavg(MODEL, optax.adagrad(0.1), **LOCAL)),
    "fedavg_rmsprop": Entry(lambda: fedavg(MODEL, optax.rmsprop(0.01), **LOCAL)),
    "fedavg_schedule": Entry(lambda: fedavg(MODEL, lambda r: optax.sgd(0.2 * 0.5**r), **LOCAL)),
    "fedavg_partial_work": Entry(lambda: fedavg(MODEL, SGD, epochs=fl.partial_work(4, 0.5))),
    "fedprox": Entry(lambda: fedprox(MODEL, SGD, mu=1.0, **LOCAL)),
    "fedsgd": Entry(lambda: fedsgd(MODEL, SGD)),
    "fedavgm": Entry(lambda: fedavgm(MODEL, SGD, **LOCAL)),
    "fedadagrad": Entry(lambda: fedadagrad(MODEL, SGD, **LOCAL)),
    "fedadam": Entry(lambda: fedadam(MODEL, SGD, **LOCAL)),
    "fedyogi": Entry(lambda: fedyogi(MODEL, SGD, **LOCAL)),
    "scaffold": Entry(lambda: scaffold(MODEL, SGD, **LOCAL)),
    "scaffold_option_1": Entry(lambda: scaffold(MODEL, SGD, option="I", weighting="uniform", **LOCAL)),
    "feddyn": Entry(lambda: feddyn(MODEL, SGD, alpha=1.0, **LOCAL)),
    "fednova": Entry(lambda: fednova(MODEL, optax.sgd(0.05, 0.9), mu=0.5, epochs=fl.partial_work(4, 0.5))),
    "fedpd": Entry(lambda: fedpd(MODEL, SGD, eta=1.0, **LOCAL)),
    "fedpd_skipping": Entry(lambda: fedpd(MODEL, SGD, eta=1.0, p=0.5, **LOCAL)),
    "feddane": Entry(lambda: feddane(MODEL, SGD, mu=0.5, **LOCAL)),
    "fedlin": Entry(lambda: fedlin(MODEL, SGD, **LOCAL)),
    "mime_adam": Entry(lambda: mime(MODEL, optax.adam(0.01), **LOCAL)),
    "mime_lite_momentum": Entry(lambda: mime_lite(MODEL, optax.sgd(0.05, 0.9), **LOCAL)),
    "fedpa": Entry(lambda: fedpa(MODEL, SGD, samples=3, burn_in=1, rho=0.5, epochs=1)),
    "afl": Entry(lambda: afl(MODEL, SGD, lam_learning_rate=0.1, **LOCAL)),
    "q_fedavg": Entry(lambda: q_fedavg(MODEL, SGD, q=1.0, L=10.0, **LOCAL)),
    "q_fedsgd": Entry(lambda: q_fedsgd(MODEL, q=0.5, L=5.0)),
    "term": Entry(lambda: term(MODEL, SGD, t=1.0, **LOCAL)),
    "term_hierarchical": Entry(lambda: term(MODEL, SGD, t=-0.5, tau=0.5, **LOCAL)),
    "adaptive_fedprox": Entry(lambda: adaptive_fedprox(MODEL, SGD, patience=1, **LOCAL)),
    "adaptive_fedavg": Entry(lambda: adaptive_fedavg(MODEL, optax.adam(0.05), **LOCAL)),
    "local_only": Entry(lambda: local_only(MODEL, SGD, **LOCAL)),
    "fine_tuning": over_fedavg(fine_tuning()),
    "ditto": over_fedavg(personal_model(0.5)),
    "ditto_of_scaffold": Entry(lambda: fl.compose(scaffold(MODEL, SGD, **LOCAL), personal_model(0.5))),
    "pfedme": over_fedavg(pfedme(2.0, inner_learning_rate=0.1, inner_steps=3)),
    "apfl": over_fedavg(apfl(0.5)),
    "apfl_learned": over_fedavg(apfl(0.25, learn_alpha=True)),
    "l2gd": Entry(lambda: l2gd(MODEL, learning_rate=0.05, lam=1.0, p=0.4)),
    "fedper": over_fedavg(private(BIAS)),
    "lg_fedavg": over_fedavg(private(leaves("params/w"))),
    "fedrep": Entry(lambda: fedrep(MODEL, SGD, head=BIAS, head_epochs=2)),
    "fedrecon": Entry(lambda: fedrecon(MODEL, SGD, private=BIAS, **LOCAL)),
    "knn_per": Entry(lambda: knn_per(MODEL, SGD, features=lambda variables, x: x, **LOCAL)),
    "pfedhn": Entry(lambda: pfedhn(MODEL, SGD, server_optimizer=optax.sgd(0.1), **LOCAL)),
    "per_fedavg": over_fedavg(per_fedavg(0.1)),
    "per_fedavg_hessian_free": over_fedavg(per_fedavg(0.1, form="hessian_free", delta=0.05, support_batch_size=4)),
    "per_fedavg_first_order": over_fedavg(per_fedavg(0.1, form="first_order", inner_steps=2)),
    "meta_sgd": Entry(lambda: fl.compose(fedavg(with_rates(MODEL, 0.1), SGD, **LOCAL), meta_sgd())),
    "reptile": over_fedavg(reptile(0.5), fine_tuning()),
    "mocha": Entry(lambda: mocha(loss="squared", coupling=mean_regularized(1.0, 1.0))),
    "mocha_learned": Entry(lambda: mocha(loss="squared", coupling=graphical(1.0), epochs=2, omega_every=2)),
    "coupled": over_fedavg(coupling(0.5)),
    "federated_dropout": Entry(lambda: federated_dropout(NETWORK, SGD, rate=0.5, **LOCAL)),
    "heterofl": Entry(lambda: heterofl(NETWORK, SGD, rate=0.5, **LOCAL)),
    "pruned": over_fedavg(pruning(0.5, start=0, end=2, every=1)),
    "fedpara": Entry(lambda: fedpara(NETWORK, SGD, rank=2, **LOCAL)),
    "pfedpara": Entry(lambda: pfedpara(NETWORK, SGD, rank=2, **LOCAL)),
    "fedlora": Entry(lambda: fedlora(NETWORK, SGD, base=NETWORK.init(jax.random.key(7))[0], rank=2, **LOCAL)),
    "virtual": Entry(lambda: virtual(MODEL, SGD, prior_scale=1.0, damping=0.5, **LOCAL)),
    "virtual_private": Entry(lambda: virtual(MODEL, SGD, prior_scale=1.0, samples=2, private=BIAS, **LOCAL)),
    "pfedbayes": Entry(lambda: pfedbayes(MODEL, SGD, zeta=0.5, initial_scale=0.5, **LOCAL)),
    "ifca": Entry(lambda: ifca(MODEL, SGD, k=3, **LOCAL)),
    "hypcluster": Entry(lambda: hypcluster(MODEL, SGD, q=2, **LOCAL)),
    "fedem": Entry(lambda: fedem(MODEL, SGD, M=2, **LOCAL)),
    "clustered_fl": Entry(lambda: clustered_fl(MODEL, SGD, max_clusters=3, eps1=0.3, eps2=0.35, min_rounds=1, **LOCAL)),
    "lag_wk": over_fedavg(lag_wk(0.1)),
    "lag_ps": over_fedavg(lag_ps(30.0, 0.1)),
    "cmfl": over_fedavg(cmfl(0.3)),
    "local_accuracy": over_fedavg(local_accuracy(0.3)),
    "partial_averaging": over_fedavg(partial_averaging(periods({"params/b": 2}))),
    "local_gradients": Entry(
        lambda: fl.compose(fedavg(MODEL, SGD, server_optimizer=optax.sgd(0.2), **LOCAL), local_gradients(0.1))
    ),
    "one_shot": Entry(lambda: one_shot(MODEL, SGD, members=3, **LOCAL)),
    "matched_averaging": Entry(lambda: matched_averaging(NETWORK, SGD, **LOCAL)),
    "divide_and_conquer": Entry(lambda: divide_and_conquer(MODEL, SGD, r=0.5, **LOCAL)),
    "_template": Entry(lambda: template(MODEL, SGD, max_norm=1.0, **LOCAL)),
}


# One of each kind of state, message, aggregate and tilt; `make test-all` has them all.
ALWAYS = (
    "fedavg", "fedavg_adam_kept", "fedadam", "scaffold", "mime_lite_momentum", "ditto_of_scaffold", "fedper",
    "pruned", "_template",
)  # fmt: skip


def sometimes(*always: str) -> list:
    """All algorithms, those not named marked slow, so that the whole suite stays under a quarter of an hour."""
    return [name if name in always else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS]
