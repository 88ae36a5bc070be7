"""FedEM: pseudo-code in NumPy, a mixture that is recovered, one component, predictions, what travels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.fedem import fedem
from algorithms.local_only import local_only
from fedjax_lab.transforms import clusters, control_variates, mixture, personal_model, with_components
from fedjax_lab.transforms.mixture import Components, Weighted
from tests.problems import assert_close, softmax_data, softmax_model, steps

MODEL = softmax_model()
ETA, TAU, M = 0.5, 3, 2


def start(seed=3):
    rng = np.random.default_rng(seed)
    return {"w": rng.normal(0, 0.5, (M, 4, 3)), "b": rng.normal(0, 0.5, (M, 3))}


def of(params):
    return Components(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params))


def probabilities(w, b, x):
    logits = x @ w + b
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def expectation(w, b, weights, x, y):
    """q[m, i], in proportion to weights[m] p_m(y_i | x_i)."""
    q = np.stack([weights[m] * probabilities(w[m], b[m], x)[np.arange(len(y)), y] for m in range(M)])
    return q / q.sum(0)


def pseudo_code(data, rounds):
    """Algorithm 1 with TAU full-batch gradient steps for its local solver."""
    w, b = (start()[name].copy() for name in ("w", "b"))
    weights, share = np.full((data.num_clients, M), 1 / M), data.sizes / data.num_examples
    for _ in range(rounds):
        new_w, new_b = np.zeros_like(w), np.zeros_like(b)
        for k in range(data.num_clients):
            arrays = data.client(data.ids[k]).arrays
            x, y = np.asarray(arrays["x"], np.float64), arrays["y"]
            q = expectation(w, b, weights[k], x, y)
            weights[k] = q.mean(1)
            for m in range(M):
                wm, bm = w[m].copy(), b[m].copy()
                for _ in range(TAU):
                    error = q[m][:, None] * (probabilities(wm, bm, x) - np.eye(3)[y]) / len(y)
                    wm, bm = wm - ETA * x.T @ error, bm - ETA * error.sum(0)
                new_w[m] += share[k] * wm
                new_b[m] += share[k] * bm
        w, b = new_w, new_b
    return w, b, weights


def test_fedem_is_the_pseudo_code_and_a_client_uses_its_own_mixture():
    data = softmax_data((7, 4, 9))
    process = fl.synchronous(fedem(MODEL, optax.sgd(ETA), M=M, steps=TAU, batch_size=None), data)
    state, _ = steps(process, 2, params=of(start()))
    w, b, weights = pseudo_code(data, 2)
    np.testing.assert_allclose(process.params(state).each["w"], w, atol=1e-5)
    np.testing.assert_allclose(process.params(state).each["b"], b, atol=1e-5)
    np.testing.assert_allclose(process.clients(state).table.weights, weights, atol=1e-5)
    # Evaluation: one more E and M step at the components received, and then the mixed probabilities.
    found = fl.client_metrics(data, personal=True)(process, state).values
    for k in range(3):
        x, y = (np.asarray(data.client(data.ids[k]).arrays[name]) for name in ("x", "y"))
        own = expectation(w, b, weights[k], x, y).mean(1)
        mixed = sum(own[m] * probabilities(w[m], b[m], x) for m in range(M))
        assert found["loss"][k] == pytest.approx(-np.log(mixed[np.arange(len(y)), y]).mean(), rel=1e-4)
        assert found["accuracy"][k] == pytest.approx((mixed.argmax(1) == y).mean(), abs=1e-6)


def test_one_component_is_fedavg():
    data = softmax_data((7, 4, 9))
    final = {}
    for name, round in (("fedem", fedem(MODEL, optax.sgd(0.1), M=1)), ("fedavg", fedavg(MODEL, optax.sgd(0.1)))):
        process = fl.synchronous(round, data)
        state, metrics = steps(process, 2)
        final[name] = process.params(state), float(metrics["loss"])
    assert_close(jax.tree.map(lambda x: x[0], final["fedem"][0].each), final["fedavg"][0])
    assert final["fedem"][1] == pytest.approx(final["fedavg"][1], rel=1e-5)


def test_components_may_begin_where_one_says():
    given = jax.tree.map(lambda x: jnp.stack([x, x + 1]), MODEL.init(jax.random.key(3))[0])
    process = fl.synchronous(fedem(MODEL, optax.sgd(0.1), M=2), softmax_data((7, 4, 9)))
    state = process.init(jax.random.key(0), fl.transforms.Components(given))
    assert_close(process.params(state).each, given)


def regressions(clients=12, rows=80, noise=0.3):
    """Rows of two linear regressions, in proportions of each client's own."""
    rng = np.random.default_rng(0)
    truth, found, shares = np.array([[1.0, -1.0, 0.5], [-0.5, 1.0, 1.0]]), {}, []
    for k in range(clients):
        x, kind = rng.normal(size=(rows, 3)), rng.random(rows) < rng.random()
        y = np.where(kind, x @ truth[1], x @ truth[0]) + noise * rng.normal(size=rows)
        found[k] = {"x": x.astype(np.float32), "y": y.astype(np.float32)}
        shares.append(kind.mean())
    return fl.FederatedData.from_clients(found), truth, np.array(shares)


