"""Multi-task coupling of any model: the joint problem's closed form on quadratics, and what travels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.local_only import local_only
from algorithms.mocha import mocha
from fedjax_lab.transforms import coupling, in_clusters, leaves, personal_model, private
from tests.algorithms.quadratics import DIM, MODEL, quadratics
from tests.problems import assert_close, softmax_data, softmax_model, steps
from tests.refusals import refused
from tests.transforms.test_nothing_private import travelling

WORK = {"steps": 5, "batch_size": None}
BASE = fedavg(MODEL, optax.sgd(0.2), weighting="uniform", **WORK)
PAIRS = in_clusters([0, 1, 0, 1])


def models(round, rounds, sampler=None):
    process = fl.synchronous(round, quadratics().data, sampler)
    body = lambda state, _: (process.step(state, process.data)[0], None)
    state = jax.jit(lambda s: jax.lax.scan(body, s, length=rounds)[0])(process.init(jax.random.key(0)))
    return process, state, np.asarray(process.clients(state).table.own.params)


def solution(lam, relations):
    """Where ``A_k (w_k - b_k) + lam (w_k - sum_j a_kj w_j) = 0`` for all k."""
    q = quadratics()
    n = len(q.A)
    system = np.kron(lam * (np.eye(n) - relations), np.eye(DIM))
    for k in range(n):
        system[k * DIM : (k + 1) * DIM, k * DIM : (k + 1) * DIM] += q.A[k]
    return np.linalg.solve(system, np.einsum("kij,kj->ki", q.A, q.b).ravel()).reshape(n, DIM)


@pytest.mark.parametrize("relations", [None, PAIRS])
def test_the_models_solve_the_joint_problem(relations):
    lam = 0.8
    process, state, own = models(fl.compose(BASE, coupling(lam, relations)), 150)
    everyone = np.full((4, 4), 0.25) if relations is None else relations
    np.testing.assert_allclose(own, solution(lam, everyone), atol=1e-4)
    # The shared model is the mean of the clients', and with relations the server has them all.
    np.testing.assert_allclose(process.params(state), own.mean(0), atol=1e-4)
    if relations is not None:
        np.testing.assert_allclose(process.server(state).rows, own, atol=1e-6)


@pytest.mark.slow
def test_without_pull_it_is_local_training():
    _, _, own = models(fl.compose(BASE, coupling(0.0)), 3)
    alone = fl.synchronous(local_only(MODEL, optax.sgd(0.2), **WORK), quadratics().data)
    state, _ = steps(alone, 3)
    np.testing.assert_allclose(own, alone.clients(state).table.variables.params, atol=1e-6)


@pytest.mark.slow
def test_with_relations_the_engine_is_the_oracle_whoever_takes_part():
    round, data = fl.compose(BASE, coupling(0.8, PAIRS)), quadratics().data
    slow = fl.oracle_run(round, data, fl.uniform(2), num_rounds=4, seed=0)
    process = fl.synchronous(round, data, fl.uniform(2), lanes=1)
    state, metrics = steps(process, 4)
    assert_close(process.server(state), slow.server, atol=2e-6, rtol=1e-5)
    for k, expected in slow.clients.items():
        assert_close(jax.tree.map(lambda t, k=k: t[k], process.clients(state).table), expected, atol=2e-6, rtol=1e-5)
    assert fl.total_bytes(metrics["uplink_bytes"]) == slow.metrics[-1]["uplink_bytes"] == 2 * 2 * 4 * DIM


def test_private_leaves_stay():
    plain = fedavg(softmax_model(), optax.sgd(0.1), steps=1, batch_size=None)
    hidden = fl.compose(plain, coupling(5.0, in_clusters([0, 0, 0, 1, 1, 1, 2, 2])), private(leaves("params/b")))
    for shapes in travelling(hidden, softmax_data().on_device()):
        assert (3,) not in shapes and shapes.count((4, 3)) == 2


@pytest.mark.slow
def test_private_leaves_are_not_drawn_to_zero():
    """Related to nobody else, a client that makes one step a round is drawn to where it is: not at all."""
    plain, parts = fedavg(softmax_model(), optax.sgd(0.1), steps=1, batch_size=None), []
    for lam in (0.0, 5.0):
        process = fl.synchronous(
            fl.compose(plain, coupling(lam, np.eye(8)), private(leaves("params/b"))), softmax_data()
        )
        parts.append(process.clients(steps(process, 3)[0]).table)
    assert_close(parts[0], parts[1])
    assert float(jnp.abs(parts[0].part.params["b"]).max()) > 0.05


def test_bad_arguments_are_refused():
    refused(lambda: coupling(-1.0), "lam", "at least 0")
    refused(lambda: coupling(1.0, np.ones((2, 3))), "square matrix")
    refused(lambda: coupling(1.0, np.eye(3) * 0.5), "sum to 1", "row 0")
    refused(lambda: coupling(1.0, [[2.0, -1.0], [0.0, 1.0]]), "at least 0", "row 0")
    refused(lambda: in_clusters([0.5, 1.0]), "an integer for each client")
    few = fl.compose(BASE, coupling(1.0, np.eye(3)))
    refused(lambda: fl.synchronous(few, quadratics().data), "3 clients", "have 4")
    refused(lambda: fl.compose(mocha(), coupling(1.0)), "put it first")
    refused(lambda: fl.compose(local_only(MODEL, optax.sgd(0.1)), coupling(1.0)), "sends none")
    assert fl.compose(BASE, coupling(1.0), personal_model(0.1)).traits == {"personal"}
