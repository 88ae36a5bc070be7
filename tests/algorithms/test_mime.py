"""Mime and MimeLite: the centralised optimizer that they mimic, their pseudo-code in NumPy, and FedAvg."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms.mime import mime
from algorithms.mime_lite import mime_lite
from tests.algorithms.quadratics import MODEL, fedavg_path, quadratics, trajectory

BASES = {
    "sgd": optax.sgd(0.2),
    "momentum": optax.sgd(0.1, 0.8),
    "paper's momentum": optax.chain(optax.ema(0.8, debias=False), optax.scale(-0.3)),
    "adam": optax.adam(0.1),
}
WORK = {"steps": 5, "batch_size": None}


def centralised(optimizer, rounds):
    """The base optimizer on the global objective."""
    q, p = quadratics(), quadratics().shares()
    w, path = jnp.zeros(3), []
    state = optimizer.init(w)
    for _ in range(rounds):
        gradient = sum(p[k] * q.gradient(k, np.asarray(w, np.float64)) for k in range(4))
        updates, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, w)
        w = w + updates
        path.append(np.asarray(w))
    return path


@pytest.mark.parametrize("base", BASES)
def test_one_full_step_of_everyone_is_the_base_optimizer(base):
    expected = centralised(BASES[base], 4)
    if base != "adam":  # the mean of Adam's steps on the clients' gradients is no Adam step on the mean
        lite = trajectory(mime_lite(MODEL, BASES[base], steps=1, batch_size=None), 4)
        np.testing.assert_allclose(lite[1:], expected, atol=5e-6)
    full = trajectory(mime(MODEL, BASES[base], steps=1, batch_size=None), 8)
    np.testing.assert_allclose(full[2::2], expected, atol=5e-6)


def momentum(beta=0.8, eta=0.3):
    """The paper's table 1: U(g, s) = (1 - beta) g + beta s, and V the same."""
    move = lambda g, s: (1 - beta) * g + beta * s
    return (lambda g, s: eta * move(g, s)), move, np.zeros(3)


def adam(eta=0.1, b1=0.9, b2=0.999):
    """Adam's step and its moments; bias corrected by the number of server rounds, as optax does."""

    def advance(g, s):
        m, v, t = s
        return b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2, t + 1

    def step(g, s):
        m, v, t = advance(g, s)
        return eta * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)

    return step, advance, (np.zeros(3), np.zeros(3), 0)


def pseudo_code(kind, rounds, rule, steps=5):
    """Algorithm 1: clients step with the server's s, which is updated once, with the full gradients."""
    q, p = quadratics(), quadratics().shares()
    step, advance, s = rule
    x, path = np.zeros(3), []
    for _ in range(rounds):
        c = sum(p[k] * q.gradient(k, x) for k in range(4))
        ys = []
        for k in range(4):
            y = x.copy()
            for _ in range(steps):
                g = q.gradient(k, y) - q.gradient(k, x) + c if kind == "mime" else q.gradient(k, y)
                y = y - step(g, s)
            ys.append(y)
        s = advance(c, s)
        x = p @ ys
        path.append(x)
    return path


@pytest.mark.parametrize(("base", "rule"), [("paper's momentum", momentum()), ("adam", adam())])
def test_is_the_pseudo_code(base, rule):
    lite = trajectory(mime_lite(MODEL, BASES[base], **WORK), 4)
    np.testing.assert_allclose(lite[1:], pseudo_code("lite", 4, rule), atol=2e-5)
    full = trajectory(mime(MODEL, BASES[base], **WORK), 8)
    np.testing.assert_allclose(full[2::2], pseudo_code("mime", 4, rule), atol=2e-5)


def test_mime_reaches_the_optimum_where_mime_lite_stops_with_fedavg():
    q, p = quadratics(), quadratics().shares()
    lite = trajectory(mime_lite(MODEL, BASES["sgd"], **WORK), 100)
    np.testing.assert_array_equal(lite[:4], fedavg_path())  # without statistics it is FedAvg, bit for bit
    np.testing.assert_allclose(lite[-1], q.fedavg_limit(p, 0.2, [5] * 4), atol=1e-5)
    full = trajectory(mime(MODEL, BASES["sgd"], **WORK), 160)
    np.testing.assert_allclose(full[-1], q.optimum(p), atol=1e-5)


def test_momentum_of_zero_is_no_momentum():
    none = trajectory(mime(MODEL, optax.sgd(0.2), **WORK), 6)
    zero = trajectory(mime(MODEL, optax.sgd(0.2, 0.0), **WORK), 6)
    np.testing.assert_allclose(zero, none, atol=1e-6)


@pytest.mark.parametrize("make", [mime, mime_lite])
def test_refusals(make):
    with pytest.raises(ValueError, match="base_optimizer must come from optax"):
        make(MODEL, lambda r: optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"base_optimizer.*learning rate"):
        make(MODEL, optax.sgd(-0.1))
    with pytest.raises(ValueError, match="keep_optimizer_state"):
        make(MODEL, optax.sgd(0.1), keep_optimizer_state=True)
