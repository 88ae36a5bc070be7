"""Rounds whose uploads go through a wire: laws, bytes, states, and who counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab import wire
from tests.compiling import compiled_once
from tests.laws.table import ALGORITHMS
from tests.problems import (
    FEW_SHAPES,
    assert_close,
    assert_same_bits,
    assert_seeds_vmap,
    softmax_data,
    softmax_model,
    steps,
)

MODEL, SGD = softmax_model(), optax.sgd(0.1)
SIZE = 4 * 3 + 3
COHORT = fl.uniform(5)


def base(**options):
    return fedavg(MODEL, SGD, **({"epochs": 1, "batch_size": 10} | options))


def final(round, rounds=3, sampler=COHORT, data=None, **options):
    process = fl.synchronous(round, data or softmax_data(empty=1), sampler, **options)
    state, metrics = steps(process, rounds)
    return process, state, metrics


@pytest.fixture(scope="module")
def plain():
    process, state, _ = final(base())
    return process.params(state)


def test_identity_and_top_k_of_everything_are_the_inner_round(plain):
    inner = base()
    for link in (wire.identity(), wire.top_k(1.0), wire.chain(wire.identity(), wire.random_k(1.0))):
        assert fl.compose(inner, fl.uplink(link)) is inner
    assert fl.compose(inner, fl.uplink()) is inner
    process, state, _ = final(fl.compose(inner, fl.uplink(wire.top_k(SIZE))))
    assert_same_bits(process.params(state), plain)


@pytest.mark.parametrize(
    "link",
    [
        wire.clip(1e6),
        wire.hadamard(),
        wire.kashin(),
        wire.chain(wire.hadamard(), wire.kashin()),
        wire.count_sketch(5, width=4096),
        wire.grouped(wire.hadamard(), count=2),
    ],
    ids=lambda link: link.name,
)
def test_what_loses_nothing_changes_nothing(plain, link):
    process, state, _ = final(fl.compose(base(), fl.uplink(link)))
    assert_close(process.params(state), plain, atol=2e-6)


def test_ef21_of_everything_and_everyone_is_the_inner_round():
    data, round = softmax_data(), base(weighting="uniform")
    link = wire.error_feedback(wire.top_k(SIZE), "ef21")
    process, other = (fl.synchronous(r, data) for r in (round, fl.compose(round, fl.uplink(link))))
    assert_close(other.params(steps(other, 3)[0]), process.params(steps(process, 3)[0]), atol=2e-6)


LINKS = {
    "sparse": wire.chain(wire.error_feedback(wire.top_k(0.3)), wire.quantize(8)),
    "coded": wire.error_feedback(wire.chain(wire.top_k(0.3), wire.qsgd(6), wire.elias())),
    "summed": wire.chain(wire.hadamard(), wire.random_k(0.5), wire.quantize(6)),
    "own rotation": wire.eden(3),
    "low rank": wire.error_feedback(wire.power_sgd(1)),
    "sketch": wire.fetch_sgd(3, width=32, k=5),
    "vote": wire.majority_vote(0.01),
    "changes": wire.error_feedback(wire.top_k(4), "ef21"),
}


SLOW = ("coded", "own rotation", "vote", "changes")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LINKS])
def test_the_engine_agrees_with_the_slow_twin(name):
    """Parameters, memories and bytes of three rounds; one compilation; the state keeps its shapes and types."""
    round, data = fl.compose(base(), fl.uplink(LINKS[name])), softmax_data(FEW_SHAPES, empty=1)
    with compiled_once():
        process, state, metrics = final(round, data=data, lanes=2)
    slow = fl.oracle_run(round, data, COHORT, num_rounds=3)
    assert_close(process.server(state), slow.server, atol=3e-6, rtol=1e-5)
    for k, expected in slow.clients.items():
        assert_close(jax.tree.map(lambda t, k=k: t[k], process.clients(state).table), expected, atol=3e-6, rtol=1e-5)
    assert fl.total_bytes(metrics["uplink_bytes"]) == slow.metrics[-1]["uplink_bytes"]
    assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, process.init(jax.random.key(1)))


FAST = ("fedavg_adam_kept", "fedadam", "scaffold")
KEEP_SOME = ("lag_wk", "lag_ps", "cmfl")  # clients may keep an upload, of 13 bytes, to themselves
BY_LEAF = ("partial_averaging",)  # one leaf in rounds 0 and 2, both in round 1
MOVING = ("federated_dropout",)  # what error feedback remembers belongs to other entries in the next round


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ALGORITHMS if n not in MOVING]
)
def test_every_algorithm_goes_through_the_wire(name):
    """Rounds scanned in one program: finite, and all uploads of the length that the links have."""
    link = wire.chain(wire.error_feedback(wire.top_k(0.2)), wire.quantize(8))
    round = fl.compose(ALGORITHMS[name].make(), fl.uplink(link))
    process = fl.synchronous(round, softmax_data(), COHORT)
    body = lambda state, _: process.step(state, process.data)
    state, metrics = jax.jit(lambda s: jax.lax.scan(body, s, length=3))(process.init(jax.random.key(0)))
    assert np.isfinite(metrics["loss"]).all()
    sizes = {fl.total_bytes(b) for b in np.asarray(metrics["uplink_bytes"])}
    assert sizes <= {13 * n for n in range(6)} if name in KEEP_SOME else len(sizes) == 1 + (name in BY_LEAF)
    assert all(np.isfinite(x).all() for x in map(np.asarray, jax.tree.leaves(process.params(state))))


def test_bytes_are_those_of_the_payloads():
    """By hand: 3 values and 3 positions of 4 bits; 15 codes of 4 bits and a norm; and so on."""
    upload = jax.eval_shape(lambda: fl.Variables(*MODEL.init(jax.random.key(0))))
    for link, each in (
        (wire.top_k(3), 3 * 4 + 2),
        (wire.random_k(3), 3 * 4),
        (wire.rand_mask(3), 3 * 4 + 4),
        (wire.qsgd(4), 8 + 4),
        (wire.chain(wire.top_k(3), wire.quantize(8)), 3 + 8 + 2),
        (wire.sign(), 2 + 4),
        (wire.count_sketch(3, width=4), 3 * 4 * 4),
    ):
        assert wire.length(jax.eval_shape(lambda x, k=link: k.encode(x, (), wire.context(0))[0], upload)) == each, (
            link.name
        )
    _, _, metrics = final(fl.compose(base(), fl.uplink(wire.top_k(3))), rounds=1)
    assert fl.total_bytes(metrics["uplink_bytes"]) == 5 * (3 * 4 + 2)


@pytest.mark.slow
def test_many_seeds_and_learning_rates_at_once():
    """A vmapped process: each cell is its own run."""
    link = wire.chain(wire.error_feedback(wire.top_k(0.3)), wire.qsgd(6))
    process = fl.synchronous(fl.compose(base(), fl.uplink(link)), softmax_data(), COHORT)
    assert_seeds_vmap(process)


@pytest.mark.slow
def test_cells_of_a_sweep_over_clip_norms_are_their_own_runs():
    data = softmax_data()

    def make(max_norm):
        return fl.synchronous(fl.compose(base(), fl.uplink(wire.clip(max_norm))), data, COHORT)

    many = fl.sweep(make, 2, seeds=[3], max_norm=[0.05, 0.2])
    for i, max_norm in enumerate((0.05, 0.2)):
        alone = fl.run(make(max_norm), 2, seed=3, progress=False)
        assert_close(jax.tree.map(lambda x, i=i: x[i, 0], many.params), alone.params, atol=2e-6)


# ---- who counts ----


def doctored(round, poison=None, silent=None, weightless=None):
    """The round, with one client's upload poisoned, kept back, or of no weight."""

    def client_update(message, state, client, key, tilt=fl.identity):
        out = round.client_update(message, state, client, key, tilt=tilt)
        upload = out.upload
        if poison is not None:
            hit = lambda u: u.at[(0,) * u.ndim].set(jnp.where(client.id == poison[0], poison[1], u[(0,) * u.ndim]))
            upload = jax.tree.map(hit, upload)
        sent = jnp.bool_(True) if silent is None else client.id != silent
        weight = out.weight if weightless is None else jnp.where(client.id == weightless, 0, out.weight)
        return out._replace(upload=upload, sent=sent, weight=weight)

    return round._replace(client_update=client_update)


