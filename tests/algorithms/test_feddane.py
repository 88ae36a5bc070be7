"""FedDANE and FedLin against their pseudo-code in NumPy, and the optimum that FedAvg misses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.feddane import feddane
from algorithms.fedlin import fedlin
from tests.algorithms.quadratics import MODEL, cohorts, quadratics, trajectory
from tests.problems import softmax_data, softmax_model, steps

ETA, TAUS, MU = 0.2, np.array([5, 2, 7, 1]), 0.5


def unequal(client, key):
    return jnp.asarray(TAUS)[client.id]


WORK = {"steps": unequal, "batch_size": None}


def pseudo_code(rounds, taus, mu, rates, chosen, p):
    """One gradient round and one training round, as FedDANE's algorithm 2 and FedLin's algorithm 1 have them."""
    q = quadratics()
    w, path = np.zeros(3), []
    mean = lambda values, ids: sum(p[k] * v for k, v in zip(ids, values, strict=True)) / sum(p[k] for k in ids)
    for r in range(0, rounds, 2):
        g = mean([q.gradient(k, w) for k in chosen[r]], chosen[r])
        models = []
        for k in chosen[r + 1]:
            x = w.copy()
            for _ in range(taus[k]):
                x = x - rates[k] * (q.gradient(k, x) - q.gradient(k, w) + g + mu * (x - w))
            models.append(x)
        path += [w, mean(models, chosen[r + 1])]
        w = path[-1]
    return path


@pytest.mark.parametrize("name", ["feddane", "fedlin"])
def test_is_the_pseudo_code_and_reaches_the_optimum_that_fedavg_misses(name):
    q, p = quadratics(), quadratics().shares()
    if name == "feddane":
        algorithm, rates, mu = feddane(MODEL, optax.sgd(ETA), mu=MU, **WORK), [ETA] * 4, MU
    else:
        algorithm, rates, mu = fedlin(MODEL, optax.sgd(1.0), **WORK), 1.0 / TAUS, 0
    path = trajectory(algorithm, 120)
    np.testing.assert_allclose(path[1:7], pseudo_code(6, TAUS, mu, rates, [range(4)] * 6, p), atol=1e-5)
    np.testing.assert_allclose(path[-1], q.optimum(p), atol=1e-5)
    assert np.abs(q.fedavg_limit(p, ETA, TAUS) - q.optimum(p)).max() > 1e-2


def test_two_cohorts_an_iteration_or_one_repeated():
    algorithm, p = feddane(MODEL, optax.sgd(ETA), mu=MU, weighting="uniform", **WORK), np.ones(4)
    drawn = cohorts(2, 6)
    two = trajectory(algorithm, 6, fl.uniform(2))[1:]
    np.testing.assert_allclose(two, pseudo_code(6, TAUS, MU, [ETA] * 4, drawn, p), atol=1e-5)
    same = [ids for ids in drawn[::2] for _ in range(2)]
    one = trajectory(algorithm, 6, fl.repeated(fl.uniform(2)))[1:]
    np.testing.assert_allclose(one, pseudo_code(6, TAUS, MU, [ETA] * 4, same, p), atol=1e-5)
    assert same != drawn


def test_with_one_step_everyone_is_gradient_descent():
    q, p = quadratics(), quadratics().shares()
    w, expected = np.zeros(3), []
    for _ in range(3):
        w = w - ETA * sum(p[k] * q.gradient(k, w) for k in range(4))
        expected.append(w)
    path = trajectory(fedlin(MODEL, optax.sgd(ETA), steps=1, batch_size=None), 6)
    np.testing.assert_allclose(path[2::2], expected, atol=2e-6)


def test_minibatches_count_their_steps_and_even_rounds_only_carry_gradients():
    """A client's tau is its number of batches; alone, FedLin is then FedAvg at 1/tau of the rate."""
    data = softmax_data((23,))
    lin = fl.synchronous(fedlin(softmax_model(), optax.sgd(0.8), epochs=2, batch_size=6), data)
    state, gradient_round = steps(lin, 1)
    assert np.array_equal(lin.params(state)["w"], lin.params(lin.init(jax.random.key(0)))["w"])
    after, training = lin.step(state, lin.data)
    assert fl.total_bytes(gradient_round["uplink_bytes"]) == fl.total_bytes(training["uplink_bytes"]) == 4 * 15
    assert float(gradient_round["loss"]) > float(training["loss"])
    # The same round of a plain FedAvg: its key is of round 1.
    plain = fl.synchronous(fedavg(softmax_model(), optax.sgd(0.8 / 8), epochs=2, batch_size=6), data)
    same = plain.init(jax.random.key(0))._replace(round=jnp.int32(1))
    expected = plain.params(plain.step(same, plain.data)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), lin.params(after), expected)


def test_refusals():
    with pytest.raises(ValueError, match="mu must"):
        feddane(MODEL, optax.sgd(ETA), mu=-1)
    with pytest.raises(ValueError, match="steps must"):
        fedlin(MODEL, optax.sgd(ETA), steps=0)
    with pytest.raises(ValueError, match="epochs= or steps="):
        fedlin(MODEL, optax.sgd(ETA), steps=1, epochs=1)
    with pytest.raises(ValueError, match="rounds must"):
        fl.repeated(fl.uniform(2), rounds=0)
