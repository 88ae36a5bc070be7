"""VIRTUAL: exact posteriors where they are known, sites and cavities by hand, private parts, uncertainty; pFedBayes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.pfedbayes import pfedbayes
from algorithms.virtual import Change, virtual
from fedjax_lab import variational as vi
from fedjax_lab import wire
from fedjax_lab.transforms import leaves
from tests.problems import assert_close, softmax_data, softmax_model, steps
from tests.refusals import raises

SCALE = 0.8  # of the prior
WORK = {"steps": 400, "batch_size": None, "samples": 4}
SGD = optax.sgd(0.15)


def regression_model(dim: int = 3, private: bool = False):
    """``loss = 0.5 (y - x w)^2``; with ``private``, w is two leaves."""

    def init(key):
        w = jnp.linspace(-0.5, 0.5, dim)
        return ({"own": w[:1], "shared": w[1:]} if private else {"w": w}), ()

    def loss(params, model_state, batch, mask, key, train):
        w = jnp.concatenate([params["own"], params["shared"]]) if private else params["w"]
        return 0.5 * (batch["y"] - batch["x"] @ w) ** 2, model_state

    return fl.Model(init, loss, lambda p, s, b: {"loss": loss(p, s, b, None, None, False)[0]})


@functools.cache
def regression_data(clients: int = 4, dim: int = 3):
    """Designs with orthogonal columns, so that the exact posterior is mean-field; and each client's statistics."""
    rng, rows, stats = np.random.default_rng(0), {}, []
    for k in range(clients):
        q, _ = np.linalg.qr(rng.normal(size=(4 + k, dim)))
        x = (q * rng.uniform(1, 2.5, dim)).astype(np.float32)
        y = (x @ rng.normal(size=dim) + rng.normal(size=4 + k)).astype(np.float32)
        rows[k] = {"x": x, "y": y}
        x, y = x.astype(np.float64), y.astype(np.float64)
        stats.append((np.diag(x.T @ x), x.T @ y))
    return fl.FederatedData.from_clients(rows), stats


def exact(stats, share=None, dim: int = 3):
    """Posterior mean and precision of prior times likelihoods, each to the power of its share."""
    share = np.ones(len(stats)) if share is None else share
    precision = 1 / SCALE**2 + sum(s * a for s, (a, _) in zip(share, stats, strict=True))
    shift = np.linspace(-0.5, 0.5, dim) / SCALE**2 + sum(s * b for s, (_, b) in zip(share, stats, strict=True))
    return shift / precision, precision


def after(round, rounds, sampler=None, data=None, seed=0):
    process = fl.synchronous(round, regression_data()[0] if data is None else data, sampler)
    state, metrics = steps(process, rounds, seed)
    return process, state, metrics


@pytest.fixture(scope="module")
def everyone():
    return after(virtual(regression_model(), SGD, prior_scale=SCALE, **WORK), 1)


def test_a_conjugate_posterior_is_exact_after_one_round_with_everyone(everyone):
    process, state, metrics = everyone
    mean, precision = exact(regression_data()[1])
    server = process.server(state)
    np.testing.assert_allclose(server.variables.params["w"], mean, atol=1e-5)
    np.testing.assert_allclose(server.precision["w"], precision, rtol=1e-5)
    site = process.clients(state).table.site
    np.testing.assert_allclose(site.precision["w"], [a for a, _ in regression_data()[1]], rtol=1e-4)
    np.testing.assert_allclose(site.shift["w"], [b for _, b in regression_data()[1]], atol=1e-4)
    assert float(metrics["improper"]) == 0


def test_cohorts_that_change_and_damping_lead_there_too():
    """Each visit takes half of what is missing: the likelihoods' powers are 1 - 2^-visits."""
    cohort, damping = fl.uniform(2), 0.5
    process = fl.synchronous(virtual(regression_model(), SGD, prior_scale=SCALE, damping=damping, **WORK),
                             regression_data()[0], cohort)  # fmt: skip
    state, visits = process.init(jax.random.key(1)), np.zeros(4)
    key = jax.random.split(jax.random.key(1))[1]
    for r in range(5):
        public = jax.random.fold_in(jax.random.fold_in(key, r), 0)
        visits[np.asarray(cohort.sample((), public, process.data, None)[0])] += 1
        state, _ = process.step(state, process.data)
    assert visits.sum() == 10 and visits.min() > 0  # so that they differ
    mean, precision = exact(regression_data()[1], 1 - (1 - damping) ** visits)
    np.testing.assert_allclose(process.server(state).variables.params["w"], mean, atol=1e-4)
    np.testing.assert_allclose(process.server(state).precision["w"], precision, rtol=1e-4)


