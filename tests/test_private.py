"""Private parts of a model: they stay with their client, and nothing of them travels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from tests.problems import assert_same_bits, softmax_data, softmax_model, steps

BIAS = lambda path: path == "params/b"
MODEL = softmax_model()


class WithNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train, mask=None):
        x = nn.Dense(6)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x, mask=None if mask is None else mask[:, None])
        return nn.Dense(3)(nn.relu(x))


def paths(tree):
    return {fl.checks.path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}


@pytest.mark.parametrize("over", ["fedavg", "scaffold"])
def test_nothing_private_travels(over):
    """The message and the upload hold no leaf of the private part, control variates included."""
    data = softmax_data().on_device()
    base = fedavg(MODEL, optax.sgd(0.1))
    round = fl.compose(
        base,
        *([fl.transforms.control_variates(learning_rate=0.1)] if over == "scaffold" else []),
        fl.transforms.private(BIAS),
    )
    server, client, key = round.init(jax.random.key(0), data), data.view(jnp.int32(0)), jax.random.key(1)
    state = round.init_client(server, client)
    message = round.broadcast(server, state, client, key)
    env = fl.cohort.make_env(jnp.int32(0), key, jnp.arange(8), jnp.ones(8, bool), 8)
    upload = round.client_update(message, state, data.view(jnp.int32(0), env), key).upload
    for travelling in (message, upload):
        shapes = [leaf.shape for leaf in jax.tree.leaves(travelling)]
        assert (3,) not in shapes  # the bias, or anything of its shape
        assert shapes.count((4, 3)) == (2 if over == "scaffold" else 1)


def test_each_client_keeps_its_own_part_and_the_server_never_moves_its_copy():
    data = softmax_data()
    round = fl.compose(fedavg(MODEL, optax.sgd(0.3)), fl.transforms.private(BIAS))
    process = fl.synchronous(round, data)
    state, metrics = steps(process, 3)
    assert_same_bits(process.params(state)["b"], process.params(process.init(jax.random.key(0)))["b"])
    biases = np.asarray(process.clients(state).table.part.params["b"])
    assert len({tuple(b) for b in biases}) == data.num_clients
    shared = 4 * 3 * 4
    assert fl.total_bytes(metrics["uplink_bytes"]) == data.num_clients * shared
    assert fl.total_bytes(metrics["downlink_bytes"]) == data.num_clients * shared


def test_batch_norm_statistics_are_averaged_by_default_and_local_by_choice():
    data = softmax_data((20, 20, 20))
    model = fl.models.from_flax(WithNorm(), num_classes=3)
    plain = fl.synchronous(fedavg(model, optax.sgd(0.1)), data)
    state = plain.init(jax.random.key(0))
    after, _ = plain.step(state, plain.data)
    mean = lambda variables: np.asarray(jax.tree.leaves(variables.model_state)[0])
    assert not np.allclose(mean(plain.variables(after)), mean(plain.variables(state)))
    local = fl.compose(fedavg(model, optax.sgd(0.1)), fl.transforms.private(fl.transforms.statistics))
    process = fl.synchronous(local, data)
    kept, _ = process.step(process.init(jax.random.key(0)), process.data)
    tables = process.clients(kept).table.part
    # The average that plain FedAvg made is the mean of the statistics that clients now keep.
    each = np.asarray(jax.tree.leaves(tables.model_state)[0])
    np.testing.assert_allclose(each.mean(0), mean(plain.variables(after)), atol=1e-6)
    assert np.std(each, axis=0).max() > 1e-3
    assert jax.tree.leaves(tables.params) == []


def test_fedbn_keeps_the_layer_as_well():
    model = fl.models.from_flax(WithNorm(), num_classes=3)
    data = softmax_data((20, 20, 20))
    round = fl.compose(fedavg(model, optax.sgd(0.3), epochs=3), fl.transforms.private(fl.transforms.batch_norm))
    process = fl.synchronous(round, data)
    state, _ = steps(process, 10)
    part = process.clients(state).table.part
    assert {p.split("/")[-1] for p in paths(part.params)} == {"scale", "bias"}
    report = fl.per_client_accuracy(data)(process, state)
    assert "accuracy" not in report  # what is shared alone is no model
    majority = sum(np.bincount(data.client(k).arrays["y"]).max() for k in data.ids) / data.num_examples
    assert report["personal_accuracy"] > majority + 0.05


@pytest.mark.parametrize(("predicate", "word"), [(lambda path: True, "everything"), (lambda path: False, "nothing")])
def test_a_predicate_of_all_or_nothing_is_refused(predicate, word):
    round = fl.compose(fedavg(MODEL, optax.sgd(0.1)), fl.transforms.private(predicate))
    with pytest.raises(ValueError, match=word):
        fl.synchronous(round, softmax_data())


@pytest.mark.parametrize(
    ("link", "word"),
    [
        (lambda: fl.uplink(fl.wire.qsgd(8)), "put fl.uplink behind it"),
        (lambda: fl.uplink(fl.wire.fixed_point(limit=10, clients=8), max_weight=30), "put fl.uplink behind it"),
        (lambda: fl.downlink(fl.wire.qsgd(8)), "fl.downlink, or whatever does that, behind it"),
    ],
)
def test_what_is_encoded_already_is_refused(link, word):
    with pytest.raises(ValueError, match=word):
        fl.synchronous(fl.compose(fedavg(MODEL, optax.sgd(0.1)), link(), fl.transforms.private(BIAS)), softmax_data())
    fl.synchronous(fl.compose(fedavg(MODEL, optax.sgd(0.1)), fl.transforms.private(BIAS), link()), softmax_data())
