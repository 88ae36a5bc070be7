"""Fine-tuning, Ditto, pFedMe and APFL: closed forms on quadratics, pseudo-code in NumPy, and what they leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedadam import fedadam
from algorithms.fedavg import fedavg
from algorithms.local_only import local_only
from algorithms.scaffold import scaffold
from fedjax_lab.transforms import apfl, fine_tuning, moreau, personal_model, pfedme
from tests.algorithms.quadratics import DIM, MODEL, quadratics
from tests.problems import assert_same_bits, softmax_data, softmax_model, steps

ETA, TAU = 0.2, 5
WORK = {"steps": TAU, "batch_size": None}
BASE = fedavg(MODEL, optax.sgd(ETA), **WORK)
SOFTMAX = softmax_model()


def run(round, rounds, sampler=None):
    process = fl.synchronous(round, quadratics().data, sampler)
    state, _ = steps(process, rounds)
    return process, state


def used(process, state):
    """The model that each client would use, ``[clients, dim]``, by evaluation's own way."""
    data, round = process.data, process.round

    def one(k, client_state):
        client, key = data.view(k), jax.random.key(0)
        message = round.broadcast(process.server(state), client_state, client, key)
        return round.personalize(message, client_state, client, key).params

    table = process.clients(state).table
    return np.stack([one(jnp.int32(k), jax.tree.map(lambda t, k=k: t[k], table)) for k in range(data.num_clients)])


def descent(k, w, steps=TAU, lam=0.0, center=None, eta=ETA):
    """Gradient steps on F_k(w) + lam/2 |w - center|^2."""
    for _ in range(steps):
        w = w - eta * (quadratics().gradient(k, w) + (lam * (w - center) if lam else 0))
    return w


def test_fine_tuning_is_local_training_from_the_model_sent():
    process, state = run(fl.compose(BASE, fine_tuning()), 2)
    plain, same = run(BASE, 2)
    assert_same_bits(process.params(state), plain.params(same))
    w = np.asarray(process.params(state), np.float64)
    np.testing.assert_allclose(used(process, state), [descent(k, w) for k in range(4)], atol=1e-5)
    other, later = run(fl.compose(BASE, fine_tuning(optax.sgd(0.1), steps=2, batch_size=None)), 2)
    np.testing.assert_allclose(used(other, later), [descent(k, w, 2, eta=0.1) for k in range(4)], atol=1e-5)


def test_ditto_is_the_pseudo_code_also_for_absent_clients():
    lam, sampler = 0.7, fl.fixed([0, 2])
    process, state = run(fl.compose(BASE, personal_model(lam)), 3, sampler)
    w, own = np.zeros(DIM), {}
    p = quadratics().sizes[[0, 2]] / quadratics().sizes[[0, 2]].sum()
    for _ in range(3):
        for k in (0, 2):
            own[k] = descent(k, own.get(k, w), lam=lam, center=w)
        w = p @ [descent(0, w), descent(2, w)]
    rows = process.clients(state).table.personal.params
    np.testing.assert_allclose(rows[np.array([0, 2])], [own[0], own[2]], atol=1e-5)
    np.testing.assert_allclose(process.params(state), w, atol=1e-5)


def test_ditto_without_pull_is_local_training_and_with_much_the_global_model():
    process, state = run(fl.compose(BASE, personal_model(0.0)), 3)
    alone, same = run(local_only(MODEL, optax.sgd(ETA), **WORK), 3)
    np.testing.assert_allclose(used(process, state), alone.clients(same).table.variables.params, atol=1e-6)
    # Its minimum is (A + lam)^-1 (A b + lam w), which tends to w; the global model has settled by then.
    q = quadratics()
    for lam in (1.0, 10.0, 100.0):
        personal = personal_model(lam, optax.sgd(1 / (lam + 1.5)), steps=10, batch_size=None)
        process, state = run(fl.compose(BASE, personal), 60)
        w = np.asarray(process.params(state), np.float64)
        expected = [np.linalg.solve(q.A[k] + lam * np.eye(DIM), q.A[k] @ q.b[k] + lam * w) for k in range(4)]
        np.testing.assert_allclose(used(process, state), expected, atol=1e-4)
    assert np.abs(used(process, state) - w).max() < 0.05


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("over", [fedadam, scaffold])
def test_the_global_model_is_the_inner_rounds_bit_for_bit(over):
    inner, data = over(SOFTMAX, optax.sgd(0.1), epochs=1), softmax_data()
    a = fl.synchronous(inner, data, fl.uniform(4))
    sa, ma = steps(a, 3)
    for personal in (personal_model(0.5), apfl(0.3, learn_alpha=True), fine_tuning()):
        b = fl.synchronous(fl.compose(inner, personal), data, fl.uniform(4))
        sb, mb = steps(b, 3)
        assert_same_bits(a.server(sa), b.server(sb))
        for name in ("uplink_bytes", "downlink_bytes"):
            assert fl.total_bytes(ma[name]) == fl.total_bytes(mb[name])


# ---- pFedMe ----


