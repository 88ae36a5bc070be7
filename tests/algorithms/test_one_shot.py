"""One-shot learning, distillation, matched averaging, and divide and conquer."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import linear_sum_assignment, minimize

import fedjax_lab as fl
from algorithms.divide_and_conquer import divide_and_conquer
from algorithms.fedavg import fedavg
from algorithms.matched_averaging import matched_averaging
from algorithms.one_shot import ensemble_of, one_shot
from fedjax_lab.ensembles import distil, ensemble, log_probabilities, normal_inputs, student, teacher_of
from fedjax_lab.matching import aligned, assignment, matched_average, reordered
from fedjax_lab.transforms import hidden_units
from tests.problems import assert_close, assert_same_bits, softmax_data, softmax_model, steps

MODEL, NET = softmax_model(), fl.models.mlp(3, hidden=(5, 4))
SGD = optax.sgd(0.3)
LOCAL = {"steps": 20, "batch_size": None}
BATCH = {"x": jnp.zeros((2, 4)), "y": jnp.zeros(2, jnp.int32)}


# ---- matching ----


def test_assignments_are_scipys():
    rng = np.random.default_rng(0)
    solve = jax.jit(assignment)
    for n in (1, 2, 7):
        for _ in range(20):
            for cost in (
                rng.normal(size=(n, n)),
                rng.integers(0, 3, (n, n)).astype(float),
                rng.exponential(size=(n, n)) ** 3,
            ):
                ours, (rows, columns) = np.asarray(solve(cost)), linear_sum_assignment(cost)
                assert sorted(ours) == list(range(n))
                np.testing.assert_allclose(cost[rows, ours].sum(), cost[rows, columns].sum(), rtol=1e-5, atol=1e-6)
    order = rng.permutation(40)
    far = -np.eye(40)[order] + 1e-3 * rng.normal(size=(40, 40))
    np.testing.assert_array_equal(jax.jit(assignment)(far), order)
    assert sorted(np.asarray(solve(np.full((7, 7), np.nan)))) == list(range(7))
    with pytest.raises(ValueError, match="square"):
        assignment(jnp.zeros((2, 3)))


@pytest.fixture(scope="module")
def net():
    """A network of two hidden layers with all its weights, biases too, away from zero; and its units."""
    params, state = NET.init_from(jax.random.key(0), BATCH)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = jax.tree.unflatten(structure, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
    variables = fl.Variables(params, state)
    return variables, hidden_units(NET.loss, variables, BATCH)


def shuffled(variables, units, seed):
    """The same function, its units in another order."""
    rng = np.random.default_rng(seed)
    for group, size in units.sizes:
        variables = reordered(variables, units, group, rng.permutation(size))
    return variables


def scores(variables, seed=0):
    batch = {"x": jax.random.normal(jax.random.key(seed), (16, 4))}
    return log_probabilities(NET, variables, batch, 3)


@pytest.mark.slow
def test_reordered_units_are_the_same_function(net):
    variables, units = net
    other = shuffled(variables, units, 3)
    assert dict(units.sizes) == {"params/hidden_0": 5, "params/hidden_1": 4} or len(units.sizes) == 2
    assert np.abs(jax.tree.leaves(other)[1] - jax.tree.leaves(variables)[1]).max() > 0.1
    np.testing.assert_allclose(scores(other), scores(variables), atol=1e-5)
    assert_same_bits(aligned(other, variables, units), variables)


def test_the_matched_average_of_one_network_in_many_orders_is_this_network(net):
    variables, units = net
    models = [variables, *(shuffled(variables, units, seed) for seed in (1, 2, 3))]
    average = matched_average(NET, models, BATCH)
    np.testing.assert_allclose(scores(average), scores(variables), atol=1e-5)
    plain = jax.tree.map(lambda *x: sum(x) / 4, *models)
    assert np.abs(scores(plain) - scores(variables)).max() > 0.3


@pytest.mark.slow
def test_networks_without_weight_do_not_count(net):
    variables, units = net
    noise = jax.tree.map(lambda x: x + 5, variables)
    average = matched_average(NET, [noise, variables, shuffled(variables, units, 1)], BATCH, [0.0, 1.0, 3.0])
    np.testing.assert_allclose(scores(average), scores(variables), atol=1e-5)


@pytest.mark.slow
def test_networks_from_unlike_starts_average_better_when_matched():
    """One round, each client from its own start on the same kind of data; the mean over three seeds."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 4)).astype(np.float32)
    y = np.argmax(x @ rng.normal(size=(4, 3)), 1).astype(np.int32)
    same = fl.FederatedData.from_arrays({"x": x, "y": y}, np.arange(600) % 3)
    wide = fl.models.mlp(3, hidden=(16,))
    work = {"steps": 150, "batch_size": None}
    process = fl.synchronous(matched_averaging(wide, optax.sgd(0.5), **work), same)
    losses = []
    for seed in range(3):
        state, _ = process.step(process.init(jax.random.key(seed)), process.data)
        mine = fl.global_metrics(same)(process, state)["loss"]
        # What the server got, averaged as it came.
        plain = _plain(process, wide, seed)
        losses.append((mine, plain))
    matched, unmatched = np.mean(losses, axis=0)
    assert matched < 0.5 * unmatched


