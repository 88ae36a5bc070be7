"""Per-FedAvg, Meta-SGD and Reptile against jax.grad through the adaptation, and their neutral values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.local_only import local_only
from algorithms.scaffold import scaffold
from fedjax_lab.transforms import fine_tuning, meta_sgd, per_fedavg, reptile, with_rates
from tests.problems import assert_close, assert_same_bits, quadratic_model, softmax_data, softmax_model, steps

MODEL = softmax_model()
ALPHA = 0.3
ONE = {"steps": 1, "batch_size": None}


def parts(data, share=0.5):
    """Support and query of the only client, as arrays."""
    client = data.on_device().view(jnp.int32(0))
    return [part.full() for part in client.split(share)]


def loss(params, part):
    batch, mask = part
    return fl.masked_mean(MODEL.loss(params, (), batch, mask, None, True)[0], mask)


def moved(round, data, rounds=1):
    """Minus what one round of rate 1 adds to the parameters: the gradient it followed."""
    process = fl.synchronous(round, data)
    state = process.init(jax.random.key(0))
    start = process.params(state)
    after, _ = process.step(state, process.data)
    return start, jax.tree.map(lambda a, b: a - b, start, process.params(after))


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_the_exact_form_is_jax_grad_through_the_adaptation(inner_steps):
    data = softmax_data((9,))
    support, query = parts(data)
    start, gradient = moved(
        fl.compose(fedavg(MODEL, optax.sgd(1.0), **ONE), per_fedavg(ALPHA, inner_steps=inner_steps)), data
    )

    def meta(params):
        for _ in range(inner_steps):
            params = jax.tree.map(lambda w, g: w - ALPHA * g, params, jax.grad(loss)(params, support))
        return loss(params, query)

    assert_close(gradient, jax.grad(meta)(start), atol=2e-6, rtol=1e-5)


def test_the_other_forms():
    data = softmax_data((9,))
    support, query = parts(data)
    base = fedavg(MODEL, optax.sgd(1.0), **ONE)
    start, exact = moved(fl.compose(base, per_fedavg(ALPHA)), data)
    _, free = moved(fl.compose(base, per_fedavg(ALPHA, form="hessian_free", delta=1e-2)), data)
    _, first = moved(fl.compose(base, per_fedavg(ALPHA, form="first_order")), data)
    adapted = jax.tree.map(lambda w, g: w - ALPHA * g, start, jax.grad(loss)(start, support))
    assert_close(first, jax.grad(loss)(adapted, query), atol=2e-6)
    assert_close(free, exact, atol=2e-4, rtol=1e-3)
    assert np.abs(first["w"] - exact["w"]).max() > 1e-2


def test_what_a_client_would_use_is_the_model_adapted_on_all_its_data():
    data = softmax_data((9,))
    process = fl.synchronous(fl.compose(fedavg(MODEL, optax.sgd(0.1)), per_fedavg(ALPHA)), data)
    state, _ = steps(process, 2)
    client, w = process.data.view(jnp.int32(0)), process.params(state)
    adapted = process.round.personalize(process.server(state).variables, (), client, jax.random.key(0)).params
    expected = jax.tree.map(lambda w, g: w - ALPHA * g, w, jax.grad(loss)(w, client.full()))
    assert_close(adapted, expected)


@pytest.mark.parametrize(("form", "power"), [("exact", 2), ("first_order", 1)])
def test_on_quadratics_it_reaches_the_optimum_of_what_it_minimises(form, power):
    """F_k(w - alpha grad F_k(w)) has the Hessian (I - alpha A_k)^2 A_k; without second derivatives one factor goes."""
    rng = np.random.default_rng(0)
    A, b = np.stack([np.diag(rng.uniform(0.3, 1.5, 3)) for _ in range(4)]), rng.normal(0, 2, (4, 3))
    twice = {k: {"A": np.stack([A[k], A[k]]), "b": np.stack([b[k], b[k]])} for k in range(4)}
    base = fedavg(quadratic_model(3), optax.sgd(0.5), **ONE)
    process = fl.synchronous(fl.compose(base, per_fedavg(0.4, form=form)), fl.FederatedData.from_clients(twice))
    weights = np.stack([np.linalg.matrix_power(np.eye(3) - 0.4 * a, power) @ a for a in A])
    optimum = np.linalg.solve(weights.sum(0), np.einsum("kij,kj->i", weights, b))
    np.testing.assert_allclose(process.params(steps(process, 200)[0]), optimum, atol=1e-5)
    plain = np.linalg.solve(A.sum(0), np.einsum("kij,kj->i", A, b))
    assert np.abs(plain - optimum).max() > 0.1


@pytest.mark.parametrize("form", ["exact", "first_order"])
def test_meta_sgd_is_jax_grad_in_parameters_and_rates(form):
    data = softmax_data((9,))
    support, query = parts(data)
    base = fedavg(with_rates(MODEL, ALPHA), optax.sgd(1.0), **ONE)
    start, gradient = moved(fl.compose(base, meta_sgd(form=form)), data)

    def meta(both):
        inside = jax.grad(loss)(both["params"], support)
        if form == "first_order":
            inside = jax.lax.stop_gradient(inside)
        return loss(jax.tree.map(lambda w, a, g: w - a * g, both["params"], both["rates"], inside), query)

    assert_close(gradient, jax.grad(meta)(start), atol=2e-6, rtol=1e-5)
    assert float(start["rates"]["w"][0, 0]) == pytest.approx(ALPHA)


def test_meta_sgd_learns_rates_and_evaluates_the_adapted_model():
    data = softmax_data()
    process = fl.synchronous(fl.compose(fedavg(with_rates(MODEL, 0.1), optax.sgd(0.1)), meta_sgd()), data)
    state, metrics = steps(process, 5)
    assert float(jnp.std(process.params(state)["rates"]["w"])) > 1e-3
    report = fl.per_client_accuracy(data)(process, state)
    assert 0 < report["accuracy"] <= 1 and 0 < report["personal_accuracy"] <= 1
    assert fl.total_bytes(metrics["uplink_bytes"]) == data.num_clients * 2 * 4 * 15


@pytest.mark.slow
def test_support_batches_are_drawn_anew_and_an_ample_one_is_the_whole_support():
    data = softmax_data((9, 5, 1))
    base = fedavg(MODEL, optax.sgd(0.1), epochs=2, batch_size=4)
    final = lambda size: (
        p := fl.synchronous(fl.compose(base, per_fedavg(ALPHA, support_batch_size=size)), data)
    ).params(steps(p, 2)[0])
    assert_close(final(16), final(None), atol=2e-6)
    assert np.abs(final(1)["w"] - final(None)["w"]).max() > 1e-3


def test_a_share_of_numpys_is_one_too():
    data = softmax_data((7, 4))
    for share in (0.25, np.float32(0.25)):
        fl.synchronous(fl.compose(fedavg(softmax_model(), optax.sgd(0.1)), per_fedavg(0.1, support=share)), data)


def test_reptile_goes_a_part_of_the_way():
    data = softmax_data()
    inner = fedavg(MODEL, optax.sgd(0.1), epochs=1)
    final = lambda round: (p := fl.synchronous(round, data)).params(steps(p, 3)[0])
    part = final(fl.compose(inner, reptile(0.4)))
    assert_close(part, final(fedavg(MODEL, optax.sgd(0.1), epochs=1, server_optimizer=optax.sgd(0.4))), atol=2e-6)
    assert_same_bits(final(fl.compose(inner, reptile(1))), final(inner))
    over = fl.compose(scaffold(MODEL, optax.sgd(0.1)), reptile(0.5), fine_tuning())
    assert np.isfinite(final(over)["w"]).all()


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: per_fedavg(0), "alpha must"),
        (lambda: per_fedavg(0.1, form="hessian"), "did you mean 'hessian_free'"),
        (lambda: per_fedavg(0.1, inner_steps=0), "inner_steps must"),
        (lambda: per_fedavg(0.1, support=1.0), "support must be a share"),
        (lambda: per_fedavg(0.1, support=True), "support must be a share"),
        (lambda: per_fedavg(0.1, support_batch_size=0), "support_batch_size must"),
        (lambda: per_fedavg(0.1, delta=0), "delta must"),
        (lambda: meta_sgd(form="hessian_free"), "form must"),
        (lambda: with_rates(MODEL, 0), "rate must"),
        (lambda: reptile(0), "step_size must"),
        (lambda: fl.compose(local_only(MODEL, optax.sgd(0.1)), per_fedavg(0.1)), "sends none"),
    ],
)
def test_refusals(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_refusals_that_need_data_or_a_model():
    base = fedavg(MODEL, optax.sgd(0.1))
    with pytest.raises(ValueError, match="no client has two examples"):
        fl.synchronous(fl.compose(base, per_fedavg(0.1)), softmax_data((1, 1)))
    with pytest.raises(ValueError, match="with_rates"):
        fl.synchronous(fl.compose(base, meta_sgd()), softmax_data())