def test_the_moreau_gradient_is_its_definition():
    """lam (w - theta) with theta = argmin F_k + lam/2 |theta - w|^2, which quadratics have in closed form."""
    q, lam, w = quadratics(), 3.0, np.array([1.0, -1.0, 2.0])
    inputs = ((), *q.data.client(2).full())
    grads, _ = moreau(lam, 0.2, 100)(fl.gradient_oracle(MODEL.loss))(jnp.asarray(w, jnp.float32), inputs, None)
    theta = np.linalg.solve(q.A[2] + lam * np.eye(DIM), q.A[2] @ q.b[2] + lam * w)
    np.testing.assert_allclose(grads, lam * (w - theta), atol=1e-5)
    # And it is the gradient of the envelope: A lam (A + lam)^-1 (w - b).
    np.testing.assert_allclose(
        grads, q.A[2] @ np.linalg.solve(q.A[2] + lam * np.eye(DIM), lam * (w - q.b[2])), atol=1e-5
    )


def test_pfedme_is_the_pseudo_code():
    lam, eta, inner, K, beta = 4.0, 0.05, 0.1, 3, 0.8
    base = fedavg(MODEL, optax.sgd(eta), server_optimizer=optax.sgd(beta), weighting="uniform", **WORK)
    process, state = run(fl.compose(base, pfedme(lam, inner_learning_rate=inner, inner_steps=K)), 3)
    w = np.zeros(DIM)
    personal = lambda k, w: descent(k, w, K, lam, w, inner)
    for _ in range(3):
        copies = []
        for k in range(4):
            x = w.copy()
            for _ in range(TAU):
                x = x - eta * lam * (x - personal(k, x))
            copies.append(x)
        w = (1 - beta) * w + beta * np.mean(copies, axis=0)
    np.testing.assert_allclose(process.params(state), w, atol=1e-5)
    np.testing.assert_allclose(used(process, state), [personal(k, w) for k in range(4)], atol=1e-5)


# ---- APFL ----


@pytest.mark.parametrize("learn", [False, True])
def test_apfl_is_the_pseudo_code(learn):
    alpha = 0.3
    process, state = run(fl.compose(BASE, apfl(alpha, learn_alpha=learn)), 3)
    q, p = quadratics(), quadratics().shares()
    w, own, weights = np.zeros(DIM), np.zeros((4, DIM)), np.full(4, alpha)
    for _ in range(3):
        copies = [descent(k, w) for k in range(4)]
        for k in range(4):
            v, a = own[k], weights[k]
            for _ in range(TAU):
                used_alpha = np.clip(a, 0, 1)
                g = q.gradient(k, used_alpha * v + (1 - used_alpha) * copies[k])
                v, a = v - ETA * used_alpha * g, a - ETA * (v - copies[k]) @ g * learn
            own[k], weights[k] = v, np.clip(a, 0, 1)
        w = p @ copies
    table = process.clients(state).table
    np.testing.assert_allclose(table.own.params, own, atol=1e-5)
    np.testing.assert_allclose(table.alpha, weights, atol=1e-5)
    assert (np.ptp(weights) > 0.01) == learn
    mixed = weights[:, None] * own + (1 - weights[:, None]) * w
    np.testing.assert_allclose(used(process, state), mixed, atol=1e-5)


def test_apfl_with_nothing_of_its_own_is_fedavg():
    process, state = run(fl.compose(BASE, apfl(0.0)), 3)
    plain, same = run(BASE, 3)
    np.testing.assert_array_equal(used(process, state), np.tile(plain.params(same), (4, 1)))


def test_a_client_that_never_took_part_uses_the_global_model():
    for transform in (personal_model(0.5), apfl(0.5)):
        process, state = run(fl.compose(BASE, transform), 2, fl.fixed([0, 1]))
        report = fl.client_metrics(quadratics().data, personal=True)(process, state)
        plain = fl.client_metrics(quadratics().data)(process, state)
        np.testing.assert_allclose(report.values["loss"][2:], plain.values["loss"][2:], rtol=1e-6)
        assert (report.values["loss"][:2] != plain.values["loss"][:2]).all()


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: personal_model(-1), "lam must"),
        (lambda: apfl(1.5), "alpha must"),
        (lambda: pfedme(0, inner_learning_rate=0.1), "lam must"),
        (lambda: pfedme(1, inner_learning_rate=0), "inner_learning_rate must"),
        (lambda: pfedme(1, inner_learning_rate=0.1, inner_steps=0), "inner_steps must"),
        (lambda: fl.compose(BASE, fine_tuning(epochs=2)), "epochs only together with a client_optimizer"),
        (lambda: fl.compose(BASE, personal_model(0.1, optax.sgd(-1))), "client_optimizer"),
        (lambda: fl.compose(local_only(MODEL, optax.sgd(0.1)), personal_model(0.1)), "this Round sends none"),
        (lambda: fl.compose(local_only(MODEL, optax.sgd(0.1)), fine_tuning()), "this Round sends none"),
        (lambda: fl.compose(local_only(MODEL, optax.sgd(0.1)), pfedme(1, inner_learning_rate=1)), "sends none"),
        (lambda: fl.compose(local_only(MODEL, optax.sgd(0.1)), apfl()), "this Round sends none"),
    ],
)
def test_refusals(call, word):
    with pytest.raises(ValueError, match=word):
        call()