def _plain(process, model, seed):
    mean = lambda u, w, ok, m, env: jax.tree.map(lambda x: jnp.mean(x, 0), u)
    keep = fl.Aggregator(lambda u, w, m, env: (u, w), lambda sums, env: sums, mean)
    other = fl.synchronous(process.round._replace(aggregate=keep), process.data)
    state, _ = other.step(other.init(jax.random.key(seed)), other.data)
    return fl.global_metrics(process.data)(other, state)["loss"]


@pytest.mark.slow
def test_one_client_alone_gets_its_own_network_back():
    data = softmax_data((12,))
    matched = fl.synchronous(matched_averaging(NET, SGD, own_starts=False, **LOCAL), data)
    plain = fl.synchronous(fedavg(NET, SGD, **LOCAL), data)
    assert_close(matched.params(steps(matched, 1)[0]), plain.params(steps(plain, 1)[0]), atol=1e-6)


# ---- ensembles ----


@pytest.fixture(scope="module")
def trained():
    """All eight clients' models after one round, in the order of the clients' numbers of examples."""
    data = softmax_data()
    process = fl.synchronous(one_shot(MODEL, SGD, members=8, selection="data", **LOCAL), data)
    state, metrics = process.step(process.init(jax.random.key(0)), process.data)
    return process, process.server(state), metrics


def test_each_member_is_what_its_client_trains_alone(trained):
    process, server, metrics = trained
    np.testing.assert_array_equal(server.scores, sorted(process.data.sizes, reverse=True))
    largest = int(np.argmax(process.data.sizes))
    alone = fl.synchronous(fedavg(MODEL, SGD, **LOCAL), process.data, fl.fixed([largest]))
    expected = alone.params(steps(alone, 1)[0])
    assert_close(jax.tree.map(lambda x: x[0], server.members.params), expected, atol=1e-6)
    everyone = fl.synchronous(fedavg(MODEL, SGD, weighting="uniform", **LOCAL), process.data)
    assert_close(server.variables.params, everyone.params(steps(everyone, 1)[0]), atol=1e-6)
    assert fl.total_bytes(metrics["uplink_bytes"]) == 8 * (60 + 4)
    assert int(metrics["members"]) == 8


def test_an_ensemble_predicts_the_mean_of_its_members_probabilities(trained):
    process, server, _ = trained
    together = ensemble_of(MODEL, server)
    x, y = (np.asarray(process.data.arrays[name][:6]) for name in "xy")
    w, bias = (np.asarray(server.members.params[name]) for name in "wb")
    each = [jax.nn.softmax(x @ w[k] + bias[k]) for k in range(8)]
    expected = np.mean(each, 0)
    params, state = together.init(jax.random.key(0))
    found = together.metrics(params, state, {"x": x, "y": y})
    np.testing.assert_allclose(found["loss"], -np.log(expected[np.arange(6), y]), rtol=1e-4)
    np.testing.assert_array_equal(found["accuracy"], np.argmax(expected, 1) == y)
    weighted = ensemble(MODEL, server.members, weights=[1, 0, 0, 0, 0, 0, 0, 3])
    found = teacher_of(weighted, fl.Variables(params, state))({"x": x})
    np.testing.assert_allclose(found, (np.asarray(each[0]) + 3 * np.asarray(each[7])) / 4, atol=1e-5)