def test_private_parameters_have_posteriors_of_their_own():
    """The first coefficient is each client's own: its posterior has the client's rows alone, and never travels."""
    _, stats = regression_data()
    round = virtual(regression_model(private=True), SGD, prior_scale=SCALE, private=leaves("params/own"), **WORK)
    process, state, _ = after(round, 2)
    mean, precision = exact(stats)
    server, table = process.server(state), process.clients(state).table
    np.testing.assert_allclose(server.variables.params["shared"], mean[1:], atol=1e-4)
    np.testing.assert_allclose(server.precision["shared"], precision[1:], rtol=1e-4)
    np.testing.assert_array_equal(server.variables.params["own"], [-0.5])
    for k in range(4):
        client, key = process.data.view(jnp.int32(k)), jax.random.key(0)
        own = jax.tree.map(lambda t, k=k: t[k], table)
        message = round.broadcast(server, own, client, key)
        assert message.variables.params["own"] is None and message.precision["own"] is None
        q = round.personalize(message, own, client, key).params
        alone_mean, alone_precision = exact(stats[k : k + 1])
        np.testing.assert_allclose(q.mean["own"], alone_mean[:1], atol=1e-4)
        np.testing.assert_allclose(np.exp(-2 * q.log_scale["own"]), alone_precision[:1], rtol=1e-4)
        np.testing.assert_allclose(q.mean["shared"], mean[1:], atol=1e-4)
    upload = jax.eval_shape(lambda k: round.client_update(message, own, process.data.view(k), key).upload, jnp.int32(0))
    assert [leaf.shape for leaf in jax.tree.leaves(upload)] == [(2,), (2,)]


def test_the_gradient_is_that_of_the_evidence_bound():
    """Logistic regression in one dimension, which is not conjugate: the expectations by quadrature."""
    x, y = np.array([1.0, -2.0, 0.5, 1.5, -0.3]), np.array([1.0, 0.0, 1.0, 0.0, 1.0])
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    c, s, kl_weight = -0.2, 1.1, 0.7

    def objective(m, r):
        theta = m + np.exp(r) * nodes[:, None]
        loss = np.logaddexp(0, theta * x) - y * theta * x
        divergence = np.log(s) - r + (np.exp(2 * r) + (m - c) ** 2) / (2 * s**2) - 0.5
        return weights @ loss.mean(1) + kl_weight * divergence / len(x)

    def loss(params, model_state, batch, mask, key, train):
        return jnp.logaddexp(0, params * batch["x"]) - batch["y"] * params * batch["x"], model_state

    m, r, h = 0.3, np.log(0.8), 1e-5
    expected = [
        (objective(m + h, r) - objective(m - h, r)) / (2 * h),
        (objective(m, r + h) - objective(m, r - h)) / (2 * h),
    ]
    prior = vi.Gaussian(jnp.float32(c), jnp.log(jnp.float32(s)))
    inputs = ((), {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}, jnp.ones(5, bool))

    @jax.jit
    def estimate(key):
        oracle = vi.elbo(prior, 5, samples=200, kl_weight=kl_weight)(fl.gradient_oracle(loss))
        return oracle(vi.Gaussian(jnp.float32(m), jnp.float32(r)), inputs, key)[0]

    draws = np.stack([np.stack(estimate(jax.random.key(i))) for i in range(100)])
    error = draws.std(0) / np.sqrt(len(draws))
    assert (error < 2e-3).all()
    np.testing.assert_array_less(np.abs(draws.mean(0) - expected), 4 * error)
    kl = vi.divergence(vi.Gaussian(jnp.float32(m), jnp.float32(r)), prior)
    np.testing.assert_allclose(kl, np.log(s) - r + (np.exp(2 * r) + (m - c) ** 2) / (2 * s**2) - 0.5, rtol=1e-5)


def test_at_the_exact_posterior_every_draw_gives_no_gradient():
    """What makes training exact: prior N(0.5, 0.5^2), two examples 1 and 2 of unit variance."""
    prior = vi.Gaussian(jnp.float32(0.5), jnp.log(jnp.float32(0.5)))
    mean, precision = (4 * 0.5 + 1 + 2) / 6, 6.0
    loss = lambda p, s, b, m, k, t: (0.5 * (b["x"] - p) ** 2, s)
    oracle = vi.elbo(prior, 2)(fl.gradient_oracle(loss))
    q = vi.Gaussian(jnp.float32(mean), jnp.float32(-0.5 * np.log(precision)))
    inputs = ((), {"x": jnp.array([1.0, 2.0])}, jnp.ones(2, bool))
    for i in range(3):
        grads, _ = oracle(q, inputs, jax.random.key(i))
        np.testing.assert_allclose(np.stack(grads), 0, atol=1e-6)


