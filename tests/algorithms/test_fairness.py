"""AFL, q-FedAvg, q-FedSGD and TERM against their pseudo-code in NumPy, and the objectives that they minimise."""

import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.afl import afl
from algorithms.fedavg import fedavg
from algorithms.q_fedavg import q_fedavg
from algorithms.q_fedsgd import q_fedsgd
from algorithms.term import term, tilted_examples
from tests.algorithms.quadratics import DIM, MODEL, cohorts, fedavg_path, quadratics, trajectory
from tests.algorithms.test_template import points, squared_distance
from tests.problems import assert_close, softmax_data, softmax_model, steps

ETA, TAU = 0.2, 5
WORK = {"steps": TAU, "batch_size": None}


def local(k, w, steps=TAU, eta=ETA):
    for _ in range(steps):
        w = w - eta * quadratics().gradient(k, w)
    return w


# ---- AFL ----


def project(v):
    """Onto the simplex, by bisection on the threshold."""
    low, high = v.min() - 1, v.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(v - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(v - low, 0)


def test_afl_is_the_pseudo_code_also_for_cohorts():
    q, gamma, drawn = quadratics(), 0.02, cohorts(2, 4)
    w, lam, expected = np.zeros(DIM), q.shares(), []
    for ids in drawn:
        losses = np.zeros(4)
        for k in ids:
            losses[k] = q.loss(k, w) * 4 / len(ids)
        w = sum(lam[k] * local(k, w) for k in ids) / sum(lam[k] for k in ids)
        lam = project(lam + gamma * losses)
        expected.append(w)
    assert (lam == 0).any()  # one client fell out of the mixture
    path = trajectory(afl(MODEL, optax.sgd(ETA), lam_learning_rate=gamma, **WORK), 4, fl.uniform(2))
    np.testing.assert_allclose(path[1:], expected, atol=1e-5)


def test_afl_without_ascent_is_fedavg():
    path = trajectory(afl(MODEL, optax.sgd(ETA), lam_learning_rate=0.0, **WORK), 3)
    np.testing.assert_allclose(path, fedavg_path(), atol=1e-6)


def test_afl_finds_the_centre_of_the_worst_clients():
    # max_k |w - x_k|^2 / 2 is least in the middle of the two that are farthest apart; the third doesn't matter.
    data = points([0, 0], [4, 2], [1, 1])
    algorithm = afl(squared_distance(2), optax.sgd(0.02), lam_learning_rate=0.01, steps=1)
    process = fl.synchronous(algorithm, data)
    state, metrics = steps(process, 1500)
    np.testing.assert_allclose(process.params(state), [2, 1], atol=0.02)
    np.testing.assert_allclose(process.server(state).lam, [0.5, 0.5, 0], atol=0.02)
    assert fl.total_bytes(metrics["uplink_bytes"]) == 3 * (2 * 4 + 8)
    assert fl.total_bytes(metrics["downlink_bytes"]) == 3 * (2 * 4 + 4)


def test_afl_lets_in_who_began_outside_the_mixture():
    data, given = points([0, 0], [4, 2], [1, 1]), np.array([1, 0, 1], np.float32)
    algorithm = afl(squared_distance(2), optax.sgd(0.02), lam_learning_rate=0.01, weighting=given, steps=1)
    process = fl.synchronous(algorithm, data)
    state, metrics = steps(process, 1)
    assert int(metrics["survivors"]) == 3
    # Losses at (0, 0) are 0, 10 and 1.
    np.testing.assert_allclose(process.server(state).lam, project(np.array([0.5, 0.1, 0.5 + 0.01])), atol=1e-6)


def test_afl_reports_the_loss_of_a_cohort_outside_the_mixture():
    data, given = points([0, 0], [1, 0]), np.array([1, 0], np.float32)
    algorithm = afl(squared_distance(2), optax.sgd(0.02), lam_learning_rate=0.01, weighting=given, steps=1)
    _, metrics = steps(fl.synchronous(algorithm, data, fl.fixed([1])), 1)
    np.testing.assert_allclose(metrics["loss"], 0.5, rtol=1e-6)


# ---- q-FFL ----


def test_q_fedavg_is_the_pseudo_code():
    quad, q, L, p = quadratics(), 1.5, 4.0, quadratics().shares()
    w, expected = np.zeros(DIM), []
    for _ in range(4):
        top, bottom = 0, 0
        for k in range(4):
            loss, dw = quad.loss(k, w), L * (w - local(k, w))
            top = top + p[k] * loss**q * dw
            bottom = bottom + p[k] * (q * loss ** (q - 1) * (dw @ dw) + L * loss**q)
        w = w - top / bottom
        expected.append(w)
    path = trajectory(q_fedavg(MODEL, optax.sgd(ETA), q=q, L=L, **WORK), 4)
    np.testing.assert_allclose(path[1:], expected, atol=1e-5)


def test_q_of_zero_is_fedavg():
    path = trajectory(q_fedavg(MODEL, optax.sgd(ETA), q=0, L=3.0, **WORK), 3)
    np.testing.assert_allclose(path, fedavg_path(), atol=1e-6)


def test_q_fedsgd_minimises_its_objective_and_evens_out_the_losses():
    quad, p = quadratics(), quadratics().shares()
    spread, last = {}, {}
    for q in (0.0, 2.0):
        last[q] = trajectory(q_fedsgd(MODEL, q=q, L=1.2), 500)[-1]
        losses = np.array([quad.loss(k, last[q]) for k in range(4)])
        gradient = sum(p[k] * losses[k] ** q * quad.gradient(k, last[q]) for k in range(4))
        np.testing.assert_allclose(gradient / np.max(losses**q), 0, atol=2e-5)
        spread[q] = losses.std()
    np.testing.assert_allclose(last[0.0], quad.optimum(p), atol=1e-5)
    assert spread[2.0] < 0.9 * spread[0.0]


# ---- TERM ----


@pytest.mark.parametrize("t", [0.7, -0.7])
def test_term_is_the_pseudo_code_and_minimises_its_objective(t):
    """Weights p_k exp(t F_k); the estimate that the server keeps cancels."""
    q, p = quadratics(), quadratics().shares()
    w, expected = np.zeros(DIM), []
    for _ in range(3):
        losses = np.array([q.loss(k, w) for k in range(4)])
        weights = p * np.exp(t * losses)
        w = weights @ [local(k, w) for k in range(4)] / weights.sum()
        expected.append(w)
    path = trajectory(term(MODEL, optax.sgd(ETA), t=t, **WORK), 3)
    np.testing.assert_allclose(path[1:], expected, atol=1e-5)
    last = trajectory(term(MODEL, optax.sgd(0.1), t=t, steps=1, batch_size=None), 800)[-1]
    weights = p * np.exp(t * np.array([q.loss(k, last) for k in range(4)]))
    gradient = sum(weights[k] * q.gradient(k, last) for k in range(4)) / weights.sum()
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_term_reports_the_tilted_loss_and_large_losses_do_not_overflow():
    q, p, t = quadratics(), quadratics().shares(), 3.0
    process = fl.synchronous(term(MODEL, optax.sgd(0.01), t=t, **WORK), q.data)
    state, _ = steps(process, 2)
    w = np.asarray(process.params(state), np.float64)
    _, metrics = process.step(state, process.data)
    tilted = np.log(p @ np.exp(t * np.array([q.loss(k, w) for k in range(4)]))) / t
    np.testing.assert_allclose(float(metrics["tilted_loss"]), tilted, rtol=1e-5)
    far = trajectory(term(MODEL, optax.sgd(0.01), t=1e4, **WORK), 5)
    assert np.isfinite(far).all()


def test_term_without_tilt_is_fedavg():
    np.testing.assert_allclose(trajectory(term(MODEL, optax.sgd(ETA), t=0.0, **WORK), 3), fedavg_path(), atol=1e-6)
    nearly = trajectory(term(MODEL, optax.sgd(ETA), t=1e-6, **WORK), 3)
    np.testing.assert_allclose(nearly, fedavg_path(), atol=1e-4)


def test_tilted_examples_by_hand():
    """The gradient of 1/tau log mean exp(tau f) is the examples' gradients weighed by exp(tau f)."""
    tau, x = 0.5, np.array([[1.0], [3.0]], np.float32)
    model, data = squared_distance(1), fl.FederatedData.from_clients({0: {"x": x}})
    weights = np.exp(tau * 0.5 * x[:, 0] ** 2)
    gradient = -(weights @ x[:, 0]) / weights.sum()
    process = fl.synchronous(term(model, optax.sgd(1.0), t=0.0, tau=tau, steps=1, batch_size=None), data)
    np.testing.assert_allclose(process.params(steps(process, 1)[0]), [-gradient], rtol=1e-5)
    _, metrics = process.step(process.init(0), process.data)
    np.testing.assert_allclose(float(metrics["tilted_loss"]), np.log(weights.mean()) / tau, rtol=1e-5)
    # In a batch of which a part is masked the rest counts as if it were alone.
    mask = np.array([True, False])
    losses, _ = tilted_examples(model, tau).loss(np.zeros(1), (), {"x": x}, mask, None, True)
    np.testing.assert_allclose(losses, [0.5, 0])


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: afl(MODEL, optax.sgd(0.1), lam_learning_rate=-1), "lam_learning_rate must"),
        (lambda: q_fedavg(MODEL, optax.sgd(0.1), q=-1, L=1), "q must"),
        (lambda: q_fedavg(MODEL, optax.sgd(0.1), q=1, L=0), "L must"),
        (lambda: q_fedsgd(MODEL, q=1, L=0), "L must"),
        (lambda: term(MODEL, optax.sgd(0.1), t=float("inf")), "t must"),
        (lambda: term(MODEL, optax.sgd(0.1), t="1"), "t must"),
        (lambda: term(MODEL, optax.sgd(0.1), t=1, tau=float("nan")), "tau must"),
    ],
)
def test_refusals(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_empty_clients_have_no_part_in_the_mixture():
    process = fl.synchronous(afl(softmax_model(), optax.sgd(0.1), lam_learning_rate=0.0), softmax_data(empty=1))
    plain = fl.synchronous(fedavg(softmax_model(), optax.sgd(0.1)), softmax_data(empty=1))
    state, _ = steps(process, 2)
    assert float(process.server(state).lam[-1]) == 0
    assert_close(process.params(state), plain.params(steps(plain, 2)[0]))