@pytest.mark.slow
def test_the_ensemble_beats_its_members_mean_loss_and_can_be_distilled(trained):
    """The mean of probabilities is never worse than the members on average (Jensen); a student comes close."""
    process, server, _ = trained
    batch = jax.tree.map(jnp.asarray, process.data.arrays)
    together = ensemble_of(MODEL, server)
    variables = fl.Variables(*together.init(jax.random.key(0)))
    one = lambda v: jnp.mean(MODEL.metrics(*v, batch)["loss"])
    members = jax.vmap(lambda p: one(fl.Variables(p)))(server.members.params)
    assert float(jnp.mean(together.metrics(*variables, batch)["loss"])) < float(jnp.mean(members))
    inputs = normal_inputs(jax.random.key(2), 500, {"x": batch["x"].mean(0)}, {"x": batch["x"].std(0)})
    teacher = teacher_of(together, variables)
    pupil = distil(MODEL, teacher, inputs, optax.sgd(1.0), steps=300, batch_size=None)
    theirs, ours = (np.asarray(f(batch)) for f in (teacher, teacher_of(MODEL, pupil)))
    assert np.mean(np.argmax(ours, 1) == np.argmax(theirs, 1)) > 0.9
    # A softmax regression's cross entropy with its teacher is convex: its minimum is known.
    start, tree_of = jax.flatten_util.ravel_pytree(pupil.params)
    pupils = student(MODEL, teacher).loss
    entropy = jax.jit(
        jax.value_and_grad(lambda p: pupils(tree_of(p), (), inputs, jnp.ones(500, bool), None, True)[0].mean())
    )
    best = minimize(lambda p: entropy(jnp.float32(p)), np.asarray(start), jac=True, method="BFGS").fun
    untrained = float(entropy(jnp.zeros_like(start))[0])
    assert float(entropy(start)[0]) - best < 0.01 * (untrained - best)


def test_a_students_loss_is_the_cross_entropy_with_its_teacher():
    teacher = lambda batch: jnp.tile(jnp.array([[0.5, 0.25, 0.25]]), (2, 1))
    params = {"w": jnp.zeros((4, 3)), "b": jnp.log(jnp.array([0.2, 0.3, 0.5]))}
    loss, _ = student(MODEL, teacher).loss(params, (), {"x": jnp.ones((2, 4))}, jnp.ones(2, bool), None, True)
    expected = -(0.5 * np.log(0.2) + 0.25 * np.log(0.3) + 0.25 * np.log(0.5))
    np.testing.assert_allclose(loss, [expected] * 2, rtol=1e-5)


@pytest.mark.slow
def test_only_models_above_the_baseline_are_sent_and_the_best_are_kept():
    data = softmax_data()
    base = {"members": 3, "selection": "data", **LOCAL}
    process = fl.synchronous(one_shot(MODEL, SGD, baseline=10, **base), data)
    state, metrics = process.step(process.init(jax.random.key(0)), process.data)
    server = process.server(state)
    assert fl.total_bytes(metrics["uplink_bytes"]) == int(np.sum(data.sizes >= 10)) * 64
    np.testing.assert_array_equal(server.scores, [30, 23, 17])
    again, _ = process.step(state, process.data)  # few-shot: from the members' mean
    alone = fl.synchronous(fedavg(MODEL, SGD, **LOCAL), data, fl.fixed([3]))
    start = alone.init(jax.random.key(0), server.variables.params)
    expected = alone.params(alone.step(start, alone.data)[0])
    kept = process.server(again).members.params
    gaps = [float(jnp.abs(w - expected["w"]).max()) for w in kept["w"]]
    assert min(gaps) < 1e-5
    nobody = fl.synchronous(one_shot(MODEL, SGD, baseline=31, **base), data)
    state, _ = nobody.step(nobody.init(jax.random.key(0)), nobody.data)
    with pytest.raises(ValueError, match="no members"):
        ensemble_of(MODEL, nobody.server(state))


@pytest.mark.slow
def test_selection_by_validation_scores_examples_that_were_not_trained_on():
    data = softmax_data((30, 24))
    process = fl.synchronous(one_shot(MODEL, SGD, members=2, validation=0.5, **LOCAL), data)
    state, _ = process.step(process.init(jax.random.key(0)), process.data)
    server = process.server(state)
    for k in range(2):
        view = process.data.view(jnp.int32(k))
        _, held = view.split(0.5)
        batch, mask = held.full()
        accuracies = [
            float(fl.masked_mean(MODEL.metrics({"w": w, "b": b}, (), batch)["accuracy"], mask))
            for w, b in zip(server.members.params["w"], server.members.params["b"], strict=True)
        ]
        assert any(abs(a - s) < 1e-6 for a, s in zip(accuracies, server.scores.tolist(), strict=True))


