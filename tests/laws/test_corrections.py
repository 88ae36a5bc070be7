"""Rounds that correct clients towards each other, under transforms that give clients parts or objectives of their own.

Each row says (w, b) -> .5 (w - 1)^2 + .5 (b - y)^2: w has one optimum for all, b is y at each client.
"""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.feddane import feddane
from algorithms.feddyn import feddyn
from algorithms.fedlin import fedlin
from algorithms.fedpd import fedpd
from algorithms.mime import mime
from algorithms.scaffold import scaffold
from fedjax_lab.transforms import (
    clusters,
    control_variates,
    coupling,
    fine_tuning,
    hypernetwork,
    leaves,
    per_fedavg,
    pfedme,
    private,
    reconstruction,
    split_clusters,
)
from tests.problems import steps

SGD, Y = optax.sgd(0.1), (1.0, -2.0, 5.0)
WORK = {"steps": 5, "batch_size": None}
MADE = {
    "scaffold": lambda model, **work: scaffold(model, SGD, **WORK | work),
    "feddyn": lambda model, **work: feddyn(model, SGD, alpha=0.5, **WORK | work),
    "fedpd": lambda model, **work: fedpd(model, SGD, eta=1.0, **WORK | work),
    "feddane": lambda model, **work: feddane(model, SGD, mu=0.1, **WORK | work),
    "fedlin": lambda model, **work: fedlin(model, SGD, **WORK | work),
    "mime": lambda model, **work: mime(model, SGD, **WORK | work),
}
REMEMBERING = ("scaffold", "feddyn", "fedpd")


def two_leaves(pack=lambda w, b: {"w": w, "b": b}, unpack=lambda p: (p["w"], p["b"])):
    def loss(params, model_state, batch, mask, key, train):
        w, b = unpack(params)
        return 0.5 * (w - 1) ** 2 + 0.5 * (b - batch["y"]) ** 2, model_state

    metrics = lambda p, s, batch: {"loss": loss(p, s, batch, None, None, False)[0]}
    return fl.Model(lambda key: (pack(jnp.float32(0), jnp.float32(0)), ()), loss, metrics)


MODEL = two_leaves()


def population(y=Y, rows=(1, 3, 2)):
    return fl.FederatedData.from_clients(
        {k: {"y": np.full(n, v, np.float32)} for k, (v, n) in enumerate(zip(y, rows, strict=True))}
    )


@pytest.mark.parametrize("name", MADE)
def test_a_private_leaf_is_trained_by_the_clients_own_gradient(name):
    """What corrects it towards the others would cancel that gradient, or pull at it for ever."""
    process = fl.synchronous(fl.compose(MADE[name](MODEL), private(leaves("params/b"))), population())
    state, _ = steps(process, 300)
    np.testing.assert_allclose(process.clients(state).table.part.params["b"], Y, atol=1e-3)
    assert float(process.params(state)["w"]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["scaffold", "fedlin"])
def test_a_private_entry_of_a_tuple_is_one_too(name):
    """The structure of two parameters is also that of many another pair."""
    model = two_leaves(lambda w, b: (w, b), lambda p: p)
    process = fl.synchronous(fl.compose(MADE[name](model), private(leaves("params/1"))), population())
    state, _ = steps(process, 300)
    np.testing.assert_allclose(process.clients(state).table.part.params[1], Y, atol=1e-3)


@pytest.mark.parametrize("name", MADE)
def test_uncoupled_clients_train_alone(name):
    process = fl.synchronous(fl.compose(MADE[name](MODEL), coupling(0.0)), population())
    state, _ = steps(process, 300)
    np.testing.assert_allclose(process.clients(state).table.own.params["b"], Y, atol=1e-3)


def entangled():
    """(w, b) -> .5 (w + b - y)^2 + .5 (w - 1)^2: where w ends depends on what b is."""

    def loss(params, model_state, batch, mask, key, train):
        w, b = params["w"], params["b"]
        return 0.5 * (w + b - batch["y"]) ** 2 + 0.5 * (w - 1) ** 2, model_state

    metrics = lambda p, s, batch: {"loss": loss(p, s, batch, None, None, False)[0]}
    return fl.Model(lambda key: ({"w": jnp.float32(0), "b": jnp.float32(0)}, ()), loss, metrics)


@pytest.mark.parametrize("name", [None, *REMEMBERING])
def test_the_shared_part_trains_beside_the_rebuilt_one(name):
    """b = (1 - .9^3)(y - w) after three steps from 0; the gradient at w with b held is 2w + b - y - 1, averaged."""
    model, data = entangled(), population(rows=(2, 6, 4))  # of which half are for b, half for w
    base = MADE[name](model) if name else fedavg(model, SGD, steps=1, batch_size=None)
    rebuilt = reconstruction(model, leaves("params/b"), SGD, steps=3, batch_size=None)
    process = fl.synchronous(fl.compose(base, rebuilt), data)
    state, _ = steps(process, 500)
    share, mean = 1 - 0.9**3, np.average(Y, weights=(1, 3, 2))
    assert float(process.params(state)["w"]) == pytest.approx(((1 - share) * mean + 1) / (2 - share), abs=1e-3)


