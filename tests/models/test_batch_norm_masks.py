"""Batch normalisation sees the real examples only, whether or not a module passes the mask on."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab.transforms import adapters, fedpara, with_components, with_rates
from tests.problems import assert_close

SGD = optax.sgd(0.5)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        h = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.relu(h))


class Masking(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, mask=None):
        mask = None if mask is None else mask[:, None]
        h = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(4)(x), mask=mask)
        return nn.Dense(2)(nn.relu(h))


class Normal(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.out = nnx.BatchNorm(3, momentum=0.9, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.norm(x))


MODELS = {"linen": fl.models.from_flax(Plain()), "nnx": fl.models.from_nnx(Normal)}


def rows(n, seed):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(1, 2, size=(n, 3)).astype(np.float32), "y": rng.integers(0, 2, n)}


def after(round, data, sampler, oracle=False):
    if oracle:
        return round.model.get(fl.oracle_run(round, data, sampler, seed=0).server)
    process = fl.synchronous(round, data, sampler)
    return process.variables(process.step(process.init(jax.random.key(0)), process.data)[0])


@pytest.mark.parametrize("name", MODELS)
def test_batches_that_are_partly_filled_do_not_spoil_the_statistics(name):
    """4 and 7 rows in batches of 5, against the oracle, which has no padding."""
    data = fl.FederatedData.from_clients({k: rows(n, k) for k, n in enumerate((4, 7))})
    round = fedavg(MODELS[name], SGD, epochs=1, batch_size=5)
    assert_close(after(round, data, fl.everyone()), after(round, data, fl.everyone(), oracle=True), atol=1e-5)


def test_a_module_may_pass_the_mask_on_itself():
    data = fl.FederatedData.from_clients({k: rows(n, k) for k, n in enumerate((4, 7))})
    one, two = (fedavg(fl.models.from_flax(net), SGD, epochs=1, batch_size=5) for net in (Plain(), Masking()))
    assert_close(after(one, data, fl.everyone()), after(two, data, fl.everyone()), atol=1e-6)


def test_a_full_batch_is_one_whatever_other_clients_there_are():
    """Among many small clients examples are read a few at a time, which batch normalisation must not be."""
    crowd = {f"s{k}": rows(3, k) for k in range(20)} | {"big": rows(40, 99)}
    round = fedavg(MODELS["linen"], SGD, steps=1, batch_size=None)
    data = fl.FederatedData.from_clients(crowd)
    assert data.tile < 40
    found = after(round, data, fl.fixed([list(data.ids).index("big")]))
    alone = after(round, fl.FederatedData.from_clients({"big": crowd["big"]}), fl.fixed([0]))
    assert_close(found, alone, atol=1e-6)


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_labels_that_the_network_has_no_score_for_are_refused(name):
    crowd = {"good": rows(3, 0), "bad": rows(3, 1) | {"y": np.array([0, 7, 1])}}
    with pytest.raises(ValueError, match=r"label 7 of client 'bad' .* outside the model's classes 0\.\.1"):
        fl.synchronous(fedavg(MODELS[name], SGD), fl.FederatedData.from_clients(crowd))


WHOLE = MODELS["linen"]
OTHER_FORMS = {
    "with_rates": lambda: with_rates(WHOLE, 0.1),
    "adapters": lambda: adapters(WHOLE, WHOLE.init_from(jax.random.key(0), rows(1, 0))[0], rank=1).model,
    "fedpara": lambda: fedpara(WHOLE, rank=1),
    "components": lambda: with_components(WHOLE, 2),
    "components of fedpara": lambda: with_components(fedpara(WHOLE, rank=1), 2),
    "precision": lambda: fl.models.mixed_precision(WHOLE, "bfloat16"),
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_a_model_in_another_form_knows_its_labels_still(name):
    model = OTHER_FORMS[name]()
    start = lambda *labels: fl.models.initial_variables(
        model, jax.random.key(0), fl.FederatedData.from_clients({"bad": rows(3, 1) | {"y": np.array(labels)}})
    )
    start(0, 1, 1)
    with pytest.raises(ValueError, match=r"label 7 of client 'bad' .* outside the model's classes 0\.\.1"):
        start(0, 7, 1)
