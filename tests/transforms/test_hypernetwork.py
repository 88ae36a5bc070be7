"""pFedHN: linear networks in NumPy, the server's step as jax.grad of its surrogate, and an identity that is local
training."""

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.local_only import local_only
from algorithms.mime_lite import mime_lite
from fedjax_lab.transforms import Hypernetwork, hypernetwork, leaves, perceptron, private, proximal
from tests.laws.test_centralised import numpy_gradient
from tests.problems import softmax_data, softmax_model, steps
from tests.transforms.test_nothing_private import travelling

MODEL = softmax_model()
ETA, ALPHA, ALPHA_V = 0.5, 0.3, 0.2
BASE = fedavg(MODEL, optax.sgd(ETA), steps=1, batch_size=None)
LINEAR = Hypernetwork(
    lambda key, embedding, params: 0.3 * jax.random.normal(key, (15, len(embedding))), lambda phi, v: phi @ v
)
RATES = {"server_optimizer": optax.sgd(ALPHA), "embedding_learning_rate": ALPHA_V}


def test_a_linear_network_is_the_pseudo_code():
    """theta = W v in the order of the leaves, b and then w: W moves by mean(delta v'), v by W' delta."""
    data, cohort = softmax_data((7, 4, 9)), [0, 2]
    process = fl.synchronous(fl.compose(BASE, hypernetwork(LINEAR, embedding_size=2, **RATES)), data, fl.fixed(cohort))
    server = process.server(process.init(jax.random.key(0)))
    W, v = np.asarray(server.phi, np.float64), np.asarray(server.embeddings, np.float64)
    assert v.shape == (3, 2)
    for _ in range(3):
        moves = {}
        for k in cohort:
            theta, own = W @ v[k], data.client(data.ids[k]).arrays
            gw, gb = numpy_gradient(theta[3:].reshape(4, 3), theta[:3], own["x"].astype(np.float64), own["y"])
            moves[k] = -ETA * np.concatenate([gb, gw.ravel()])
        pulled = {k: W.T @ moves[k] for k in cohort}
        W = W + ALPHA * (7 * np.outer(moves[0], v[0]) + 9 * np.outer(moves[2], v[2])) / 16
        for k in cohort:
            v[k] = v[k] + ALPHA_V * pulled[k]
    state, metrics = steps(process, 3)
    np.testing.assert_allclose(process.server(state).phi, W, atol=1e-5)
    np.testing.assert_allclose(process.server(state).embeddings, v, atol=1e-5)
    assert fl.total_bytes(metrics["downlink_bytes"]) == fl.total_bytes(metrics["uplink_bytes"]) == 2 * 4 * 15
    assert jax.tree.leaves(process.clients(state).table) == []


class Net(nn.Module):
    @nn.compact
    def __call__(self, v):
        x = nn.tanh(nn.Dense(5)(v))
        return {"w": nn.Dense(12)(x).reshape(4, 3), "b": nn.Dense(3)(x)}


