"""Generated data: the stated laws, known optima and published closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_lab as fl


def _whole(split, field):
    return np.concatenate([np.asarray(part.arrays[field]) for part in split])


# ---- FedProx's synthetic data ----


def test_synthetic_labels_are_what_the_true_models_say():
    train, test = fl.datasets.synthetic(1.0, 1.0, seed=3)
    for part in (train, test):
        owner = np.repeat(np.arange(30), part.sizes)
        x, y = part.arrays["x"].astype(np.float64), part.arrays["y"]
        scores = np.einsum("nd,ndc->nc", x, part.attrs["W"][owner]) + part.attrs["b"][owner]
        assert (scores.argmax(1) == y).mean() > 0.999  # up to float32 ties
        assert y.dtype == np.int32 and part.arrays["x"].dtype == np.float32
    sizes = np.asarray(train.sizes) + np.asarray(test.sizes)
    assert sizes.min() >= 50
    np.testing.assert_array_equal(train.sizes, np.floor(0.9 * sizes + 0.5))


def test_synthetic_sizes_are_lognormal_above_fifty():
    split = fl.datasets.synthetic(0, 0, 400, dim=2, num_classes=2, seed=1)
    extra = np.asarray(split.train.sizes) + np.asarray(split.test.sizes) - 50
    # floor(lognormal(4, 2)): median e^4 = 54.6, share below e^2 = 7.39 is Phi(-1) = .1587.
    assert abs((extra < np.exp(4)).mean() - 0.5) < 4 * 0.5 / 20
    assert abs((extra < np.exp(2)).mean() - 0.1587) < 4 * np.sqrt(0.1587 * 0.8413 / 400)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 2.0), (2.0, 0.0)])
def test_alpha_and_beta_are_standard_deviations(alpha, beta):
    dim, classes, clients = 20, 5, 300
    split = fl.datasets.synthetic(alpha, beta, clients, dim=dim, num_classes=classes, seed=2)
    # The mean of a client's W and b entries is u_k + N(0, 1/entries), of its v entries B_k + N(0, 1/dim).
    entries = dim * classes + classes
    W, b = split.train.attrs["W"], split.train.attrs["b"]
    u = (W.sum((1, 2)) + b.sum(1)) / entries
    assert abs(u.std() ** 2 - (alpha**2 + 1 / entries)) < 5 * np.sqrt(2 / clients) * (alpha**2 + 1 / entries)
    owner = np.repeat(np.arange(clients), split.train.sizes)
    x = split.train.arrays["x"]
    v = np.stack([x[owner == k].mean(0) for k in range(clients)])
    noise = (np.arange(1, dim + 1) ** -1.2).sum() / dim**2 / 45  # of a client's mean, 45 rows or more
    var = v.mean(1).std() ** 2
    expected = beta**2 + 1 / dim
    assert abs(var - expected) < 5 * np.sqrt(2 / clients) * expected + noise


def test_synthetic_covariance_is_the_power_law():
    split = fl.datasets.synthetic(0.0, 0.0, 20, dim=10, seed=5)
    x, owner = split.train.arrays["x"], np.repeat(np.arange(20), split.train.sizes)
    means = np.stack([x[owner == k].mean(0) for k in range(20)])
    covariance = np.cov((x - means[owner]).T)
    expected = np.diag(np.arange(1.0, 11) ** -1.2)
    assert abs(covariance - expected).max() < 8 / np.sqrt(len(x))


def test_synthetic_iid_has_one_model_and_centered_inputs():
    split = fl.datasets.synthetic_iid(seed=4)
    assert np.ptp(split.train.attrs["W"], axis=0).max() == 0
    x = _whole(split, "x")
    assert (abs(x.mean(0)) < 5 * np.arange(1, 61) ** -0.6 / np.sqrt(len(x))).all()


@pytest.mark.parametrize(
    "make", [lambda s: fl.datasets.synthetic(1, 1, 3, seed=s).train, lambda s: fl.datasets.quadratics(3, seed=s)]
)
def test_generators_are_functions_of_their_seed(make):
    first, again, other = (jax.tree.leaves(make(seed).arrays)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.shape != other.shape or (first != other).any()


# ---- quadratics ----


def test_quadratic_optimum_has_no_gradient_and_the_stated_curvature():
    data = fl.datasets.quadratics(6, 4, heterogeneity=2.0, condition_number=50.0, seed=1)
    A, b = (np.asarray(data.arrays[n], np.float64) for n in ("A", "b"))
    p = np.array([1, 2, 3, 4, 5, 6.0])
    for weights in (None, p):
        w = fl.datasets.quadratic_optimum(data, weights)
        gradient = np.einsum("k,kij,kj->i", np.ones(6) if weights is None else p, A, w - b)
        assert abs(gradient).max() < 1e-10
    eigenvalues = np.linalg.eigvalsh(A)
    np.testing.assert_allclose(eigenvalues[:, 0], 1, rtol=1e-4)
    np.testing.assert_allclose(eigenvalues[:, -1], 50, rtol=1e-4)


def test_with_one_curvature_the_optimum_is_the_mean():
    data = fl.datasets.quadratics(5, 3, same_curvature=True)
    np.testing.assert_allclose(fl.datasets.quadratic_optimum(data), data.arrays["b"].mean(0), rtol=1e-4)
    data = fl.datasets.quadratics(5, 3, heterogeneity=0.0)
    np.testing.assert_allclose(fl.datasets.quadratic_optimum(data), 0, atol=1e-12)


def test_local_steps_miss_the_optimum_only_where_curvatures_differ():
    # The fixed point of averaging tau local gradient steps: mean_k (I - (I - eta A_k)^tau)(w - b_k) = 0.
    for same in (False, True):
        data = fl.datasets.quadratics(5, 3, same_curvature=same, seed=3)
        A, b = (np.asarray(data.arrays[n], np.float64) for n in ("A", "b"))
        M = np.eye(3) - np.stack([np.linalg.matrix_power(np.eye(3) - 0.05 * a, 20) for a in A])
        fixed = np.linalg.solve(M.mean(0), np.einsum("kij,kj->i", M, b) / 5)
        away = np.linalg.norm(fixed - fl.datasets.quadratic_optimum(data))
        assert away < 1e-5 if same else away > 0.05


def test_quadratic_model_by_hand():
    model = fl.datasets.quadratic_model(2)
    params, state = model.init(jax.random.key(0))
    batch = {"A": jnp.diag(jnp.array([2.0, 4.0]))[None], "b": jnp.array([[1.0, -1.0]])}
    mask = jnp.array([True])
    losses, _ = model.loss(params, state, batch, mask, jax.random.key(0), True)
    np.testing.assert_allclose(losses, [3.0])  # (2 + 4) / 2
    gradient = jax.grad(lambda p: model.loss(p, state, batch, mask, None, True)[0].sum())(params)
    np.testing.assert_allclose(gradient["w"], [-2.0, 4.0])  # A (w - b)
    np.testing.assert_allclose(model.metrics(params, state, batch)["loss"], [3.0])


# ---- point estimation: Ditto's closed form ----


@pytest.mark.parametrize(
    ("options", "lam", "ditto"),
    [
        ({"num_clients": 8}, 2.1333, 0.008624),
        ({"num_clients": 16, "num_attacked": 8, "tau_attacked": 0.5}, 1.1852, 0.010486),
    ],
)
def test_point_estimation_has_dittos_errors(options, lam, ditto):
    # papers.md row 8: sigma .8, n 30, tau .1; the mean squared error over the benign clients.
    sigma, n, tau, dim = 0.8, 30, 0.1, 6000
    data = fl.datasets.point_estimation(n=n, sigma=sigma, tau=tau, dim=dim, **options)
    K, attacked = data.num_clients, np.asarray(data.attrs["attacked"])
    K_a, tau_a = attacked.sum(), options.get("tau_attacked", 0.0)
    best = sigma**2 / n * K / (K * tau**2 + K_a * (tau_a**2 - tau**2) / (K - 1))
    assert abs(best - lam) < 1e-4
    local = data.arrays["x"].reshape(K, n, dim).mean(1, dtype=np.float64)
    personal = (local + best * local.mean(0)) / (1 + best)
    error = (personal - data.attrs["w"])[~attacked] ** 2
    assert abs(error.mean() / ditto - 1) < 0.015
    local_error = (local - data.attrs["w"])[~attacked] ** 2
    assert abs(local_error.mean() / (sigma**2 / n) - 1) < 0.02
    if not K_a:
        global_error = (local.mean(0) - data.attrs["w"]) ** 2
        assert abs(global_error.mean() / 0.0114167 - 1) < 0.02  # tau^2 (1 - 1/K) + sigma^2 / (n K)


def test_point_model_by_hand():
    model = fl.datasets.point_model(2)
    batch = {"x": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
    losses, _ = model.loss({"w": jnp.zeros(2)}, (), batch, None, None, True)
    np.testing.assert_allclose(losses, [12.5, 0.5])


# ---- clustered regression ----


def test_clustered_regression_recovers_its_truth():
    split = fl.datasets.clustered_regression(12, 3, n=200, dim=6, separation=4.0, noise=0.05, seed=2)
    cluster, w = split.train.attrs["cluster"], split.train.attrs["w"]
    assert sorted(np.bincount(cluster)) == [4, 4, 4]
    for a in range(3):
        for b in range(a):
            gap = np.linalg.norm(w[cluster == a][0] - w[cluster == b][0])
            np.testing.assert_allclose(gap, 4.0, rtol=1e-5)
    for k in range(12):
        x, _ = split.train.client(k).full()
        found = np.linalg.lstsq(np.asarray(x["x"])[:160], np.asarray(x["y"])[:160], rcond=None)[0]
        assert abs(found - w[k]).max() < 6 * 0.05 / np.sqrt(160)
    assert (np.asarray(split.train.sizes) == 160).all() and (np.asarray(split.test.sizes) == 40).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fl.datasets.synthetic(-1, 0), "alpha is a standard deviation"),
        (lambda: fl.datasets.synthetic(0, float("inf")), "beta is a standard deviation"),
        (lambda: fl.datasets.synthetic(0, 0, 0), "num_clients must be positive"),
        (lambda: fl.datasets.quadratics(condition_number=0.5), "condition_number must be at least 1"),
        (lambda: fl.datasets.quadratics(heterogeneity=-1), "heterogeneity must be at least 0"),
        (lambda: fl.datasets.quadratic_optimum(fl.datasets.quadratics(3), [1, 2]), "one entry for each of 3"),
        (lambda: fl.datasets.point_estimation(4, num_attacked=5), "num_attacked must be 0 to 4"),
        (lambda: fl.datasets.point_estimation(4, num_attacked=1), "tau_attacked must be positive"),
        (lambda: fl.datasets.clustered_regression(2, 3), "2 clients can't fill 3 clusters"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
