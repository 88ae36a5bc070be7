"""Clustered FL: bipartitions against brute force and scipy, and algorithm 2 in NumPy with its recursion."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.clustered_fl import clustered_fl
from algorithms.fedavg import fedavg
from algorithms.local_only import local_only
from fedjax_lab import wire
from fedjax_lab.transforms import leaves, private, split_clusters
from fedjax_lab.transforms.bipartition import bipartition, cosines
from tests.problems import quadratic_model, softmax_data, softmax_model, steps

ETA, TAU, EPS1, EPS2, WAIT = 0.2, 3, 0.05, 0.3, 4
GROUPS = (0, 1, 2, 0, 1, 2, 1, 0, 2)
CENTERS = np.array([[3.0, 0.0, 0.0], [-2.0, 1.5, 0.0], [-2.0, -1.5, 0.5]])


def brute_force(similarity):
    """The bipartition with the least possible largest similarity between its halves, the first half with member 0."""
    n, best = len(similarity), (np.inf, None)
    for rest in itertools.product((False, True), repeat=n - 1):
        second = np.array([False, *rest])
        if second.any():
            best = min(best, (similarity[~second][:, second].max(), tuple(second)))
    return np.array(best[1]), best[0]


def similarities(n, count):
    return np.stack(
        [np.asarray(cosines(jnp.asarray(np.random.default_rng(s).normal(size=(n, 4))))) for s in range(count)]
    )


@pytest.mark.parametrize("linkage", ["single", "complete"])
def test_bipartition_of_several_clusters_at_once(linkage):
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    n, cluster = 13, np.array([0, 2, 1, 0, 0, 2, 5, 0, 2, 1, 0, 2, 0])  # 5: of none; 1: not to be divided
    divided = jnp.array([True, False, True])
    S = similarities(n, 8)
    found, between = jax.jit(jax.vmap(lambda s: bipartition(s, jnp.asarray(cluster), divided, linkage)))(S)
    for s, second, most in zip(S, np.asarray(found), np.asarray(between), strict=True):
        assert not second[(cluster == 1) | (cluster == 5)].any() and most[1] == -np.inf
        for c in (0, 2):
            mine = np.flatnonzero(cluster == c)
            own = s[np.ix_(mine, mine)]
            if linkage == "single":
                expected, least = brute_force(own)
                assert most[c] == pytest.approx(least, abs=1e-6)
            else:
                distance = squareform(1 - own, checks=False)
                labels = hierarchy.fcluster(hierarchy.linkage(distance, "complete"), 2, "maxclust")
                expected = labels != labels[0]
            np.testing.assert_array_equal(second[mine], expected)


def problem():
    rng = np.random.default_rng(0)
    b = CENTERS[list(GROUPS)] + 0.03 * rng.normal(size=(9, 3))
    sizes = np.array([1, 2, 1, 3, 1, 1, 2, 1, 1])
    A = np.broadcast_to(np.diag([0.5, 1.0, 0.8]), (9, 3, 3))
    rows = lambda x, k: np.repeat(x[k : k + 1], sizes[k], 0).astype(np.float32)
    data = fl.FederatedData.from_clients({k: {"A": rows(A, k), "b": rows(b, k)} for k in range(9)})
    return data, A[0], b, sizes


def pseudo_code(rounds):
    """Algorithm 2 over FedAvg with TAU steps: who is in which cluster after each round, and the models."""
    _, A, b, sizes = problem()
    models, cluster, path = [np.zeros(3)], np.zeros(9, int), []
    pull = np.eye(3) - np.linalg.matrix_power(np.eye(3) - ETA * A, TAU)
    for r in range(rounds):
        updates = np.stack([-pull @ (models[c] - b[k]) for k, c in enumerate(cluster)])
        for c in range(len(models)):
            mine = np.flatnonzero(cluster == c)
            mean = np.average(updates[mine], axis=0, weights=sizes[mine])
            longest = np.linalg.norm(updates[mine], axis=1).max()
            if r >= WAIT and np.linalg.norm(mean) < EPS1 and longest > EPS2 and len(mine) > 2:
                directions = updates[mine] / np.linalg.norm(updates[mine], axis=1, keepdims=True)
                second, _ = brute_force(directions @ directions.T)
                cluster[mine[second]] = len(models)
                models.append(models[c].copy())
        for c in range(len(models)):
            mine = cluster == c
            models[c] = models[c] + np.average(updates[mine], axis=0, weights=sizes[mine])
        path.append((cluster.copy(), [m.copy() for m in models]))
    return path


def cfl(**others):
    rule = {"max_clusters": 4, "eps1": EPS1, "eps2": EPS2, "min_rounds": WAIT}
    return clustered_fl(quadratic_model(), optax.sgd(ETA), steps=TAU, batch_size=None, **rule | others)


def test_it_divides_recursively_as_in_algorithm_2():
    data, _, b, sizes = problem()
    process, path = fl.synchronous(cfl(), data), pseudo_code(40)
    state, metrics, root = process.init(jax.random.key(0)), {}, None
    for cluster, models in path:
        state, metrics = process.step(state, process.data)
        server = process.server(state)
        np.testing.assert_array_equal(server.cluster, cluster)
        np.testing.assert_allclose(server.models.variables.params[: len(models)], models, atol=1e-5)
        assert float(metrics["clusters"]) == int(server.count) == len(models)
        root = models[0] if len(models) == 1 else root
    assert len(models) == 3 and float(metrics["longest_update"]) < EPS2
    for g in range(3):
        mine = np.array(GROUPS) == g
        assert len(set(cluster[mine])) == 1
        own = server.models.variables.params[cluster[mine][0]]
        np.testing.assert_allclose(own, np.average(b[mine], axis=0, weights=sizes[mine]), atol=0.05)
    # One model goes each way; a client that is not of the population gets the one from before the first division.
    assert fl.total_bytes(metrics["downlink_bytes"]) == fl.total_bytes(metrics["uplink_bytes"]) == 9 * 12
    stranger = process.round.broadcast(server, (), process.data.view(jnp.int32(9)), jax.random.key(0))
    np.testing.assert_allclose(stranger.params, root, atol=1e-5)


def test_whoever_was_absent_goes_down_the_tree_without_moving_a_model():
    """Clients 6 and 7, of groups 1 and 0, miss the division of round 0 and come back in round 1."""
    data, A, b, sizes = problem()
    here = jnp.array([[k not in (6, 7) for k in range(9)], [True] * 9])
    sampler = fl.Sampler(
        lambda data: jnp.int32(0),
        lambda s, key, data, probe: (jnp.arange(9), here[jnp.minimum(s, 1)], s + 1),
        lambda state, ids, ok, metrics: state,
    )
    process = fl.synchronous(cfl(max_clusters=2, eps1=0.6, eps2=0.7, min_rounds=0), data, sampler)
    state, metrics = steps(process, 1)
    assert float(metrics["clusters"]) == 2
    np.testing.assert_array_equal(process.server(state).cluster, [0, 1, 1, 0, 1, 1, 0, 0, 1])
    before = process.server(state).models.variables.params
    for k, expected in ((6, np.zeros(3)), (2, before[1]), (0, before[0])):
        sent = process.round.broadcast(process.server(state), (), process.data.view(jnp.int32(k)), jax.random.key(0))
        np.testing.assert_allclose(sent.params, expected, atol=1e-6)
    state, _ = process.step(state, process.data)
    server = process.server(state)
    np.testing.assert_array_equal(server.cluster, np.array(GROUPS) != 0)
    pull = np.eye(3) - np.linalg.matrix_power(np.eye(3) - ETA * A, TAU)
    for c, mine in ((0, [0, 3]), (1, [1, 2, 4, 5, 8])):  # as if 6 and 7 had not come yet
        center = np.average(b[mine], axis=0, weights=sizes[mine])
        np.testing.assert_allclose(
            server.models.variables.params[c], before[c] - pull @ (before[c] - center), atol=1e-5
        )
    sent = process.round.broadcast(server, (), process.data.view(jnp.int32(6)), jax.random.key(0))
    np.testing.assert_array_equal(sent.params, server.models.variables.params[1])


def test_newcomers_find_their_cluster_in_as_many_rounds_as_it_was_divided():
    process = fl.synchronous(cfl(), problem()[0])
    state, _ = steps(process, 40)
    A = np.diag([0.5, 1.0, 0.8])
    row = lambda b: {"A": A[None].astype(np.float32), "b": b[None].astype(np.float32)}
    new = fl.FederatedData.from_clients({f"new {g}": row(CENTERS[g]) for g in range(3)})
    found = {rounds: fl.cold_start(new, new, rounds=rounds)(process, state) for rounds in (1, 2)}
    params, cluster = process.server(state).models.variables.params, process.server(state).cluster
    off = [np.asarray(params[cluster[GROUPS.index(g)]]) - CENTERS[g] for g in range(3)]
    own = [0.5 * d @ A @ d for d in off]
    assert found[2]["unseen_joined_loss"] == pytest.approx(np.mean(own), rel=1e-4)
    assert found[1]["unseen_joined_loss"] > 10 * np.mean(own)
    assert found[2]["unseen_personal_loss"] > found[1]["unseen_joined_loss"]


BASE = fedavg(softmax_model(), optax.sgd(0.1))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: split_clusters(0, eps1=1, eps2=2), "max_clusters must be positive"),
        (lambda: split_clusters(2, eps1=0, eps2=2), "eps1 must be positive"),
        (lambda: split_clusters(2, eps1=1, eps2=float("nan")), "eps2 must be positive"),
        (lambda: split_clusters(2, eps1=2, eps2=1), "eps1 must be below eps2"),
        (lambda: split_clusters(2, eps1=1, eps2=2, gamma_max=1.5), "gamma_max must"),
        (lambda: split_clusters(2, eps1=1, eps2=2, min_rounds=-1), "min_rounds must"),
        (lambda: split_clusters(2, eps1=1, eps2=2, linkage="simple"), "did you mean 'single'"),
        (
            lambda: fl.compose(local_only(softmax_model(), optax.sgd(1)), split_clusters(2, eps1=1, eps2=2)),
            "trains none",
        ),
        (
            lambda: fl.compose(BASE, fl.uplink(wire.qsgd(8)), split_clusters(2, eps1=1, eps2=2)),
            "put uplink\\(\\) after",
        ),
        (lambda: fl.compose(BASE, split_clusters(2, eps1=1, eps2=2), private(leaves("params/b"))), "put it first"),
    ],
)
def test_refusals(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_links_behind_it_are_opened_one_by_one():
    split = split_clusters(2, eps1=1, eps2=2)
    fl.synchronous(fl.compose(BASE, split, fl.uplink(wire.error_feedback(wire.top_k(0.3)))), softmax_data())
    with pytest.raises(ValueError, match="looks at each client"):
        fl.synchronous(
            fl.compose(BASE, split, fl.uplink(wire.fixed_point(16, limit=1.0, clients=8), max_weight=30)),
            softmax_data(),
        )
