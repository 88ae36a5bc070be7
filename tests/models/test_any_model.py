"""Anything with a Model's three functions is a model: a class of the user's own, without the optional fields."""

import jax
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.fedlora import fedlora
from algorithms.fedrecon import fedrecon
from algorithms.knn_per import knn_per
from algorithms.local_only import local_only
from algorithms.matched_averaging import matched_averaging
from algorithms.pfedbayes import pfedbayes
from algorithms.term import term
from algorithms.virtual import virtual
from tests.problems import assert_same_bits, softmax_data, softmax_model, steps
from tests.refusals import raises

SGD = optax.sgd(0.1)
PLAIN = softmax_model()._replace(num_classes=None)


class Own:
    """A user's model: methods, and nothing else."""

    def init(self, key):
        return PLAIN.init(key)

    def loss(self, params, model_state, batch, mask, key, train):
        return PLAIN.loss(params, model_state, batch, mask, key, train)

    def metrics(self, params, model_state, batch):
        return PLAIN.metrics(params, model_state, batch)


BIAS = fl.transforms.leaves("params/b")
ROUNDS = {
    "fedavg": lambda m: fedavg(m, SGD),
    "local_only": lambda m: local_only(m, SGD),
    "term": lambda m: term(m, SGD, t=1.0),
    "virtual": lambda m: virtual(m, SGD, prior_scale=1.0),
    "pfedbayes": lambda m: pfedbayes(m, SGD, zeta=0.5, initial_scale=0.5),
    "mixture": lambda m: fedavg(fl.transforms.with_components(m, 2), SGD),
    "rates": lambda m: fedavg(fl.transforms.with_rates(m, 0.1), SGD),
    "fedrecon": lambda m: fedrecon(m, SGD, private=BIAS),
    "fedlora": lambda m: fedlora(m, SGD, base=m.init(jax.random.key(3))[0], rank=1),
    "narrow": lambda m: fedavg(fl.models.mixed_precision(m, "bfloat16"), SGD),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_it_trains_as_the_same_functions_in_a_model(name):
    runs = [steps(fl.synchronous(ROUNDS[name](m), softmax_data(), fl.uniform(3)), 1) for m in (Own(), PLAIN)]
    assert_same_bits(*runs)
    process = fl.synchronous(ROUNDS[name](Own()), softmax_data(), fl.uniform(3))
    assert "loss" in str(sorted(fl.per_client(softmax_data())(process, process.init(0))))


def test_it_is_what_a_classifier_or_a_network_is_asked_for():
    raises(lambda: knn_per(Own(), SGD, features=lambda variables, x: x), "model with num_classes")
    raises(lambda: fl.synchronous(matched_averaging(Own(), SGD), softmax_data()), "no hidden units")


def test_what_lacks_a_loss_is_none():
    raises(lambda: fedavg(type("Half", (), {"init": PLAIN.init})(), SGD), "model must be")