# ---- sites ----


def test_sites_multiply_divide_and_never_make_a_gaussian_improper():
    prior = vi.Belief({"a": jnp.array([0.0, 1.0])}, {"a": jnp.array([4.0, 4.0])})
    site = vi.Site({"a": jnp.array([2.0, -3.0])}, {"a": jnp.array([1.0, 0.0])})
    product = vi.times(prior, site, 4.0)
    np.testing.assert_allclose(product.mean["a"], [2 / 5, (4 - 3) / 4])
    np.testing.assert_allclose(product.precision["a"], [5, 4])
    assert_close(vi.without(product, site, 4.0), prior)
    # Dividing by more than there is: held at the least precision, and finite.
    held = vi.without(prior, vi.Site({"a": jnp.array([8.0, 8.0])}, {"a": jnp.array([4.0, 100.0])}), 4.0)
    np.testing.assert_array_equal(held.precision["a"], [4, 4])
    np.testing.assert_allclose(held.mean["a"], [0 - 8 / 4, 1 + (100 * 1 - 8) / 4])
    # A posterior less certain than its cavity: no precision, and the mean all the same.
    posterior = vi.Gaussian({"a": jnp.array([0.5, 0.5])}, {"a": -0.5 * jnp.log(jnp.array([1.0, 16.0]))})
    new = vi.between(posterior, prior)
    np.testing.assert_allclose(new.precision["a"], [0, 12], atol=1e-5)
    np.testing.assert_allclose(vi.times(prior, new, 4.0).mean["a"], [0.5, 0.5], atol=1e-6)
    assert float(vi.clipped_share(posterior, prior)) == 0.5


def test_an_improper_sum_is_held_at_the_prior_and_reported(everyone):
    process, state, _ = everyone
    server = process.server(state)
    bad = Change(vi.Site({"w": jnp.array([1.0, 0.0, 0.0])}, {"w": jnp.array([-1e3, 0.0, 0.0])}), ())
    new, metrics = process.round.server_update(server, bad, jax.random.key(0))
    assert float(metrics["improper"]) == pytest.approx(1 / 3)
    assert float(new.precision["w"][0]) == pytest.approx(SCALE**-2)
    np.testing.assert_allclose(new.precision["w"][1:], server.precision["w"][1:])
    assert np.isfinite(new.variables.params["w"]).all()


@pytest.mark.slow
def test_through_links_that_lose_something_it_stays_proper():
    round = virtual(softmax_model(), optax.sgd(0.1), prior_scale=0.5, epochs=1)
    lossy = fl.compose(round, fl.uplink(wire.error_feedback(wire.top_k(0.3))))
    process, state, metrics = after(lossy, 4, fl.uniform(5), softmax_data())
    server = process.server(state).inner
    assert all((np.asarray(p) >= 4 * (1 - 1e-6)).all() for p in jax.tree.leaves(server.precision))
    assert np.isfinite(float(metrics["loss"]))


# ---- predictions ----


def test_predictions_are_averaged_and_their_uncertainty_told():
    model, data = softmax_model(), softmax_data()
    bayes, batch = vi.bayesian(model, 3), data.client("c3").full()[0]
    mean = fl.initial_variables(model, jax.random.key(0), data).params
    q = vi.Gaussian(mean, jax.tree.map(lambda p: jnp.full_like(p, np.log(0.7)), mean))
    averaged = jax.jit(lambda q: bayes.metrics(q, (), batch))
    found = averaged(q)
    draws = [vi._noise(jax.random.fold_in(jax.random.key(0), i), mean) for i in range(3)]
    p = []
    for noise in draws:
        w, b = (np.asarray(mean[n], np.float64) + 0.7 * np.asarray(noise[n], np.float64) for n in ("w", "b"))
        scores = np.asarray(batch["x"], np.float64) @ w + b
        e = np.exp(scores - scores.max(1, keepdims=True))
        p.append(e / e.sum(1, keepdims=True))
    p, y = np.stack(p), np.asarray(batch["y"])
    average = p.mean(0)
    entropy = -(average * np.log(average)).sum(1)
    np.testing.assert_allclose(found["loss"], -np.log(average[np.arange(len(y)), y]), rtol=1e-4)
    np.testing.assert_array_equal(found["accuracy"], average.argmax(1) == y)
    np.testing.assert_allclose(found["entropy"], entropy, rtol=1e-4)
    np.testing.assert_allclose(found["mutual_information"], entropy + (p * np.log(p)).sum(2).mean(0), atol=1e-5)
    # Without spread it is the model itself.
    sure = averaged(vi.Gaussian(mean, jax.tree.map(lambda p: jnp.full_like(p, -30.0), mean)))
    plain = bayes.metrics(mean, (), batch)
    for name in plain:
        np.testing.assert_allclose(sure[name], plain[name], atol=1e-5)
    np.testing.assert_allclose(sure["mutual_information"], 0, atol=1e-5)


