"""FedRep and its kin against NumPy, and L2GD against its coin flips."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.fedrep import fedrep
from algorithms.l2gd import l2gd
from fedjax_lab.transforms import leaves, private
from fedjax_lab.transforms.private import holding
from tests.algorithms import quadratics as quad
from tests.laws.test_centralised import numpy_gradient
from tests.problems import softmax_data, softmax_model, steps

MODEL = softmax_model()
HEAD = leaves("params/b")


def test_predicates_by_pattern():
    chosen = leaves("params/Dense_1/*", "model_state/*")
    names = ["params/Dense_0/kernel", "params/Dense_1/kernel", "params/Dense_1/bias", "model_state/mean"]
    assert [chosen(n) for n in names] == [False, True, True, True]


@pytest.mark.parametrize("alternating", [True, False])
def test_alternating_and_joint_training_by_hand(alternating):
    """Two full-batch steps of rate 0.5: of b alone and then of w alone, or of both at once."""
    data, eta = softmax_data((7, 4)), 0.5
    base = fedavg(MODEL, optax.sgd(eta), steps=2, batch_size=None)
    process = fl.synchronous(fl.compose(base, private(HEAD, alternating=alternating)), data)
    state = process.init(jax.random.key(0))
    w, heads = np.asarray(process.params(state)["w"], np.float64), np.zeros((2, 3))
    for _ in range(2):
        state, _ = process.step(state, process.data)
        copies = []
        for k in range(2):
            arrays = data.client(data.ids[k]).arrays
            x, y = np.asarray(arrays["x"], np.float64), arrays["y"]
            own = w.copy()
            for phase in ("b", "w") if alternating else ("both",):
                for _ in range(2):
                    gw, gb = numpy_gradient(own, heads[k], x, y)
                    heads[k] = heads[k] - eta * gb * (phase != "w")
                    own = own - eta * gw * (phase != "b")
            copies.append(own)
        w = np.array([7, 4]) / 11 @ np.reshape(copies, (2, -1))
        w = w.reshape(4, 3)
    np.testing.assert_allclose(process.params(state)["w"], w, atol=1e-5)
    np.testing.assert_allclose(process.clients(state).table.part.params["b"], heads, atol=1e-5)


def test_a_part_that_is_held_stays_whatever_the_optimizer_does():
    data = softmax_data()
    decaying = optax.adamw(0.05, weight_decay=0.5)
    round = fedrep(MODEL, decaying, head=HEAD, head_epochs=1)
    process = fl.synchronous(round, data)
    _, metrics = steps(process, 2)
    alone = fl.local_training(MODEL, decaying, epochs=1)
    # The head after the first phase is what local training with w held gives; the second phase leaves it.
    first, _ = process.step(process.init(jax.random.key(0)), process.data)
    start = process.variables(process.init(jax.random.key(0)))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.split(jax.random.key(0))[1], 0), 1)
    key = jax.random.fold_in(jax.random.fold_in(key, 3), 1)
    held = holding(lambda path: not HEAD(path))
    run = jax.jit(lambda: alone(start, process.data.view(jnp.int32(3)), jax.random.fold_in(key, 0xFE9), held))()
    own = process.clients(first).table.part.params["b"][3]
    np.testing.assert_allclose(own, run.variables.params["b"], atol=1e-6)
    assert fl.total_bytes(metrics["uplink_bytes"]) == data.num_clients * 4 * 12


def test_fedrep_with_its_own_number_of_head_epochs_trains():
    data = softmax_data()
    process = fl.synchronous(fedrep(MODEL, optax.sgd(0.3), head=HEAD, head_epochs=3), data, fl.uniform(4))
    state, _ = steps(process, 10)
    assert fl.per_client_accuracy(data)(process, state)["personal_accuracy"] > 0.6


# ---- L2GD ----


def test_l2gd_is_the_coin_flips_of_algorithm_1():
    q, rate, lam, p, rounds = quad.quadratics(), 0.05, 2.0, 0.3, 6
    process = fl.synchronous(l2gd(quad.MODEL, learning_rate=rate, lam=lam, p=p), q.data)
    state, _ = steps(process, rounds)
    run = jax.random.split(jax.random.key(0))[1]
    coins = []
    for r in range(rounds):
        public = jax.random.fold_in(jax.random.fold_in(run, r), 0)
        draw = lambda tag, chance, public=public: int(jax.random.geometric(jax.random.fold_in(public, tag), chance))
        coins += [1] * draw(0x13, 1 - p) + [0] * draw(0x12, p)
    assert len(set(map(len, "".join(map(str, coins)).split("1")))) > 2  # runs of different lengths
    x = np.zeros((4, quad.DIM))
    for coin in coins:
        if coin:
            x = x - rate * lam / p * (x - x.mean(0))
        else:
            x = np.stack([x[k] - rate / (1 - p) * q.gradient(k, x[k]) for k in range(4)])
    np.testing.assert_allclose(process.clients(state).table.variables.params, x, atol=1e-5)
    np.testing.assert_allclose(process.params(state), x.mean(0), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"lam": -1, "p": 0.5}, "lam must"),
        ({"lam": 1, "p": 0.0}, "p must"),
        ({"lam": 1, "p": 1}, "p must"),
        ({"lam": 20, "p": 0.5}, "must be below 2"),
    ],
)
def test_l2gd_refusals(options, word):
    with pytest.raises(ValueError, match=word):
        l2gd(MODEL, learning_rate=0.1, **options)
