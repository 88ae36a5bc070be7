"""MOCHA against centralised solvers of the joint problem, worked-out steps, and what it must survive."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_lab as fl
from algorithms import mocha_couplings as couplings
from algorithms.mocha import mocha
from tests.problems import softmax_data, steps
from tests.refusals import raises, refused

SIZES, DIM = (6, 9, 1, 12), 3
RELATED = np.array([[2.0, -0.8, 0, -0.3], [-0.8, 1.5, 0.2, 0], [0, 0.2, 1.0, -0.5], [-0.3, 0, -0.5, 1.2]])


@functools.cache
def tasks(signs: bool) -> fl.FederatedData:
    """Four related linear tasks, one of them with a single example."""
    rng = np.random.default_rng(0)
    shared, clients = rng.normal(size=DIM), {}
    for k, n in enumerate(SIZES):
        x = rng.normal(size=(n, DIM)).astype(np.float32)
        u = x @ (shared + 0.5 * rng.normal(size=DIM)) + 0.3 * rng.normal(size=n)
        clients[f"t{k}"] = {"x": x, "y": np.where(u > 0, 1, -1) if signs else u.astype(np.float32)}
    return fl.FederatedData.from_clients(clients)


def after(process, rounds):
    """The state after some rounds in one program, and the metrics of all."""
    body = lambda state, _: process.step(state, process.data)
    return jax.jit(lambda s: jax.lax.scan(body, s, length=rounds))(process.init(jax.random.key(0)))


def joint(data, covariance):
    """The whole problem as one of ridge form: features ``[rows, tasks * d]``, and the models of its solution.

    With ``M = L L'`` and ``W' = L T`` the regularizer is ``|T|^2 / 2``, and task t's score of x is that of the
    features ``L_t (x) x``.
    """
    L = np.linalg.cholesky(np.asarray(covariance, np.float64))
    owner = np.repeat(np.arange(data.num_clients), data.sizes)
    x = np.asarray(data.arrays["x"], np.float64)
    return np.einsum("nt,nd->ntd", L[owner], x).reshape(len(x), -1), lambda T: L @ T.reshape(len(L), -1)


def centralised(loss, data, covariance):
    """The joint problem solved by scikit-learn; the squared loss by its normal equations."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    features, models = joint(data, covariance)
    y = np.asarray(data.arrays["y"], np.float64)
    if loss == "squared":
        return models(np.linalg.solve(features.T @ features + np.eye(features.shape[1]), features.T @ y))
    if loss == "logistic":
        solver = LogisticRegression(C=1.0, fit_intercept=False, solver="newton-cg", tol=1e-12, max_iter=10_000)
    else:
        solver = LinearSVC(C=1.0, loss="hinge", fit_intercept=False, tol=1e-10, max_iter=10_000_000)
    return models(solver.fit(features, y).coef_[0])


@pytest.mark.parametrize("loss", [pytest.param("squared", marks=pytest.mark.slow), "logistic", "hinge"])
def test_the_gap_goes_to_zero_and_the_models_are_a_centralised_solvers(loss):
    data = tasks(loss != "squared")
    process = fl.synchronous(mocha(loss=loss, coupling=couplings.fixed(RELATED, 0.4), epochs=5), data)
    state, metrics = after(process, 400)
    gaps = np.asarray(metrics["duality_gap"])
    assert gaps[0] > 1 and gaps[20] < 0.2 * gaps[0] and gaps[-1] < 1e-4
    np.testing.assert_allclose(state.server.w, centralised(loss, data, np.linalg.inv(0.8 * RELATED)), atol=1e-4)
    # W = V M, v_t = X_t alpha_t: server and clients agree on the dual variables.
    for k, (n, start) in enumerate(zip(data.sizes, data.starts, strict=True)):
        alpha, x = process.clients(state).table[k], data.arrays["x"][start : start + n]
        np.testing.assert_allclose(x.T @ alpha[:n], state.server.v[k], atol=1e-4)
        assert not np.any(alpha[n:])


def test_little_work_and_dropped_nodes_only_slow_it_down():
    data, coupling = tasks(False), couplings.fixed(RELATED, 0.4)
    budget = lambda client, key: jax.random.randint(key, (), 0, 4)  # some do nothing at all
    round = mocha(loss="squared", coupling=coupling, steps=budget)
    process = fl.synchronous(round, data, fl.dropout(fl.uniform(3), 0.3))
    state, metrics = after(process, 1500)
    np.testing.assert_allclose(state.server.w, centralised("squared", data, np.linalg.inv(0.8 * RELATED)), atol=1e-4)
    assert (np.asarray(metrics["thetas"][:50]) == 1).sum(1).min() >= 1  # whoever is absent did nothing
    assert np.asarray(metrics["survivors"]).min() < 3