@pytest.mark.slow
def test_evaluation_reports_uncertainty_which_falls_with_data():
    round = virtual(softmax_model(), optax.adam(0.05), prior_scale=1.0, epochs=5)
    process = fl.synchronous(round, softmax_data())
    evaluate = fl.per_client(softmax_data())
    state = process.init(jax.random.key(0))
    before = evaluate(process, state)
    for _ in range(3):
        state, _ = process.step(state, process.data)
    later = evaluate(process, state)
    assert later["personal_mutual_information"] < 0.5 * before["personal_mutual_information"]
    assert later["personal_accuracy"] > before["personal_accuracy"]
    assert "mutual_information" not in later


# ---- pFedBayes ----


@pytest.mark.slow
def test_pfedbayes_ends_where_its_objective_is_stationary():
    """q is the posterior under the prior w; w's mean and spread are those of the clients' q together. (With several
    local steps a client's copy of w drifts towards its own q, as FedAvg's models drift apart.)"""
    rng = np.random.default_rng(0)
    sizes, zeta = np.array([4, 6, 8]), 1.0
    x = [rng.normal(1 + 2 * k, 1, (n, 1)).astype(np.float32) for k, n in enumerate(sizes)]
    data = fl.FederatedData.from_clients({k: {"x": own} for k, own in enumerate(x)})
    model = fl.datasets.point_model(1)
    round = pfedbayes(model, optax.sgd(0.5), zeta=zeta, initial_scale=0.5, samples=4, steps=1, batch_size=None)
    process = fl.synchronous(round, data)
    many = jax.jit(lambda s: jax.lax.scan(lambda s, _: (process.step(s, process.data)[0], None), s, length=1500)[0])
    state = many(process.init(jax.random.key(0)))
    q, server = process.clients(state).table, process.server(state)
    mean, variance = np.asarray(q.mean["w"])[:, 0], np.exp(2 * np.asarray(q.log_scale["w"]))[:, 0]
    w_mean, w_variance = float(server.variables.params["w"][0]), float(np.exp(2 * server.log_scale["w"][0]))
    precision = sizes / zeta + 1 / w_variance
    np.testing.assert_allclose(1 / variance, precision, rtol=0.02)
    own = np.array([np.mean(v) for v in x])
    np.testing.assert_allclose(mean, (sizes / zeta * own + w_mean / w_variance) / precision, atol=0.02)
    # Each client pulls w by zeta KL(q || w) / n, and is weighed by its n: alike, all in all.
    np.testing.assert_allclose(w_mean, mean.mean(), atol=0.02)
    np.testing.assert_allclose(w_variance, (variance + (mean - w_mean) ** 2).mean(), rtol=0.03)


# ---- bad input ----


def counting_model():
    model = regression_model()
    return model._replace(init=lambda key: ({"w": jnp.zeros(3), "seen": jnp.int32(0)}, ()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prior_scale": 0}, ["prior_scale must be positive"]),
        ({"prior_scale": -1.0}, ["prior_scale must be positive"]),
        ({"prior_scale": float("nan")}, ["prior_scale"]),
        ({"damping": 0}, ["damping must be positive"]),
        ({"damping": 1.5}, ["damping must be above 0 and at most 1", "1.5"]),
        ({"samples": 0}, ["samples must be positive"]),
        ({"samples": 1.5}, ["samples must be a positive integer"]),
        ({"predictions": 0}, ["predictions must be positive"]),
        ({"kl_weight": 0.0}, ["kl_weight must be positive"]),
        ({"model": counting_model()}, ["params leaf seen is int32", "floating-point"]),
    ],
)
def test_refusals_when_the_round_is_built(options, words):
    model = options.pop("model", regression_model())
    raises(lambda: virtual(model, SGD, **({"prior_scale": 1.0} | options)), *words)


def test_refusals_of_what_is_private_and_of_pfedbayes():
    build = lambda predicate: fl.synchronous(
        virtual(regression_model(private=True), SGD, prior_scale=1.0, private=predicate), regression_data()[0]
    )
    raises(lambda: build(lambda path: True), "makes everything private", "params/own")
    raises(lambda: build(lambda path: False), "makes nothing private")
    for name in ("zeta", "initial_scale", "beta"):
        raises(lambda name=name: pfedbayes(softmax_model(), SGD, **({"zeta": 1.0} | {name: 0})), f"{name} must be")
    raises(lambda: pfedbayes(counting_model(), SGD, zeta=1.0), "params leaf seen is int32")
