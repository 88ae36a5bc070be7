"""Gradients through rounds: closed forms, central differences, and the example of docs/hypergradients.md."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.fedprox import fedprox
from algorithms.fedrecon import fedrecon
from algorithms.fedrep import fedrep
from fedjax_lab.transforms import leaves
from tests.problems import assert_close, softmax_data, softmax_model, steps

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODEL, DATA = softmax_model(), softmax_data(empty=1)


def curved_model(start) -> fl.Model:
    """Rows {"h": [d], "c": [d]}; loss ``sum_i h_i (w_i - c_i)^2 / 2``."""

    def loss(params, model_state, batch, mask, key, train):
        return 0.5 * jnp.sum(batch["h"] * (params[None] - batch["c"]) ** 2, -1), model_state

    return fl.Model(lambda key: (jnp.asarray(start, jnp.float32), ()), loss, lambda params, state, batch: {})


def curved_data(*clients) -> fl.FederatedData:
    row = lambda h, c: {"h": np.float32([h]), "c": np.float32([c])}
    return fl.FederatedData.from_clients({k: row(h, c) for k, (h, c) in enumerate(clients)})


def after(process, rounds, kept=fl.identity):
    """The model's params after some rounds, as one traced expression."""
    step = lambda state, _: (kept(process.step)(state, process.data)[0], None)
    return process.params(jax.lax.scan(step, process.init(jax.random.key(0)), length=rounds)[0])


@pytest.mark.parametrize("mode", ["grad", "grad with less memory", "jacfwd", "jacfwd of a static loop"])
@pytest.mark.parametrize(("rows", "batch_size"), [(1, 1), (1, None), (4, None)], ids=["batch", "full", "pieces"])
def test_one_client_is_gradient_descent_in_closed_form(rows, batch_size, mode):
    """``w_n = (1 - lr h)^n w_0`` after n steps in all; the objective is ``sum w_n^2 / 2``."""
    h, w0, k, rounds, lr = np.array([0.5, 1.5]), np.array([1.0, -2.0]), 3, 2, 0.3
    spread = np.linspace(0.8, 1.2, rows)[:, None] if rows > 1 else np.ones((1, 1))  # of mean 1
    arrays = {"h": np.float32(spread * h), "c": np.zeros((rows, 2), np.float32)}
    data = dataclasses.replace(fl.FederatedData.from_clients({0: arrays}), tile=max(rows // 2, 1))
    model = curved_model(w0)

    def objective(lr):
        algorithm = fedavg(model, optax.sgd(lr), steps=k, batch_size=batch_size, static=mode != "jacfwd")
        kept = jax.checkpoint if mode == "grad with less memory" else fl.identity
        return 0.5 * jnp.sum(after(fl.synchronous(algorithm, data), rounds, kept) ** 2)

    n = k * rounds
    w = (1 - lr * h) ** n * w0
    exact = np.sum(w * -h * n * (1 - lr * h) ** (n - 1) * w0)
    slope = jax.grad if mode.startswith("grad") else jax.jacfwd
    np.testing.assert_allclose(jax.jit(slope(objective))(lr), exact, rtol=1e-5)


def test_a_mixing_weight_and_its_second_derivative_in_closed_form():
    """Two clients of weights s and 1 - s. A round takes w to ``sum_k p_k (c_k + r_k (w - c_k))``, r = (1 - lr h)^3."""
    h, c, lr, s = np.array([0.5, 1.5]), np.array([2.0, -1.0]), 0.2, 0.3
    data, model = curved_data(([h[0]], [c[0]]), ([h[1]], [c[1]])), curved_model([0.5])

    def objective(s):
        algorithm = fedavg(model, optax.sgd(lr), steps=3, static=True, weighting=jnp.stack([s, 1 - s]))
        return after(fl.synchronous(algorithm, data, lanes=1), 2)[0]

    # By hand, with first and second derivatives with respect to s carried along.
    r = (1 - lr * h) ** 3
    moved, pull = c * (1 - r), np.array([s, 1 - s]) @ r
    w, dw, ddw = 0.5, 0.0, 0.0
    for _ in range(2):
        ddw = 2 * (r[0] - r[1]) * dw + pull * ddw
        dw = (moved[0] - moved[1]) + (r[0] - r[1]) * w + pull * dw
        w = np.array([s, 1 - s]) @ moved + pull * w
    both = jax.jit(lambda s: (objective(s), jax.grad(objective)(s), jax.jacfwd(jax.grad(objective))(s)))(s)
    np.testing.assert_allclose(both, (w, dw, ddw), rtol=1e-5)


def validation_loss(params):
    out = DATA.arrays["x"] @ params["w"] + params["b"][None]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out, DATA.arrays["y"]))


