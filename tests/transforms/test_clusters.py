"""IFCA and HypCluster: pseudo-code in NumPy, optima of clusters, new clients, what can't be composed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.hypcluster import hypcluster
from algorithms.ifca import ifca
from algorithms.local_only import local_only
from fedjax_lab import wire
from fedjax_lab.transforms import clusters, lag_ps, lag_wk, leaves, personal_model, private, split_clusters
from fedjax_lab.transforms.clusters import Chosen
from tests.algorithms.quadratics import DIM, MODEL, quadratics
from tests.problems import softmax_data, softmax_model, steps

ETA, TAU = 0.2, 5
WORK = {"steps": TAU, "batch_size": None}
SOFTMAX = softmax_model()
# Two that clients choose between, one that is too far from all, and one that diverged.
START = np.stack([quadratics().b[0] + 0.5, quadratics().b[1] - 0.5, np.full(DIM, 50.0), np.full(DIM, np.nan)])


def pseudo_code(averaging, rounds, weights):
    """Algorithm 1: the estimate of line 6, then option I (``gradient``) or II."""
    q, models, chosen = quadratics(), START.copy(), []
    for _ in range(rounds):
        s = [int(np.nanargmin([q.loss(i, w) for w in models])) for i in range(4)]
        moved = []
        for i, j in enumerate(s):
            w = models[j].copy()
            for _ in range(TAU if averaging == "model" else 1):
                w = w - ETA * q.gradient(i, w)
            moved.append(w - models[j])
        for j in set(s):
            mine = [i for i in range(4) if s[i] == j]
            over = weights[mine].sum() if averaging == "model" else weights.sum()
            models[j] = models[j] + sum(weights[i] * moved[i] for i in mine) / over
        chosen.append(s)
    return models, chosen


def all_models(process, state):
    return np.asarray(process.server(state).models.variables.params)


@pytest.mark.parametrize("averaging", ["model", pytest.param("gradient", marks=pytest.mark.slow)])
def test_ifca_is_the_pseudo_code(averaging):
    work = WORK if averaging == "model" else {}
    round = ifca(MODEL, optax.sgd(ETA), k=4, averaging=averaging, **work)
    process = fl.synchronous(round, quadratics().data)
    state, metrics = steps(process, 3, params=START.astype(np.float32))
    expected, chosen = pseudo_code(averaging, 3, np.ones(4))
    np.testing.assert_allclose(all_models(process, state), expected, atol=1e-5)
    assert 1 < len(set(chosen[-1])) < 4
    assert [float(metrics[f"cluster_{j}"]) for j in range(4)] == [chosen[-1].count(j) for j in range(4)]
    # All the models go down, one comes up with a byte for its number.
    assert fl.total_bytes(metrics["downlink_bytes"]) == 4 * 4 * 4 * DIM
    assert fl.total_bytes(metrics["uplink_bytes"]) == 4 * (4 * DIM + 1)


@pytest.mark.slow
def test_hypcluster_weighs_by_examples_also_with_an_aggregator_that_sees_every_upload():
    base = fedavg(MODEL, optax.sgd(ETA), **WORK)

    def reduce(uploads, weights, ok, messages, env):
        assert weights.shape == ok.shape == messages.params.shape[:1]
        return jax.tree.map(lambda u: jnp.tensordot(weights, u, 1) / weights.sum(), uploads)

    whole = fl.compose(base._replace(aggregate=base.aggregate._replace(reduce=reduce)), clusters(4))
    expected, _ = pseudo_code("model", 3, quadratics().sizes)
    for round in (hypcluster(MODEL, optax.sgd(ETA), q=4, **WORK), whole):
        process = fl.synchronous(round, quadratics().data)
        state, _ = steps(process, 3, params=START.astype(np.float32))
        np.testing.assert_allclose(all_models(process, state), expected, atol=1e-5)


def two_kinds(clients, seed):
    rng, truth, found = np.random.default_rng(seed), np.random.default_rng(0).normal(size=(4, 3)), {}
    for k in range(clients):
        x = rng.normal(size=(40, 4)).astype(np.float32)
        found[f"{seed}-{k}"] = {"x": x, "y": np.argmax(x @ truth * (1 if k % 2 else -1), -1)}
    return fl.FederatedData.from_clients(found)


def test_it_separates_two_kinds_of_clients_and_new_ones_find_theirs():
    process = fl.synchronous(ifca(SOFTMAX, optax.sgd(0.3), k=2, spread=0.5, epochs=2), two_kinds(8, 1))
    state, metrics = steps(process, 15)
    assert float(metrics["cluster_0"]) == float(metrics["cluster_1"]) == 4
    new = two_kinds(6, 2).split(0.5)
    report = fl.per_client_accuracy(new.test, new.train)(process, state)
    assert report["personal_accuracy_worst10"] > 0.8
    assert "accuracy" not in report  # there is no one model to evaluate


def test_one_cluster_is_the_inner_round():
    base = fedavg(SOFTMAX, optax.sgd(0.1))
    assert clusters(1)(base) is base


def test_each_model_has_its_own_start():
    data, key = quadratics().data, jax.random.key(0)
    models = lambda spread: clusters(3, spread=spread)(fedavg(MODEL, optax.sgd(ETA))).init(key, data).models
    assert np.ptp(models(0.0).variables.params) == 0  # the model starts at zero
    spread = np.asarray(models(0.1).variables.params)
    assert len(np.unique(spread)) == 9 and 0.03 < spread.std() < 0.3
    own = clusters(3)(fedavg(SOFTMAX, optax.sgd(0.1))).init(key, softmax_data()).models.variables.params["w"]
    np.testing.assert_array_equal(own[0], SOFTMAX.init(key)[0]["w"])
    assert (np.asarray(own[1]) != np.asarray(own[2])).all()


def test_what_goes_behind_and_in_front():
    """Built, and traced by the engine, without compiling."""
    data, base = softmax_data(), fedavg(SOFTMAX, optax.sgd(0.1))
    for round in (
        fl.compose(base, clusters(3), fl.uplink(wire.error_feedback(wire.top_k(0.3))), fl.downlink(wire.qsgd(8))),
        fl.compose(
            base, clusters(3), personal_model(0.5), fl.uplink(wire.fixed_point(16, limit=1.0, clients=8), max_weight=30)
        ),
        fl.compose(base, fl.uplink(wire.error_feedback(wire.top_k(0.3))), clusters(3)),
        fl.compose(base, private(leaves("params/b")), clusters(3)),
        fl.compose(base, personal_model(0.5), clusters(3)),
    ):
        fl.synchronous(round, data, fl.uniform(4))


def test_private_parts_of_clusters_stay():
    data = softmax_data().on_device()
    round = fl.compose(fedavg(SOFTMAX, optax.sgd(0.1)), private(leaves("params/b")), clusters(3))

    def turn(key):
        server, client = round.init(key, data), data.view(jnp.int32(0))
        state = round.init_client(server, client)
        message = round.broadcast(server, state, client, key)
        return message, round.client_update(message, state, client, key).upload

    message, upload = jax.eval_shape(turn, jax.random.key(0))
    assert isinstance(upload, Chosen)
    assert [x.shape for x in jax.tree.leaves(message)] == [(3, 4, 3)]
    assert [x.shape for x in jax.tree.leaves(upload)] == [(4, 3), ()]


BASE = fedavg(SOFTMAX, optax.sgd(0.1))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: clusters(0), "k must be positive"),
        (lambda: clusters(2.5), "k must be a positive integer"),
        (lambda: clusters(2, spread=-1), "spread must"),
        (lambda: clusters(2, divide_by="cohorts"), "did you mean 'cohort'"),
        (lambda: ifca(SOFTMAX, optax.sgd(0.1), k=2, averaging="models"), "did you mean 'model'"),
        (lambda: ifca(SOFTMAX, optax.sgd(0.1), k=2, averaging="gradient", epochs=2), "it takes no epochs"),
        (lambda: hypcluster(SOFTMAX, optax.sgd(0.1), q=0), "q must be positive"),
        (lambda: fl.compose(local_only(SOFTMAX, optax.sgd(0.1)), clusters(2)), "trains none"),
        (lambda: fl.compose(BASE, clusters(2), clusters(2)), "has several already"),
        (lambda: fl.compose(BASE, clusters(2), split_clusters(2, eps1=1, eps2=2)), "has several already"),
        (lambda: fl.compose(BASE, clusters(2), private(leaves("params/b"))), "put it first"),
        (lambda: fl.synchronous(fl.compose(BASE, clusters(5)), softmax_data(), fl.uniform(4)), "5 clusters are more"),
        (
            lambda: fl.synchronous(fl.compose(BASE, fl.downlink(wire.qsgd(8)), clusters(2)), softmax_data()),
            r"put fl.downlink behind clusters\(\)",
        ),
        (lambda: fl.compose(BASE, lag_wk(0.1), clusters(2)), 'instead="nothing"'),
        (lambda: fl.compose(BASE, lag_ps(30.0, 0.1, instead="nothing"), clusters(2)), "leave the others out"),
        (lambda: fl.compose(BASE, clusters(2)).init(jax.random.key(0), softmax_data(), {"w": 0, "b": 0}), "axis of 2"),
    ],
)
def test_refusals(call, word):
    with pytest.raises(ValueError, match=word):
        call()