def curved():
    """.5 a (w - y)^2, with a of the client's own: what is adapted differs, and so do fixed points."""

    def loss(params, model_state, batch, mask, key, train):
        return 0.5 * batch["a"] * (params["w"] - batch["y"]) ** 2, model_state

    metrics = lambda p, s, batch: {"loss": loss(p, s, batch, None, None, False)[0]}
    model = fl.Model(lambda key: ({"w": jnp.float32(0)}, ()), loss, metrics)
    a, y = (1.0, 3.0, 0.5), (0.0, 1.0, 4.0)
    rows = lambda k, n: {"a": np.full(n, a[k], np.float32), "y": np.full(n, y[k], np.float32)}
    return (
        model,
        fl.FederatedData.from_clients({k: rows(k, n) for k, n in enumerate((2, 6, 4))}),
        np.array(a),
        np.array(y),
    )


def adapted_optimum(shrink, curvature, weights):
    """Where the weighted gradients ``curvature_k shrink_k a_k (w - y_k)`` cancel."""
    _, _, a, y = curved()
    pull = np.asarray(weights) * a * shrink * curvature
    return float(pull @ y / pull.sum())


@pytest.mark.parametrize("name", ["scaffold", "feddyn", "fedpd"])
def test_what_is_corrected_is_the_gradient_of_the_changed_objective(name):
    """Per-FedAvg over it reaches the optimum of MAML's objective, whose gradient is (1 - .2 a)^2 a (w - y)."""
    model, data, a, _ = curved()
    process = fl.synchronous(fl.compose(MADE[name](model), per_fedavg(0.2, form="exact")), data)
    state, _ = steps(process, 2000)
    expected = adapted_optimum(1 - 0.2 * a, 1 - 0.2 * a, (1, 3, 2))
    assert float(process.params(state)["w"]) == pytest.approx(expected, abs=1e-3)


def test_moreau_envelopes_are_corrected_as_such():
    """pFedMe's gradient lam (w - theta(w)) = lam a / (lam + a) (w - y) for theta solved to the end."""
    model, data, a, _ = curved()
    inner = {"lam": 2.0, "inner_learning_rate": 0.2, "inner_steps": 60}
    process = fl.synchronous(fl.compose(MADE["scaffold"](model), pfedme(**inner)), data)
    state, _ = steps(process, 1000)
    expected = adapted_optimum(2.0 / (2.0 + a), 1.0, (1, 3, 2))
    assert float(process.params(state)["w"]) == pytest.approx(expected, abs=1e-3)


def test_the_mean_control_variate_weighs_as_the_uploads_do():
    """Those are weighed by the query part's examples."""
    data = population(rows=(2, 5, 7))  # of which queries have 1, 2 and 3
    process = fl.synchronous(fl.compose(MADE["scaffold"](MODEL), per_fedavg(0.05, form="first_order")), data)
    state, _ = steps(process, 1)
    own = process.clients(state).table.c["b"]
    assert float(process.server(state).c["b"]) == pytest.approx(np.average(own, weights=(1, 2, 3)), rel=1e-5)


@pytest.mark.parametrize("name", ["feddane", "fedlin", "mime"])
def test_fine_tuning_works_between_paired_rounds_as_well(name):
    """Five steps of local training, which the rounds in which gradients are collected make none of."""
    process = fl.synchronous(fl.compose(MADE[name](MODEL), fine_tuning()), population())
    for rounds in (1, 2):
        state, _ = steps(process, rounds)
        before = np.array([float(process.params(state)[leaf]) for leaf in "wb"])
        own = [np.array([1, y]) + 0.9**5 * (before - [1, y]) for y in Y]
        loss = np.average([0.5 * ((w - [1, y]) ** 2).sum() for w, y in zip(own, Y, strict=True)], weights=(1, 3, 2))
        assert fl.per_client(population())(process, state)["personal_loss"] == pytest.approx(loss, rel=1e-4)


def test_fine_tuning_follows_a_schedule_over_rounds():
    rate = lambda r: optax.sgd(jnp.where(r < 2, 0.1, 0.0))
    process = fl.synchronous(fl.compose(fedavg(MODEL, rate, **WORK), fine_tuning()), population())
    found = [fl.per_client(population())(process, steps(process, n)[0]) for n in (1, 3)]
    assert found[0]["personal_loss"] < found[0]["loss"] - 0.1
    assert found[1]["personal_loss"] == found[1]["loss"]


@pytest.mark.parametrize("name", REMEMBERING)
@pytest.mark.parametrize("outer", [clusters(2), split_clusters(2, eps1=0.1, eps2=0.2), hypernetwork()])
def test_what_is_remembered_of_one_model_goes_with_no_other(name, outer):
    with pytest.raises(ValueError, match="by what it remembers of one"):
        fl.compose(MADE[name](MODEL), outer)


def test_predicates_are_functions():
    for made in (
        lambda: private("params/b"),  # pyright: ignore[reportArgumentType]
        lambda: reconstruction(MODEL, "params/b", SGD),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(ValueError, match=r"such as fl\.transforms\.leaves"):
            made()


def test_control_variates_before_and_after_a_changed_objective_are_one():
    model, data, *_ = curved()
    base, meta = fedavg(model, SGD, weighting="uniform", **WORK), per_fedavg(0.2, form="exact")
    corrected = control_variates("II", "uniform", 0.1)
    one, two = (fl.synchronous(fl.compose(base, *t), data) for t in ((corrected, meta), (meta, corrected)))
    first, second = (process.params(steps(process, 5)[0])["w"] for process in (one, two))
    np.testing.assert_allclose(first, second, rtol=1e-5)
    assert abs(float(first)) > 0.1