def central_difference(function, x, step=4e-3):
    """The slope from four points, exact for polynomials of the fourth degree."""
    f = {i: float(function(x + i * step)) for i in (-2, -1, 1, 2)}
    return (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * step)


@pytest.mark.slow
def test_ragged_clients_in_chunks_against_central_differences():
    """Learning rate, strength of the prox term and server learning rate; four of nine clients, one of them empty.

    In float32 a loss of about 1 is exact to some 1e-7, hence its difference to 1.5 * 1e-7 / 4e-3 = 4e-5.
    """

    def objective(hyper):
        lr, mu, server = hyper
        algorithm = fedprox(
            MODEL, optax.sgd(lr), mu=mu, epochs=2, batch_size=10, static=True, server_optimizer=optax.sgd(server, 0.5)
        )
        sampler = fl.dropout(fl.uniform(4), 0.3)
        return validation_loss(after(fl.synchronous(algorithm, DATA, sampler, lanes=2), 3))

    at = jnp.array([0.2, 0.5, 0.8])
    both = jax.jit(jax.value_and_grad(objective))
    gradient = both(at)[1]
    for i in range(3):
        along = central_difference(lambda t, i=i: both(at.at[i].add(t))[0], 0.0)
        np.testing.assert_allclose(gradient[i], along, rtol=1e-3, atol=1e-4)
        assert abs(gradient[i]) > 1e-3  # or it says nothing


def test_forward_mode_passes_unequal_work_and_a_poisoned_client():
    """Stragglers' own numbers of epochs, in loops that are not static; a client of NaN counts as absent."""
    x = np.array(DATA.arrays["x"])
    x[int(DATA.starts[3])] = np.nan
    poisoned = dataclasses.replace(DATA, arrays={**DATA.arrays, "x": x})

    def objective(lr):
        algorithm = fedavg(MODEL, optax.sgd(lr), epochs=fl.partial_work(3, 0.5), batch_size=10)
        return validation_loss(after(fl.synchronous(algorithm, poisoned, fl.everyone(), lanes=3), 2))

    both = jax.jit(lambda lr: jax.jvp(objective, (lr,), (1.0,)))
    slope = both(0.2)[1]
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(slope, central_difference(lambda lr: both(lr)[0], 0.2), rtol=1e-3, atol=1e-4)


def test_a_static_loop_trains_as_the_other_does():
    results = []
    for static in (False, True):
        algorithm = fedavg(MODEL, optax.adam(0.05), epochs=2, static=static)
        state, metrics = steps(fl.synchronous(algorithm, DATA, fl.uniform(5), lanes=2), 2)
        results.append((state.server, metrics["loss"]))
    assert_close(*results)


@pytest.mark.parametrize(
    "make",
    [
        lambda lr: fedrep(MODEL, optax.sgd(lr), head=leaves("params/b"), head_epochs=2, static=True),
        lambda lr: fedrecon(MODEL, optax.sgd(lr), private=leaves("params/b"), reconstruction_steps=2, static=True),
    ],
    ids=["fedrep", "fedrecon"],
)
def test_both_phases_of_a_split_model_are_static(make):
    def shared(lr):
        return jnp.sum(after(fl.synchronous(make(lr), DATA, fl.everyone(), lanes=3), 2)["w"] ** 2)

    reverse, forward = jax.jit(lambda lr: (jax.grad(shared)(lr), jax.jvp(shared, (lr,), (1.0,))[1]))(0.2)
    assert abs(forward) > 1e-2
    np.testing.assert_allclose(reverse, forward, rtol=1e-4)


def test_work_that_is_not_known_when_compiled_is_refused():
    for work in (fl.partial_work(3, 0.5), jnp.int32(2)):
        with pytest.raises(ValueError, match=r"static=True needs epochs as a Python integer.*forward mode"):
            fedavg(MODEL, optax.sgd(0.1), epochs=work, static=True)


def test_the_example_of_the_document_runs():
    """docs/hypergradients.md: the mixing weight that the validation data were made with, and a better learning rate."""
    text = (ROOT / "docs" / "hypergradients.md").read_text()
    scope = {}
    exec(
        compile("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), "docs/hypergradients.md", "exec"), scope
    )
    share, rate = float(jax.nn.sigmoid(scope["hyper"]["share"])), float(jnp.exp(scope["hyper"]["log_rate"]))
    assert abs(share - 0.8) < 0.03
    assert rate > 0.1
    x, y = scope["field"]["x"].astype(np.float64), scope["field"]["y"].astype(np.float64)
    best = np.mean((x @ np.linalg.lstsq(x, y)[0] - y) ** 2)  # of any linear model
    assert best <= scope["losses"][-1] < 1.01 * best
    assert scope["losses"][0] > 2 * best
    assert scope["slope_at"] < -1  # a larger learning rate is better, by far