def test_the_servers_step_is_the_gradient_of_the_surrogate():
    data = softmax_data((7, 4))
    round = fl.compose(BASE, hypernetwork(Net(), embedding_size=3, **RATES))
    process = fl.synchronous(round, data)
    state = process.init(jax.random.key(0))
    before, after = process.server(state), process.server(process.step(state, process.data)[0])

    def surrogate(phi, row, delta):
        made = Net().apply(phi, row)
        return -sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(delta), strict=True))

    deltas = []
    for k in range(2):
        client, key = process.data.view(jnp.int32(k)), jax.random.key(0)
        message = round.broadcast(before, (), client, key)
        deltas.append(round.client_update(message, (), client, key).upload.params)
    both = [jax.grad(surrogate, (0, 1))(before.phi, before.embeddings[k], deltas[k]) for k in range(2)]
    mean = jax.tree.map(lambda a, b: (7 * a + 4 * b) / 11, both[0][0], both[1][0])
    expected = jax.tree.map(lambda p, g: p - ALPHA * g, before.phi, mean)
    for a, b in zip(jax.tree.leaves(after.phi), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for k in range(2):
        np.testing.assert_allclose(after.embeddings[k], before.embeddings[k] - ALPHA_V * both[k][1], atol=1e-6)


def test_with_parameters_for_embeddings_it_is_local_training():
    identity = Hypernetwork(lambda key, embedding, params: (), lambda phi, v: v)
    round = fl.compose(BASE, hypernetwork(identity, embedding_size=15, embedding_learning_rate=1.0))
    data = softmax_data((7, 4, 9))
    process = fl.synchronous(round, data)
    begin, end = (process.server(s).embeddings for s in (process.init(jax.random.key(0)), steps(process, 3)[0]))
    alone = local_only(MODEL, optax.sgd(ETA), steps=3, batch_size=None).local
    for k in range(3):
        start = fl.Variables({"b": begin[k, :3], "w": begin[k, 3:].reshape(4, 3)})
        run = alone(start, process.data.view(jnp.int32(k)), jax.random.key(0))
        np.testing.assert_allclose(jax.flatten_util.ravel_pytree(run.variables.params)[0], end[k], atol=1e-5)


@pytest.mark.slow
def test_by_default_it_trains_with_private_heads_and_changed_objectives_too():
    data = softmax_data()
    options = {"server_optimizer": optax.adam(0.02), "embedding_learning_rate": 0.1}
    head = private(leaves("params/b"))
    for more in ((), (proximal(0.1), head)):
        round = fl.compose(fedavg(MODEL, optax.sgd(0.3), epochs=1), *more, hypernetwork(**options))
        process = fl.synchronous(round, data, fl.uniform(5))
        state, metrics = steps(process, 40)
        report = fl.per_client_accuracy(data)(process, state)
        assert report["personal_accuracy"] > 0.75
        assert fl.total_bytes(metrics["uplink_bytes"]) == 5 * 4 * (12 if more else 15)


def test_clients_begin_near_the_initial_model():
    data = softmax_data((7, 4))
    process = fl.synchronous(fl.compose(BASE, hypernetwork()), data)
    server = process.server(process.init(jax.random.key(0)))
    base = server.inner.variables.params
    for k in range(2):
        made = process.round.broadcast(server, (), process.data.view(jnp.int32(k)), jax.random.key(0)).params
        apart = np.concatenate([np.ravel(a - b) for a, b in zip(made.values(), base.values(), strict=True)])
        assert 0 < np.abs(apart).max() < 0.5
    assert server.embeddings.shape == (2, 1)


def test_private_heads_stay():
    data = softmax_data((7, 4)).on_device()
    for shapes in travelling(fl.compose(BASE, private(leaves("params/b")), hypernetwork()), data):
        assert shapes == [(4, 3)]


WRONG = Hypernetwork(lambda key, embedding, params: jnp.ones((7, len(embedding))), lambda phi, v: phi @ v)


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: hypernetwork(lambda v: v), "network must be a Flax module"),
        (lambda: hypernetwork(embedding_size=0), "embedding_size must"),
        (lambda: hypernetwork(embedding_learning_rate=0), "embedding_learning_rate must"),
        (lambda: hypernetwork(server_optimizer=0.1), "server_optimizer must come from optax"),
        (lambda: perceptron((0,)), "hidden must"),
        (lambda: fl.compose(local_only(MODEL, optax.sgd(0.1)), hypernetwork()), "this Round sends none"),
        (lambda: fl.compose(BASE, hypernetwork(), hypernetwork()), "has several already"),
        (lambda: fl.synchronous(fl.compose(BASE, hypernetwork(WRONG)), softmax_data((5, 4))), "one vector of 15"),
        (
            lambda: fl.synchronous(fl.compose(mime_lite(MODEL, optax.sgd(0.1)), hypernetwork()), softmax_data((5, 4))),
            "uploads something else",
        ),
    ],
)
def test_refusals(build, word):
    with pytest.raises(ValueError, match=word):
        build()


def test_secure_sums_are_refused():
    """The server must know whose an update is."""
    hidden = fl.uplink(fl.wire.fixed_point(limit=1.0, clients=4), max_weight=10)
    with pytest.raises(ValueError, match="looks at each client's upload"):
        fl.compose(BASE, hypernetwork(), hidden)
