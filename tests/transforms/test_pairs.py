"""Pairs of transforms of which one looks into what the other makes of a model: their numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab.transforms import (
    clusters,
    federated_dropout,
    fine_tuning,
    leaves,
    meta_sgd,
    mixture,
    per_fedavg,
    private,
    reconstruction,
    width_slices,
    with_components,
    with_rates,
)
from tests.problems import assert_close, assert_same_bits, softmax_data, softmax_model, steps
from tests.transforms.networks import HIDDEN, network
from tests.transforms.test_submodels import drawn_units, entries, part_of

SGD = optax.sgd(0.1)
MODEL, SOFTMAX = network(), softmax_model()
WORK = {"steps": 2, "batch_size": None}


def all_biases_unlike():
    params = MODEL.init(jax.random.key(1))[0]
    params["hidden"]["bias"] = jnp.linspace(-0.3, 0.3, HIDDEN)
    return params


def test_per_fedavg_of_federated_dropout_adapts_the_small_network():
    """A step of one client is that of jax.grad through the adaptation of the network that it was sent."""
    data, alpha = softmax_data((12,)), 0.5
    base = fedavg(MODEL, SGD, steps=1, batch_size=None)
    process = fl.synchronous(fl.compose(base, federated_dropout(0.5), per_fedavg(alpha)), data)
    start = all_biases_unlike()
    state = process.init(jax.random.key(1), start)
    units = drawn_units(process, state, 0)
    support, query = (part.full()[0] for part in process.data.view(jnp.int32(0)).split(0.5))
    mean = lambda params, rows: jnp.mean(MODEL.loss(params, (), rows, jnp.ones(len(rows["y"]), bool), None, True)[0])

    def after(params):
        adapted = jax.tree.map(lambda w, g: w - alpha * g, params, jax.grad(mean)(params, support))
        return mean(adapted, query)

    small = jax.tree.map(jnp.asarray, part_of(start, units))
    expected = jax.tree.map(lambda w, g: w - 0.1 * g, small, jax.grad(after)(small))
    new = process.params(process.step(state, process.data)[0])
    assert_close(part_of(new, units), jax.tree.map(np.asarray, expected), atol=2e-6)
    others = np.setdiff1d(np.arange(HIDDEN), units)
    np.testing.assert_array_equal(new["hidden"]["kernel"][:, others], start["hidden"]["kernel"][:, others])


def test_the_oracle_reads_the_support_within_full_batches():
    data = softmax_data((12, 7, 9))
    round = fl.compose(fedavg(SOFTMAX, SGD, **WORK), per_fedavg(0.1))
    slow = fl.oracle_run(round, data, num_rounds=2, seed=0)
    assert_close(fl.run(fl.synchronous(round, data), 2, seed=0).params, slow.params, atol=1e-6)


def test_what_clients_use_after_federated_dropout_starts_from_the_whole_model():
    data = softmax_data((12, 7, 9))
    tuned = fine_tuning(SGD, steps=3, batch_size=None)
    base = fedavg(MODEL, SGD, **WORK)
    dropped = fl.synchronous(fl.compose(base, federated_dropout(0.5), tuned), data)
    state, _ = steps(dropped, 2)
    whole = fl.synchronous(fl.compose(base, tuned), data)
    same = whole.init(jax.random.key(0), dropped.params(state))
    evaluate = fl.per_client(data)
    assert evaluate(dropped, state) == pytest.approx(evaluate(whole, same), abs=1e-6)


def test_models_to_choose_from_may_be_parts_of_each_client_s_own_size():
    rates = np.array([0.3, 0.5, 1.0], np.float32)  # 2, 3 and 6 units
    data = softmax_data((12, 7, 9))
    process = fl.synchronous(fl.compose(fedavg(MODEL, SGD, **WORK), width_slices(rates), clusters(2)), data)
    _, metrics = steps(process, 1)
    sizes = sum(4 * entries(n) for n in (2, 3, 6))
    assert fl.total_bytes(metrics["downlink_bytes"]) == 2 * (sizes + 3 * 4)
    assert fl.total_bytes(metrics["uplink_bytes"]) == sizes + 3  # and the number of the cluster


@pytest.mark.parametrize("first", ["meta_sgd", "mixture"])
def test_rates_of_a_mixture_s_one_component_are_learned_as_a_model_s(first):
    data = softmax_data((12, 7, 9))
    learns = [meta_sgd(), mixture()] if first == "meta_sgd" else [mixture(), meta_sgd()]
    model = with_rates(SOFTMAX, 0.1)
    alone = fl.synchronous(fl.compose(fedavg(model, SGD, **WORK), meta_sgd()), data)
    one = fl.synchronous(fl.compose(fedavg(with_components(model, 1), SGD, **WORK), *learns), data)
    (expected, _), (got, _) = steps(alone, 2), steps(one, 2)
    assert_close(jax.tree.map(lambda x: x[0], one.params(got).each), alone.params(expected), atol=1e-5)
    assert np.abs(alone.params(expected)["rates"]["w"] - 0.1).max() > 1e-4
    report, wanted = fl.per_client(data)(one, got), fl.per_client(data)(alone, expected)
    assert report["personal_loss"] == pytest.approx(wanted["personal_loss"], abs=1e-5)


def test_parts_of_a_mixture_s_one_component_are_rebuilt_as_a_model_s():
    data, head = softmax_data((12, 7, 9)), leaves("params/*b")
    several = with_components(SOFTMAX, 1)
    alone = fl.synchronous(fl.compose(fedavg(SOFTMAX, SGD, **WORK), reconstruction(SOFTMAX, head)), data)
    one = fl.synchronous(fl.compose(fedavg(several, SGD, **WORK), mixture(), reconstruction(several, head)), data)
    (expected, _), (got, metrics) = steps(alone, 2), steps(one, 2)
    assert_close(one.params(got).each["w"][0], alone.params(expected)["w"], atol=1e-5)
    assert fl.total_bytes(metrics["uplink_bytes"]) == 3 * 4 * 12  # the kernels alone
    report, wanted = fl.per_client(data)(one, got), fl.per_client(data)(alone, expected)
    assert report["personal_loss"] == pytest.approx(wanted["personal_loss"], abs=1e-5)


def test_which_change_of_a_model_goes_around_the_other_is_said():
    rates, parts = with_rates(with_components(SOFTMAX, 2), 0.1), with_components(SOFTMAX, 2)
    for model, outer in ((rates, mixture()), (parts, meta_sgd())):
        with pytest.raises(ValueError, match=r"with_components\(with_rates\(model, rate\), M\)"):
            fl.synchronous(fl.compose(fedavg(model, SGD, **WORK), outer), softmax_data())


FIRST, BIAS = leaves("params/hidden/*"), leaves("params/output/bias")


def test_leaves_kept_private_by_two_transforms_are_those_of_one():
    def made(*parts):
        process = fl.synchronous(fl.compose(fedavg(MODEL, SGD, **WORK), *parts), softmax_data((12, 9)))
        state, metrics = steps(process, 3, params=all_biases_unlike())
        return process.params(state), metrics

    one = made(private(lambda path: FIRST(path) or BIAS(path)))
    for order in ((FIRST, BIAS), (BIAS, FIRST)):
        assert_same_bits(one, made(*map(private, order)))
    rebuilt = reconstruction(MODEL, FIRST, SGD, **WORK)
    kept = made(rebuilt, private(BIAS))[1]
    assert fl.total_bytes(kept["uplink_bytes"]) == fl.total_bytes(one[1]["uplink_bytes"])
    with pytest.raises(ValueError, match="trains from whole models"):
        fl.compose(fedavg(MODEL, SGD, **WORK), private(FIRST), private(BIAS, alternating=True))
    with pytest.raises(ValueError, match="make everything private"):
        made(private(FIRST), private(lambda path: not FIRST(path)))