def test_a_step_by_hand():
    """One task, one example x = 2, y = 3, R = w^2/2: the minimum of (2 w - 3)^2/2 + w^2/2 is 6/5, alpha 3/5."""
    one, none = {"x": np.array([[2.0]]), "y": np.array([3.0])}, {"x": np.zeros((0, 1)), "y": np.zeros(0)}
    data = fl.FederatedData.from_clients({"a": one, "empty": none})
    process = fl.synchronous(mocha(loss="squared", coupling=couplings.fixed(np.eye(2), 0.5)), data)
    state, first = process.step(process.init(jax.random.key(0)), process.data)
    np.testing.assert_allclose(process.clients(state).table, [[0.6], [0]], rtol=1e-4)
    np.testing.assert_allclose(state.server.w, [[1.2], [0]], rtol=1e-4)
    assert first["duality_gap"] == pytest.approx(4.5) and first["loss"] == pytest.approx(4.5)
    assert first["thetas"][0] < 1e-4 and first["thetas"][1] == 1  # whoever has no examples has nothing to send
    _, second = process.step(state, process.data)
    assert second["duality_gap"] < 1e-6 and second["loss"] == pytest.approx(0.18, rel=1e-3)
    assert fl.total_bytes(first["uplink_bytes"]) == 2 * 12 and fl.total_bytes(first["downlink_bytes"]) == 2 * 8


@pytest.mark.slow
def test_theta_is_a_bound_of_the_papers_and_falls_with_work():
    """Definition 1, with the subproblem solved exactly: its minimiser for the squared loss is a linear system's."""
    data, thetas = tasks(False), []
    M = np.linalg.inv(0.8 * RELATED)
    growing = lambda client, key: jnp.where(client.env.round < 2, 1, 30)  # epochs, in the third round
    process = fl.synchronous(mocha(loss="squared", coupling=couplings.fixed(RELATED, 0.4), epochs=growing), data)
    state = process.init(jax.random.key(0))
    for _ in range(3):
        start, (state, metrics) = jax.device_get(state._replace(key=())), process.step(state, process.data)
        thetas.append(np.asarray(metrics["thetas"]))
        for k, (n, first) in enumerate(zip(data.sizes, data.starts, strict=True)):
            x, y = (np.asarray(data.arrays[f][first : first + n], np.float64) for f in "xy")
            old = np.asarray(start.clients.table[k][:n], np.float64)
            q, w = float(start.server.sigma) * M[k, k], np.asarray(start.server.w[k], np.float64)

            def value(a, x=x, y=y, old=old, q=q, w=w):
                moved = x.T @ (a - old)
                return a @ (a / 2 - y) + w @ moved + q / 2 * moved @ moved

            best = value(np.linalg.solve(np.eye(n) + q * x @ x.T, y - x @ w + q * x @ x.T @ old))
            made = value(np.asarray(state.clients.table[k][:n], np.float64))
            exact = (made - best) / (value(old) - best)
            assert exact - 1e-3 <= thetas[-1][k] <= 1
    assert thetas[1].max() > 0.05 and (thetas[2] < 0.02).all()


def test_the_relations_are_learned_with_the_models():
    """At the end Omega is the best one for W, and W solves the joint problem for Omega."""
    data, lam, prior = tasks(False), 0.5, 0.3
    coupling = couplings.graphical(lam, prior=prior)
    process = fl.synchronous(mocha(loss="squared", coupling=coupling, epochs=5, omega_every=5), data)
    state, metrics = after(process, 400)
    w = np.asarray(state.server.w, np.float64)
    omega = np.linalg.inv(w @ w.T / DIM + prior * np.eye(4))
    np.testing.assert_allclose(state.server.omega, omega, atol=1e-3)
    np.testing.assert_allclose(w, centralised("squared", data, np.linalg.inv(2 * lam * omega)), atol=2e-4)
    assert metrics["duality_gap"][-1] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("coupling", [couplings.trace_norm(0.2, epsilon=1e-3), couplings.clustered(0.5, k=2, eta=0.3)])
def test_subspaces_and_clusters_are_learned_with_the_models(coupling):
    data = tasks(False)
    process = fl.synchronous(mocha(loss="squared", coupling=coupling, epochs=5, omega_every=3), data)
    state, metrics = after(process, 300)
    omega, w = state.server.omega, state.server.w
    np.testing.assert_allclose(omega, coupling.learn(w), atol=2e-4)
    np.testing.assert_allclose(w, centralised("squared", data, coupling.covariance(omega)), atol=2e-4)
    assert metrics["duality_gap"][-1] < 1e-5


