"""Uploads of which only sums may be looked at, aggregators of other kinds, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from fedjax_lab import wire
from tests.problems import assert_close, softmax_data, steps
from tests.refusals import raises
from tests.wire.test_uplink import SIZE, base, doctored, final


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("links", [(), (wire.hadamard(),)], ids=["plain", "rotated"])
def test_fixed_point_sums_are_the_plain_mean(weighting, links):
    """To the step: 9 clients with entries up to 4 in 32 bits."""
    round = base(weighting=weighting)
    process, state, _ = final(round)
    fixed = wire.fixed_point(limit=4.0, clients=9)
    most = 30 if weighting == "examples" else 1
    other, summed, metrics = final(fl.compose(round, fl.uplink(*links, fixed, max_weight=most)), lanes=2)
    assert_close(other.params(summed), process.params(state), atol=2e-6)
    width = 16 if links else SIZE
    assert fl.total_bytes(metrics["uplink_bytes"]) == 5 * 4 * (width + 1)  # the weight travels under the same cover


def test_weights_above_the_largest_are_cut_to_it():
    cut = np.minimum(np.asarray(softmax_data(empty=1).sizes), 10).astype(np.float32)
    process, state, _ = final(base(weighting=np.maximum(cut, 1e-9)))
    fixed = wire.fixed_point(limit=4.0, clients=9)
    other, summed, _ = final(fl.compose(base(), fl.uplink(fixed, max_weight=10)))
    assert_close(other.params(summed), process.params(state), atol=2e-6)


def test_what_does_not_fit_the_fixed_point_counts_as_absent():
    fixed = wire.fixed_point(limit=1.0, clients=9)
    data, everyone = softmax_data(), fl.everyone()
    big = fl.compose(doctored(base(weighting="uniform"), poison=(2, 7.0)), fl.uplink(fixed, max_weight=1))
    process = fl.synchronous(big, data, everyone)
    _, metrics = steps(process, 1)
    assert (int(metrics["non_finite"]), int(metrics["survivors"])) == (1, data.num_clients - 1)


def test_central_noise_with_fixed_denominators():
    """The sum of clipped updates over the expected number of clients, and noise of that scale."""
    data, everyone = softmax_data(), fl.everyone()
    round = base(weighting="uniform")
    norm, expected = 0.05, 10.0
    make = lambda z: fl.uplink(wire.clip(norm), wire.gaussian(z), max_weight=1, denominators=expected)
    exact = fl.synchronous(fl.compose(round, make(0.0)), data, everyone)
    start = exact.params(exact.init(jax.random.key(0)))
    quiet = exact.params(steps(exact, 1)[0])
    moved = jax.tree.map(lambda a, b: a - b, quiet, start)
    assert float(optax.tree.norm(moved)) <= norm * data.num_clients / expected * (1 + 1e-6)
    noisy = fl.synchronous(fl.compose(round, make(2.0)), data, everyone)
    steps_ = jax.jit(jax.vmap(lambda k: noisy.params(noisy.step(noisy.init(k, start), noisy.data)[0])))
    base_ = jax.jit(jax.vmap(lambda k: exact.params(exact.step(exact.init(k, start), exact.data)[0])))
    keys = jax.random.split(jax.random.key(1), 300)
    noise = jax.tree.map(lambda a, b: np.asarray(a - b).ravel(), steps_(keys), base_(keys))
    got = np.concatenate(jax.tree.leaves(noise)).std()
    # 4,500 draws: 5% are nearly five standard errors.
    assert abs(got / (2.0 * norm / expected) - 1) < 0.05


# ---- what is refused ----


def median():
    """An aggregator that looks at each upload."""
    inner = fl.aggregators.mean()

    def reduce(uploads, weights, ok, messages, env):
        return jax.tree.map(
            lambda u: jnp.nanmedian(jnp.where(ok.reshape(-1, *[1] * (u.ndim - 1)), u, jnp.nan), 0), uploads
        )

    return inner._replace(reduce=reduce)


def test_an_aggregator_that_sees_every_upload_gets_it_opened():
    data, everyone = softmax_data(), fl.everyone()
    robust = base()._replace(aggregate=median())
    process = fl.synchronous(robust, data, everyone)
    for link in (wire.top_k(SIZE), wire.hadamard()):
        other = fl.synchronous(fl.compose(robust, fl.uplink(link)), data, everyone)
        assert_close(other.params(steps(other, 2)[0]), process.params(steps(process, 2)[0]), atol=2e-6)
    for link in (wire.majority_vote(0.1), wire.power_sgd(1)):
        raises(lambda k=link: fl.synchronous(fl.compose(robust, fl.uplink(k)), data), link.name, "each client's upload")
    fixed = fl.uplink(wire.fixed_point(limit=1.0, clients=9), max_weight=1)
    raises(lambda: fl.compose(robust, fixed), "fixed_point gives sums only")


def parts_weighted_differently():
    inner = fl.aggregators.mean()

    return inner._replace(lift=lambda upload, weight, m, env: inner.lift(fl.Variables(*upload), weight, m, env))


def test_an_aggregator_that_takes_uploads_apart_gets_them_opened_each():
    """Such as SCAFFOLD's pair of means: still right, but links that work on sums are refused."""
    picky = base()._replace(aggregate=parts_weighted_differently())
    plain, expected, _ = final(base())
    process, state, _ = final(fl.compose(picky, fl.uplink(wire.hadamard())))
    assert_close(process.params(state), plain.params(expected), atol=2e-6)
    vote = fl.compose(picky, fl.uplink(wire.majority_vote(0.1)))
    raises(lambda: fl.synchronous(vote, softmax_data()), "majority_vote needs an aggregator", "parts of an upload")


def test_arguments_that_make_no_sense_are_refused_when_the_round_is_built():
    fixed, noise = wire.fixed_point(limit=1.0, clients=9), wire.chain(wire.clip(1.0), wire.gaussian(1.0))
    for make, words in (
        (lambda: fl.uplink(fixed), ("fixed_point must be summed", "max_weight")),
        (lambda: fl.uplink(noise, max_weight=1), ("noise", "denominators")),
        (lambda: fl.uplink(noise, fixed, max_weight=1), ("denominators",)),
        (lambda: fl.uplink(fixed, max_weight=0), ("max_weight", "positive")),
        (lambda: fl.uplink(noise, max_weight=1, denominators=-1), ("denominators", "positive")),
        (lambda: fl.uplink(wire.top_k(3), max_weight=1), ("max_weight is for links that must be summed", "top_k")),
        (lambda: fl.uplink(wire.top_k), ("call it",)),
        (lambda: fl.uplink(0.1), ("made of links",)),
    ):
        raises(make, *words)


def test_what_depends_on_shapes_is_refused_when_the_process_is_built():
    data = softmax_data()
    build = lambda *links, **options: fl.synchronous(fl.compose(base(), fl.uplink(*links, **options)), data)
    raises(lambda: build(wire.top_k(16)), "top_k was asked for 16 entries", "has 15")
    raises(lambda: build(wire.split({"conv": wire.top_k(2)})), "no parameter's name has 'conv'", "params/w")
    raises(lambda: build(wire.fixed_point(limit=1.0, clients=4), max_weight=1), "sums of 4 clients", "cohort has 8")