@pytest.mark.parametrize(
    ("link", "value"),
    [
        (wire.random_k(3), np.nan),
        (wire.sign(0.1), np.inf),
        (wire.error_feedback(wire.chain(wire.top_k(3), wire.qsgd(4))), 1e38),
        (wire.majority_vote(0.1), -np.inf),
    ],
    ids=["random_k", "sign", "memory", "vote"],
)
def test_an_upload_that_is_not_finite_counts_as_absent(link, value):
    """Also where the link would hide it: signs, and entries that are not drawn."""
    data, everyone, villain = softmax_data(), fl.everyone(), 2
    make = lambda **how: fl.compose(doctored(base(), **how), fl.uplink(link))
    bad = fl.synchronous(make(poison=(villain, value)), data, everyone)
    absent = fl.synchronous(make(weightless=villain), data, everyone)
    (harmed, metrics), (spared, _) = steps(bad, 1), steps(absent, 1)
    assert_same_bits(bad.server(harmed), absent.server(spared))
    assert (int(metrics["non_finite"]), int(metrics["survivors"])) == (1, data.num_clients - 1)
    for leaf in jax.tree.leaves(bad.clients(harmed).table):
        assert not np.asarray(leaf[villain]).any()  # never written


@pytest.mark.parametrize("how", ["silent", "weightless"])
def test_a_client_whose_upload_does_not_count_keeps_its_memory(how):
    """It lost nothing on the way, so there is nothing to make up for, and nothing is forgotten."""
    data, link = softmax_data(), wire.error_feedback(wire.top_k(3))
    quiet = doctored(base(), **{how: 2})
    memory_of = lambda process, state: jax.tree.map(
        lambda t: np.asarray(t[2]), process.clients(state).table.wire.memory
    )
    loud = fl.synchronous(fl.compose(base(), fl.uplink(link)), data)
    after, _ = steps(loud, 1)
    process = fl.synchronous(fl.compose(quiet, fl.uplink(link)), data)
    state = process.init(jax.random.key(0))._replace(clients=after.clients)
    before = memory_of(process, state)
    assert any(np.abs(m).max() > 0 for m in jax.tree.leaves(before))
    state, _ = process.step(state, process.data)
    assert_same_bits(memory_of(process, state), before)


# ---- memories survive ----


def test_stopping_and_going_on_gives_the_same_bits(tmp_path):
    """Memories of clients and server, and references, are part of the state: 2 + 2 rounds are 4."""
    links = wire.error_feedback(wire.chain(wire.power_sgd(1))), wire.identity()
    make = lambda: fl.synchronous(
        fl.compose(base(), fl.uplink(*links), fl.downlink(wire.qsgd(6))), softmax_data(), fl.uniform(5)
    )
    options = {"every": 2, "progress": False}
    whole = fl.run(make(), 4, **options)
    fl.run(make(), 2, out=tmp_path, **options)
    resumed = fl.run(make(), 4, out=tmp_path, **options)
    assert_same_bits(resumed.state, whole.state)
    assert resumed.uplink_bytes == whole.uplink_bytes == sum(r["uplink_bytes"] for r in whole.metrics)
    assert resumed.downlink_bytes == whole.downlink_bytes
