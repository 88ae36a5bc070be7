"""FedAvg against independent implementations: closed-form gradient descent and a NumPy FedAvg."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.fedsgd import fedsgd
from tests.problems import quadratic_data, quadratic_model, softmax_data, softmax_model, steps

MODEL = softmax_model()


def numpy_gradient(w, b, x, y):
    """Gradient of the mean softmax cross-entropy, by hand."""
    logits = x @ w + b
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    return x.T @ p / len(y), p.mean(0)


@pytest.mark.parametrize("sizes", [(17,), (5, 12, 1, 30)])
def test_one_full_batch_step_of_everyone_is_gradient_descent(sizes):
    data = softmax_data(sizes)
    process = fl.synchronous(fedsgd(MODEL, optax.sgd(0.5)), data)
    state = process.init(jax.random.key(0))
    w, b = (np.asarray(process.params(state)[n], np.float64) for n in ("w", "b"))
    for _ in range(5):
        state, _ = process.step(state, process.data)
        gw, gb = numpy_gradient(w, b, np.asarray(data.arrays["x"], np.float64), data.arrays["y"])
        w, b = w - 0.5 * gw, b - 0.5 * gb
    np.testing.assert_allclose(process.params(state)["w"], w, atol=1e-6)
    np.testing.assert_allclose(process.params(state)["b"], b, atol=1e-6)


def recorded_batches(data, k, key, epochs, batch_size):
    """The rows that a client's fold visits, batch by batch."""
    batches = []
    client = data.client(data.ids[k])
    count = epochs * -(-int(client.size) // batch_size)

    def step(carry, batch, mask, positions, key):
        rows, masks, t = carry
        return rows.at[t].set(positions), masks.at[t].set(mask), t + 1

    start = (jnp.zeros((count, batch_size), jnp.int32), jnp.zeros((count, batch_size), bool), 0)
    rows, masks, _ = client.fold(step, start, epochs=epochs, batch_size=batch_size, key=key)
    for r, m in zip(np.asarray(rows), np.asarray(masks), strict=True):
        batches.append(r[m])
    return batches


@pytest.mark.parametrize("weighting", ["examples", "uniform", "given"])
def test_the_same_batches_through_numpy_fedavg_give_the_same_parameters(weighting):
    data, epochs, batch, eta = softmax_data(), 2, 10, 0.1
    given = np.linspace(1, 3, data.num_clients)
    p_k = {"examples": data.sizes, "uniform": np.ones(data.num_clients), "given": given}[weighting]
    algorithm = fedavg(
        MODEL, optax.sgd(eta), epochs=epochs, batch_size=batch, weighting=given if weighting == "given" else weighting
    )
    process = fl.synchronous(algorithm, data)
    state = process.init(jax.random.key(4))
    w, b = (np.asarray(process.params(state)[n], np.float64) for n in ("w", "b"))
    run_key = state.key
    for r in range(2):
        state, _ = process.step(state, process.data)
        clients_key = jax.random.fold_in(jax.random.fold_in(run_key, r), 1)
        new_w, new_b = 0.0, 0.0
        for k in range(data.num_clients):
            key = jax.random.fold_in(jax.random.fold_in(clients_key, k), 1)
            rows = data.client(data.ids[k]).arrays
            wk, bk = w.copy(), b.copy()
            for chosen in recorded_batches(data, k, key, epochs, batch):
                gw, gb = numpy_gradient(wk, bk, np.asarray(rows["x"], np.float64)[chosen], rows["y"][chosen])
                wk, bk = wk - eta * gw, bk - eta * gb
            new_w, new_b = new_w + p_k[k] * wk, new_b + p_k[k] * bk
        w, b = new_w / p_k.sum(), new_b / p_k.sum()
    np.testing.assert_allclose(process.params(state)["w"], w, atol=1e-5)
    np.testing.assert_allclose(process.params(state)["b"], b, atol=1e-5)


def test_fedavg_with_local_steps_misses_the_optimum_by_what_the_closed_form_says():
    """tau steps on quadratics: the fixed point solves sum_k (I - (I - eta A_k)^tau)(w - b_k) = 0."""
    data, optimum = quadratic_data()
    tau, eta = 5, 0.2
    process = fl.synchronous(
        fedavg(quadratic_model(), optax.sgd(eta), steps=tau, batch_size=None, weighting="uniform"), data
    )
    reached = process.params(steps(process, 200)[0])
    A, b = np.asarray(data.arrays["A"], np.float64), np.asarray(data.arrays["b"], np.float64)
    pull = np.stack([np.eye(3) - np.linalg.matrix_power(np.eye(3) - eta * a, tau) for a in A])
    fixed_point = np.linalg.solve(pull.sum(0), np.einsum("kij,kj->i", pull, b))
    np.testing.assert_allclose(reached, fixed_point, atol=1e-5)
    assert np.abs(fixed_point - optimum).max() > 1e-2


def test_pieces_of_a_large_client_add_up_to_its_full_batch():
    sizes = (3, 4, 5, 6, 7, 4, 5, 300)
    data = softmax_data(sizes)
    assert data.tile < max(sizes)
    process = fl.synchronous(fedsgd(MODEL, optax.sgd(0.5)), data)
    state = process.init(jax.random.key(0))
    w, b = (np.asarray(process.params(state)[n], np.float64) for n in ("w", "b"))
    gw, gb = numpy_gradient(w, b, np.asarray(data.arrays["x"], np.float64), data.arrays["y"])
    state, _ = process.step(state, process.data)
    np.testing.assert_allclose(process.params(state)["w"], w - 0.5 * gw, atol=1e-6)
    np.testing.assert_allclose(process.params(state)["b"], b - 0.5 * gb, atol=1e-6)