@pytest.mark.slow
def test_uncoupled_tasks_are_learned_alone_and_a_stiff_pull_keeps_them_together():
    data, models = tasks(False), {}
    for lam1 in (0.0, 100.0):
        round = mocha(loss="squared", coupling=couplings.mean_regularized(lam1, 0.5), epochs=20)
        models[lam1] = np.asarray(after(fl.synchronous(round, data), 60)[0].server.w)
    for k, (n, first) in enumerate(zip(data.sizes, data.starts, strict=True)):
        x, y = (np.asarray(data.arrays[f][first : first + n], np.float64) for f in "xy")
        np.testing.assert_allclose(models[0.0][k], np.linalg.solve(x.T @ x + np.eye(DIM), x.T @ y), atol=1e-5)
    spread = {lam1: w.std(0).mean() for lam1, w in models.items()}
    assert 0 < spread[100.0] < 0.1 * spread[0.0]


@pytest.mark.slow
def test_each_client_is_evaluated_with_its_own_model():
    data = tasks(True)
    process = fl.synchronous(mocha(coupling=couplings.mean_regularized(0.1, 0.1), bias=True, epochs=3), data)
    state, _ = steps(process, 5)
    x, y = np.asarray(data.arrays["x"]), np.asarray(data.arrays["y"])
    with_one = np.concatenate([x, np.ones((len(x), 1))], 1)
    right = lambda w: np.where(with_one @ w > 0, 1, -1) == y
    own = np.stack([right(w) for w in np.asarray(state.server.w)])[np.repeat(np.arange(4), data.sizes), np.arange(28)]
    report = fl.per_client_accuracy(data)(process, state)
    assert report["personal_accuracy"] == pytest.approx(own.mean())


@pytest.mark.slow
def test_an_unseen_client_gets_the_mean_of_the_models():
    data, x, y = tasks(True), tasks(True).arrays["x"], tasks(True).arrays["y"]
    process = fl.synchronous(mocha(coupling=couplings.mean_regularized(0.1, 0.1)), data)
    state, _ = steps(process, 3)
    right = np.where(x @ np.asarray(state.server.w).mean(0) > 0, 1, -1) == y
    others = fl.FederatedData.from_clients({"new": {"x": x, "y": y}})
    unseen = fl.per_client_accuracy(others, support=others)(process, state)
    assert unseen["personal_accuracy"] == pytest.approx(right.mean())


def test_bad_arguments_and_data_are_refused():
    refused(lambda: mocha(loss="hinged"), "hinge, logistic, squared", "did you mean 'hinge'")
    refused(lambda: mocha(coupling=RELATED), "mocha_couplings", "fixed(omega)")
    refused(lambda: mocha(epochs=1, steps=1), "not both")
    refused(lambda: mocha(epochs=0), "epochs must be positive")
    refused(lambda: mocha(omega_every=0), "omega_every")
    refused(lambda: mocha(sigma_prime=-1.0), "sigma_prime must be positive")
    rows = lambda *y: {"x": np.ones((len(y), 3)), "y": np.array(y)}
    classes = fl.FederatedData.from_clients({"a": rows(1, -1), "b": rows(0)})
    refused(lambda: fl.synchronous(mocha(), classes), "targets -1 and 1", "client 'b' has 0", "row 0", "2 * y - 1")
    refused(lambda: fl.synchronous(mocha(loss="logistic"), softmax_data()), "targets -1 and 1")
    for coupling, words in (
        (couplings.fixed(np.eye(3)), ("3 tasks", "4 clients")),
        (couplings.clustered(1.0, k=5, eta=0.1), ("k=5", "4 tasks")),
    ):
        refused(lambda c=coupling: fl.synchronous(mocha(coupling=c), tasks(True)), *words)
    bare = fl.FederatedData.from_clients({"a": {"z": np.ones((2, 3))}})
    refused(lambda: fl.synchronous(mocha(), bare), "['z']")
    wide = fl.FederatedData.from_clients({"a": {"x": np.ones((2, 3)), "y": np.ones((2, 2))}})
    refused(lambda: fl.synchronous(mocha(), wide), "[examples]")
    process = fl.synchronous(mocha(), tasks(True))
    raises(lambda: process.init(jax.random.key(0), {"w": jnp.zeros(3)}), "no initial parameters")


def test_what_changes_gradients_is_refused():
    changed = fl.compose(mocha(), fl.transforms.proximal(0.1))
    refused(lambda: fl.synchronous(changed, tasks(True)), "no gradient to change")
    refused(lambda: fl.compose(mocha(), fl.transforms.personal_model(0.1)), "no local training")