# ---- divide and conquer ----


def exponential_model():
    """Rows ``x``; the loss ``exp(t) - t x`` is least at the log of the mean, which is biased in small samples."""

    def loss(params, model_state, batch, mask, key, train):
        return jnp.exp(params["t"]) - params["t"] * batch["x"], model_state

    return fl.Model(
        lambda key: ({"t": jnp.zeros(())}, ()), loss, lambda p, s, b: {"loss": loss(p, s, b, None, None, False)[0]}
    )


@pytest.mark.slow
def test_averaging_keeps_the_bias_of_small_samples_and_the_second_fit_takes_it_away():
    """E log(mean of n) = log(mu) - var / (2 n mu^2) + ...: here -1/16 for n = 8 exponential variables of mean 1."""
    n, clients = 8, 4000
    x = np.random.default_rng(0).exponential(size=n * clients).astype(np.float32)
    data = fl.FederatedData.from_arrays({"x": x}, np.repeat(np.arange(clients), n))
    work = {"steps": 400, "batch_size": None}

    def estimate(r):
        process = fl.synchronous(divide_and_conquer(exponential_model(), optax.sgd(0.3), r=r, **work), data)
        return float(process.params(steps(process, 1)[0])["t"])

    plain, corrected = estimate(None), estimate(0.5)
    np.testing.assert_allclose(plain, np.log(x.reshape(clients, n).mean(1)).mean(), atol=1e-4)
    assert plain == pytest.approx(-1 / 16, abs=0.02)  # digamma(8) - log(8) = -0.0638
    assert abs(corrected) < 0.5 * abs(plain)


@pytest.mark.slow
def test_one_example_has_no_smaller_part():
    data = fl.FederatedData.from_clients({0: {"x": np.array([2.0], np.float32)}})
    process = fl.synchronous(
        divide_and_conquer(exponential_model(), optax.sgd(0.3), r=0.5, steps=60, batch_size=None), data
    )
    assert float(process.params(steps(process, 1)[0])["t"]) == pytest.approx(np.log(2), abs=1e-4)


# ---- refusals ----


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: one_shot(MODEL, SGD, members=0), "members must"),
        (lambda: one_shot(MODEL, SGD, members=2, selection="validate"), "did you mean 'validation'"),
        (lambda: one_shot(MODEL, SGD, members=2, validation=1.0), "shares"),
        (lambda: one_shot(MODEL, SGD, members=2, baseline=-1), "baseline must"),
        (
            lambda: fl.synchronous(one_shot(MODEL, SGD, members=2, metric="acuracy"), softmax_data()),
            "did you mean 'accuracy'",
        ),
        (lambda: ensemble(MODEL, fl.Variables({"w": jnp.zeros((0, 4, 3)), "b": jnp.zeros((0, 3))})), "no members"),
        (lambda: ensemble(MODEL, fl.Variables({"w": jnp.zeros((2, 4, 3)), "b": jnp.zeros((3, 3))})), "begin with"),
        (lambda: ensemble(fl.models.linear_regression(), fl.Variables(jnp.zeros(2))), "classifier"),
        (lambda: distil(MODEL, lambda b: b, {"x": np.zeros((0, 4))}, SGD), "needs inputs"),
        (lambda: normal_inputs(jax.random.key(0), 0, {}, {}), "count must"),
        (lambda: matched_averaging(NET, SGD, passes=0), "passes must"),
        (lambda: fl.synchronous(matched_averaging(MODEL, SGD), softmax_data()), "no hidden units"),
        (lambda: matched_average(NET, [], BATCH), "no models"),
        (lambda: divide_and_conquer(MODEL, SGD, r=1.0), "r must be a part"),
        (lambda: divide_and_conquer(MODEL, SGD, r=0), "r must be positive"),
    ],
)
def test_refusals(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_networks_of_unlike_shapes_are_refused(net):
    variables, _ = net
    other = fl.Variables(*fl.models.mlp(3, hidden=(6, 4)).init_from(jax.random.key(0), BATCH))
    with pytest.raises(ValueError, match=r"model 2 has params.*of shape \(6,\), the first one \(5,\)"):
        matched_average(NET, [variables, other], BATCH)
    deeper = fl.Variables(*fl.models.mlp(3, hidden=(5, 4, 4)).init_from(jax.random.key(0), BATCH))
    with pytest.raises(ValueError, match="has the leaves"):
        matched_average(NET, [variables, deeper], BATCH)
