"""SCAFFOLD against its pseudo-code in NumPy, and the optimum that FedAvg misses."""

import jax
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.scaffold import scaffold
from tests.algorithms.quadratics import MODEL, cohorts, quadratics, trajectory
from tests.problems import softmax_data, softmax_model, steps

ETA, TAU = 0.2, 5
WORK = {"steps": TAU, "batch_size": None}


def pseudo_code(option, weights, rounds, chosen, eta_g=1.0):
    """Algorithm 1, line by line; the two means by weight, of which the paper's is the uniform one."""
    q = quadratics()
    clients = len(q.sizes)
    omega = weights / weights.mean()
    x, c, cs, path = np.zeros(3), np.zeros(3), np.zeros((clients, 3)), []
    for r in range(rounds):
        dx, dc, total = 0, 0, 0
        for i in chosen[r]:
            y = x.copy()
            for _ in range(TAU):
                y = y - ETA * (q.gradient(i, y) - cs[i] + c)
            new = q.gradient(i, x) if option == "I" else cs[i] - c + (x - y) / (TAU * ETA)
            dx, dc, total = dx + weights[i] * (y - x), dc + omega[i] * (new - cs[i]), total + weights[i]
            cs[i] = new
        x, c = x + eta_g * dx / total, c + dc / clients
        path.append(x)
    return path


@pytest.mark.parametrize("option", ["I", "II"])
def test_reaches_the_optimum_that_fedavg_misses(option):
    q, p = quadratics(), quadratics().shares()
    path = trajectory(scaffold(MODEL, optax.sgd(ETA), option=option, **WORK), 120)
    everyone = [range(4)] * 3
    np.testing.assert_allclose(path[1:4], pseudo_code(option, q.sizes, 3, everyone), atol=2e-6)
    np.testing.assert_allclose(path[-1], q.optimum(p), atol=1e-5)
    # FedAvg's own limit is far off, and known in closed form (tests/laws/test_centralised.py reaches it).
    assert np.abs(q.fedavg_limit(p, ETA, [TAU] * 4) - q.optimum(p)).max() > 1e-2


def test_half_of_the_clients_a_round_uniform_weights_and_a_server_rate():
    algorithm = scaffold(MODEL, optax.sgd(ETA), weighting="uniform", server_optimizer=optax.sgd(0.7), **WORK)
    path = trajectory(algorithm, 400, fl.uniform(2))
    expected = pseudo_code("II", np.ones(4), 400, cohorts(2, 400), eta_g=0.7)
    np.testing.assert_allclose(path[1:6], expected[:5], atol=2e-6)
    np.testing.assert_allclose(path[-1], quadratics().optimum(np.full(4, 0.25)), atol=1e-5)


def test_the_control_variate_of_one_client_corrects_nothing():
    # Alone, c = c_k in every round: SCAFFOLD is FedAvg.
    data = quadratics().data.select([1])
    alone = trajectory(scaffold(MODEL, optax.sgd(ETA), **WORK), 3, data=data)
    plain = trajectory(fedavg(MODEL, optax.sgd(ETA), **WORK), 3, data=data)
    np.testing.assert_allclose(alone, plain, atol=1e-6)


def test_the_mean_of_what_clients_keep_is_the_servers_with_momentum_kept_and_clients_absent():
    data = softmax_data()
    algorithm = scaffold(softmax_model(), optax.sgd(0.1, 0.9), keep_optimizer_state=True)
    process = fl.synchronous(algorithm, data, fl.dropout(fl.uniform(5), 0.3))
    state, metrics = steps(process, 5)
    weights = np.asarray(data.sizes) / data.num_examples
    for name, own in process.clients(state).table.c.items():
        mean = np.tensordot(weights, np.asarray(own), 1)
        np.testing.assert_allclose(process.server(state).c[name], mean, atol=1e-5)
        assert np.abs(mean).max() > 1e-3
    model = 4 * (4 * 3 + 3)
    assert fl.total_bytes(metrics["uplink_bytes"]) == int(metrics["survivors"]) * 2 * model
    assert fl.total_bytes(metrics["downlink_bytes"]) == int(metrics["invited"]) * 2 * model


def test_both_ways_to_the_mean_gradient_agree():
    """The paper's formula, which plain SGD allows, and gradients added up on the way, for other optimizers."""
    formula = trajectory(scaffold(MODEL, optax.sgd(ETA), **WORK), 5)
    recorded = fedavg(MODEL, fl.recording(optax.sgd(ETA)), **WORK)
    np.testing.assert_allclose(
        trajectory(fl.compose(recorded, fl.transforms.control_variates()), 5), formula, atol=2e-6
    )


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [
        (optax.sgd(0.1), 0.1),
        (optax.chain(optax.identity(), optax.scale(-0.3)), 0.3),
        (optax.sgd(0.1, 0.9), None),
        (optax.adam(0.1), None),
        (optax.sgd(optax.constant_schedule(0.1)), None),
        (optax.chain(optax.clip(1.0), optax.sgd(0.1)), None),
        (optax.chain(optax.clip_by_global_norm(10.0), optax.sgd(0.1)), None),
        (optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)), None),
        (optax.sign_sgd(0.1), None),
        (optax.masked(optax.sgd(0.1), {"matrix": True, "vector": False}), None),
        (lambda r: optax.sgd(0.1), None),
    ],
)
def test_plain_gradient_descent_is_told_from_the_rest(optimizer, rate):
    assert fl.plain_rate(optimizer) == (rate if rate is None else pytest.approx(rate))


def test_refusals():
    with pytest.raises(ValueError, match="option must be 'I' or 'II'"):
        scaffold(MODEL, optax.sgd(ETA), option=2)
    with pytest.raises(ValueError, match="recording"):
        fl.synchronous(fl.compose(fedavg(MODEL, optax.sgd(ETA)), fl.transforms.control_variates()), quadratics().data)
    with pytest.raises(ValueError, match="learning_rate must"):
        fl.transforms.control_variates(learning_rate=0.0)
    shared = fl.compose(fedavg(softmax_model(), optax.sgd(ETA)), fl.transforms.private(lambda path: path.endswith("b")))
    with pytest.raises(ValueError, match="put it first"):
        fl.compose(shared, fl.transforms.control_variates("I"))
    with pytest.raises(ValueError, match="client_optimizer"):
        scaffold(MODEL, optax.adam)


def test_bfloat16_models_keep_their_type():
    model = softmax_model()
    init = lambda key: jax.tree.map(lambda x: x.astype("bfloat16"), model.init(key))
    process = fl.synchronous(scaffold(model._replace(init=init), optax.sgd(0.1)), softmax_data())
    state, metrics = steps(process, 2)
    assert {x.dtype.name for x in jax.tree.leaves(process.server(state).c)} == {"bfloat16"}
    assert np.isfinite(float(metrics["loss"]))
