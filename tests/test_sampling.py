"""Samplers: who is drawn, how often, and what they refuse. Chi-square at 1e-4, seeds fixed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from tests.problems import softmax_data, softmax_model, steps

DATA = softmax_data()
N = DATA.num_clients


def draw(sampler, count=4000):
    state = sampler.init(DATA)
    keys = jax.random.split(jax.random.key(0), count)
    return jax.jit(jax.vmap(lambda k: sampler.sample(state, k, DATA, None)[:2]))(keys)


def test_uniform_draws_distinct_clients_equally_often():
    ids, present = draw(fl.uniform(3))
    assert present.all()
    assert all(len(set(row)) == 3 for row in np.asarray(ids).tolist())
    counts = np.bincount(np.asarray(ids).ravel(), minlength=N)
    # Draws within a cohort exclude each other, which only makes the counts more even than independent ones.
    assert stats.chisquare(counts).pvalue > 1e-4
    pairs = np.zeros((N, N))
    np.add.at(pairs, (np.asarray(ids)[:, 0], np.asarray(ids)[:, 1]), 1)
    assert stats.chisquare(pairs[~np.eye(N, dtype=bool)]).pvalue > 1e-4


def test_fixed_takes_positions_or_ids_that_are_text():
    pandas = np.array(["c3", "c0"], object)
    for clients in ([3, 0], np.array([3, 0]), ["c3", "c0"], np.array(["c3", "c0"]), pandas, DATA.ids[3::-3]):
        sampler = fl.fixed(clients)
        sampler.init(DATA)
        ids, present, _ = jax.jit(lambda data, s=sampler: s.sample((), None, data, None))(DATA)
        assert (ids.tolist(), present.all()) == ([3, 0], True)


@pytest.mark.parametrize(
    ("clients", "words"),
    [(["c3", "c33"], "no client 'c33' among .*did you mean 'c3'"), (["c1", "c1"], "'c1' occurs more than once")],
)
def test_ids_that_nobody_has_or_twice(clients, words):
    with pytest.raises(ValueError, match=words):
        fl.fixed(clients).init(DATA)


def test_text_for_ids_that_are_numbers():
    data = fl.FederatedData.from_clients({10 + k: {"x": np.ones((1, 2))} for k in range(3)})
    with pytest.raises(ValueError, match=r"no client '10' among 3; did you mean 10\?"):
        fl.fixed(["10"]).init(data)


def test_weighted_draws_the_first_by_weight():
    ids, _ = draw(fl.weighted(1))
    expected = np.asarray(DATA.sizes) / DATA.sizes.sum() * len(ids)
    assert stats.chisquare(np.bincount(np.asarray(ids).ravel(), minlength=N), expected).pvalue > 1e-4
    some = np.array([0, 1, 0, 2, 0, 0, 0, 0.0])
    ids, _ = draw(fl.weighted(2, some), 50)
    assert set(np.asarray(ids).ravel().tolist()) == {1, 3}


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_dropout_keeps_the_cohort_and_drops_at_the_rate(rate):
    ids, present = draw(fl.dropout(fl.uniform(3), rate))
    np.testing.assert_array_equal(ids, draw(fl.uniform(3))[0])
    lost = 1 - np.asarray(present).mean()
    assert abs(lost - rate) < 4 * np.sqrt(rate * (1 - rate) / present.size) + 1e-9


def test_the_clients_dropped_are_the_ones_that_do_partial_work():
    fraction, env_key = 0.5, jax.random.key(3)
    _, present, _ = fl.drop_stragglers(fl.everyone(), fraction).sample((), env_key, DATA, None)
    work = fl.partial_work(20, fraction)
    env = fl.cohort.make_env(jnp.int32(0), env_key, jnp.arange(N), jnp.ones(N, bool), N)
    data = DATA.on_device()
    epochs = np.array([work(data.view(jnp.int32(k), env), jax.random.key(k)) for k in range(N)])
    np.testing.assert_array_equal(np.asarray(present), epochs == 20)
    assert ((epochs >= 1) & (epochs <= 20)).all()
    assert 0 < present.sum() < N


def test_a_sampler_may_ask_for_losses_and_pays_for_it():
    """Power-of-choice in its shortest form: the clients of the highest loss among candidates."""

    def sample(state, key, data, probe):
        candidates, _, _ = fl.uniform(6).sample((), key, data, probe)
        losses = probe(candidates)
        return candidates[jax.lax.top_k(losses, 2)[1]], jnp.ones(2, bool), (candidates, losses)

    start = (jnp.zeros(6, jnp.int32), jnp.zeros(6))
    model = softmax_model()
    process = fl.synchronous(fedavg(model, optax.sgd(0.1)), DATA, fl.Sampler(lambda data: start, sample))
    before = process.init(jax.random.key(0))
    after, metrics = process.step(before, process.data)
    candidates, losses = after.sampler
    own = fl.client_metrics(DATA)(process, before).values["loss"]
    np.testing.assert_allclose(losses, own[np.asarray(candidates)], rtol=1e-5)
    size = (4 * 3 + 3) * 4
    assert fl.total_bytes(metrics["probe_downlink_bytes"]) == 6 * size
    assert fl.total_bytes(metrics["probe_uplink_bytes"]) == 6 * 4


def test_a_sampler_learns_from_the_round():
    """``update`` sees each slot's client, whether it survived, and its metrics."""
    start = jnp.full(N, -1.0)

    def update(state, ids, ok, metrics):
        return state.at[ids].set(jnp.where(ok, metrics["loss"], -2.0))

    sampler = fl.dropout(fl.uniform(4), 0.5)
    learning = fl.Sampler(lambda data: start, sampler.sample, update)
    process = fl.synchronous(fedavg(softmax_model(), optax.sgd(0.1)), DATA, learning, lanes=2)
    state, metrics = steps(process, 1)
    seen = np.asarray(state.sampler)
    assert (seen > 0).sum() == int(metrics["survivors"])
    assert (seen == -2).sum() == 4 - int(metrics["survivors"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fl.uniform(0), "cohort_size must be positive"),
        (lambda: fl.uniform(2.5), "cohort_size must be a positive integer"),
        (lambda: fl.uniform(9).init(DATA), "cohort_size 9 is larger than the population of 8"),
        (lambda: fl.weighted(3, np.ones(5)).init(DATA), "8 non-negative numbers"),
        (lambda: fl.weighted(3, np.eye(8)[0]).init(DATA), "exceeds the 1 clients"),
        (lambda: fl.dropout(fl.uniform(1), 1.5), "between 0 and 1"),
        (lambda: fl.drop_stragglers(fl.uniform(1), -0.1), "at least 0"),
        (lambda: fl.partial_work(1, 0.5), "at least 2 epochs"),
    ],
)
def test_what_samplers_refuse(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_weights_are_the_sizes_by_default():
    """Of two clients with 1 and 9 examples the second is drawn in nine rounds of ten, within 4 standard errors."""
    rows = lambda n: {"x": np.zeros((n, 4), np.float32), "y": np.zeros(n, np.int32)}
    data = fl.FederatedData.from_clients({0: rows(1), 1: rows(9)})
    process = fl.synchronous(fedavg(softmax_model(), optax.sgd(0.1), steps=1), data, fl.weighted(1))
    body = lambda state, _: process.step(state, process.data)
    _, metrics = jax.jit(lambda s: jax.lax.scan(body, s, length=400))(process.init(jax.random.key(0)))
    again = [fl.weighted(1).sample((), key, data, None)[0][0] for key in jax.random.split(jax.random.key(1), 400)]
    assert metrics["invited"].tolist() == [1] * 400
    assert np.mean(again) == pytest.approx(0.9, abs=4 * 0.3 / 20)