def gaussian_regression(noise):
    """Linear regression whose loss is the negative log likelihood of noise of this standard deviation."""

    def loss(params, model_state, batch, mask, key, train):
        return 0.5 * ((batch["x"] @ params - batch["y"]) / noise) ** 2, model_state

    return fl.Model(lambda key: (jnp.zeros(3), ()), loss, lambda p, s, b: {"loss": loss(p, s, b, None, None, 0)[0]})


def test_it_recovers_a_mixture_of_linear_regressions():
    """To 0.05 in every coefficient, and to 0.06 in every client's share: 80 rows of noise 0.3 do not tell more."""
    data, truth, shares = regressions()
    round = fedem(gaussian_regression(0.3), optax.sgd(0.05), M=2, spread=0.5, steps=5, batch_size=None)
    process = fl.synchronous(round, data)
    body = lambda state, _: (process.step(state, process.data)[0], None)
    state = jax.jit(lambda s: jax.lax.scan(body, s, length=40)[0])(process.init(jax.random.key(1)))
    found = np.asarray(process.params(state).each)
    order = [0, 1] if np.abs(found - truth).max() < np.abs(found[::-1] - truth).max() else [1, 0]
    np.testing.assert_allclose(found[order], truth, atol=0.05)
    np.testing.assert_allclose(process.clients(state).table.weights[:, order[1]], shares, atol=0.06)


def test_the_mixtures_probabilities_by_hand():
    """One example, two components with p(y = 0..2): labels 0 and 1 are their favourites, 2 the mixture's."""
    p = np.array([[0.55, 0.0, 0.45], [0.0, 0.55, 0.45]]) + 1e-9
    model = with_components(MODEL, 2)
    params = Components({"w": jnp.zeros((2, 4, 3)), "b": jnp.log(jnp.asarray(p, jnp.float32))})
    batch = {"x": jnp.zeros((1, 4)), "y": jnp.array([2])}
    found = model.metrics(params, Weighted(jnp.array([0.5, 0.5]), (), Components(())), batch)
    assert float(found["accuracy"][0]) == 1
    assert float(found["loss"][0]) == pytest.approx(-np.log(0.45), rel=1e-5)
    found = model.metrics(params, Weighted(jnp.array([0.9, 0.1]), (), Components(())), batch)
    assert float(found["accuracy"][0]) == 0  # label 0 has .495
    equal = model.metrics(params, Components(()), batch)
    assert float(equal["accuracy"][0]) == 1


def test_no_weights_travel_and_other_transforms_know_the_mixture():
    data = softmax_data().on_device()
    base = fedavg(with_components(MODEL, 5), optax.sgd(0.1))
    round = fl.compose(base, control_variates(learning_rate=0.1), mixture(), personal_model(0.1))

    def turn(key):
        server, client = round.init(key, data), data.view(jnp.int32(0))
        state = round.init_client(server, client)
        message = round.broadcast(server, state, client, key)
        out = round.client_update(message, state, client, key)
        return message, out.upload, out.state

    message, upload, state = jax.eval_shape(turn, jax.random.key(0))
    for tree in (message, upload):
        assert sorted(x.shape for x in jax.tree.leaves(tree)) == [(5, 3)] * 2 + [(5, 4, 3)] * 2
    assert state.inner.weights.shape == (5,)
    fl.synchronous(round, softmax_data())  # types are stable


BASE = fedavg(MODEL, optax.sgd(0.1))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: fedem(MODEL, optax.sgd(0.1), M=0), "M must be positive"),
        (lambda: with_components(MODEL, 1.5), "components must be a positive integer"),
        (lambda: with_components(MODEL, 2, spread=-0.1), "spread must"),
        (lambda: with_components(optax.sgd(0.1), 2), "model must"),
        (lambda: mixture(personalize_steps=-1), "personalize_steps must"),
        (lambda: fl.compose(local_only(MODEL, optax.sgd(0.1)), mixture()), "trains no model"),
        (lambda: fl.compose(BASE, clusters(2), mixture()), "put it first"),
        (lambda: fl.synchronous(fl.compose(BASE, mixture()), softmax_data()), "with_components"),
    ],
)
def test_refusals(call, word):
    with pytest.raises(ValueError, match=word):
        call()
