"""What travels in some rounds only: it is encoded by itself, costs bytes only then, and is remembered only then."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.feddane import feddane
from algorithms.mime import mime
from fedjax_lab import wire
from fedjax_lab.round import ClientOutput, Sometimes, upload_bytes
from fedjax_lab.transforms import partial_averaging, periods, private
from fedjax_lab.wire.sometimes import by_occasion
from tests.problems import assert_close, assert_same_bits, softmax_data, softmax_model

MODEL = softmax_model()
W, B = 4 * 12, 4 * 3  # bytes of the leaves
BOTH = fl.repeated(fl.fixed([0, 3]))


def dane():
    return feddane(MODEL, optax.sgd(0.1), mu=0.1, steps=2, batch_size=None)


def ran(round, rounds=4, sampler=BOTH):
    """The process, its last state, and each client's bytes up and down in every round."""
    process = fl.synchronous(round, softmax_data(), sampler)
    state, sent = process.init(jax.random.key(0)), []
    for _ in range(rounds):
        state, metrics = process.step(state, process.data)
        sent.append(tuple(fl.total_bytes(metrics[f"{way}_bytes"]) / 2 for way in ("uplink", "downlink")))
    return process, state, sent


@pytest.fixture(scope="module")
def plain():
    process, state, _ = ran(dane())
    return process.params(state)


# ---- rounds in pairs ----


def test_rounds_in_pairs_send_a_gradient_up_and_then_down():
    assert ran(dane())[2] == [(W + B, W + B), (W + B, 2 * (W + B))] * 2
    base = mime(MODEL, optax.sgd(0.1, momentum=0.9), steps=2, batch_size=None)
    momentum = W + B
    assert ran(base)[2] == [(W + B, W + B), (W + B, 2 * (W + B) + momentum)] * 2


def test_a_link_is_charged_for_the_part_that_travels_in_that_round(plain):
    one = lambda link: int(wire.round_trip(link, fl.Variables({"w": jnp.ones((4, 3)), "b": jnp.ones(3)}, {}))[1])
    link = wire.top_k(2)
    _, _, sent = ran(fl.compose(dane(), fl.uplink(link)))
    assert [up for up, _ in sent] == [one(link)] * 4
    everything = fl.compose(dane(), fl.uplink(wire.top_k(15)))
    process, state, _ = ran(everything)
    assert_close(process.params(state), plain, atol=1e-6)


def test_memories_move_only_with_what_travels():
    process = fl.synchronous(fl.compose(dane(), fl.uplink(wire.error_feedback(wire.top_k(2)))), softmax_data(), BOTH)
    state, seen = process.init(jax.random.key(0)), []
    for _ in range(4):
        state, _ = process.step(state, process.data)
        update, gradient = process.clients(state).table.wire
        seen.append([np.asarray(jax.flatten_util.ravel_pytree(part.memory)[0]) for part in (update, gradient)])
    updates, gradients = zip(*seen, strict=True)
    assert not updates[0].any() and updates[1].any() and gradients[0].any()
    assert_same_bits((updates[2], gradients[1]), (updates[1], gradients[0]))
    assert np.abs(gradients[2] - gradients[1]).max() > 1e-6


def test_the_way_down_tells_a_client_the_gradient_when_it_travels(plain):
    for deltas in (True, False):
        link = fl.downlink(wire.top_k(15), deltas=deltas)
        process, state, sent = ran(fl.compose(dane(), link))
        assert_close(process.params(state), plain, atol=1e-6)
        alone = int(wire.round_trip(wire.top_k(15), fl.Variables({"w": jnp.ones((4, 3)), "b": jnp.ones(3)}, {}))[1])
        first = W + B if deltas else alone
        assert [down for _, down in sent] == [first, 2 * alone, alone, 2 * alone]


def test_what_a_client_last_saw_is_not_what_was_never_sent():
    """After the first round, in which no gradient goes down, the reference holds none."""
    process, state, _ = ran(fl.compose(dane(), fl.downlink(wire.top_k(2))), rounds=3)
    seen = process.clients(state).table.reference.gradient.content
    assert np.abs(seen["w"]).max() > 0
    process, state, _ = ran(fl.compose(dane(), fl.downlink(wire.top_k(2))), rounds=1)
    assert not np.any(process.clients(state).table.reference.gradient.content["w"])


def test_a_private_leafs_gradient_costs_nothing_either():
    _, _, sent = ran(fl.compose(dane(), private(lambda path: path.endswith("/b"))))
    assert sent == [(W, W), (W, 2 * W)] * 2


# ---- leaves ----


def test_averaged_leaves_are_encoded_one_by_one():
    transforms = (partial_averaging(periods({"params/b": 2})), fl.uplink(wire.error_feedback(wire.top_k(1))))
    process = fl.synchronous(fl.compose(fedavg(MODEL, optax.sgd(0.1)), *transforms), softmax_data(), fl.fixed([0, 3]))
    state, sent, memories = process.init(jax.random.key(0)), [], []
    for _ in range(4):
        state, metrics = process.step(state, process.data)
        sent.append(fl.total_bytes(metrics["uplink_bytes"]) // 2)
        memories.append([np.asarray(part.memory) for part in process.clients(state).table.wire])
    one = lambda *shape: int(wire.round_trip(wire.top_k(1), jnp.ones(shape))[1])
    assert sent == [one(4, 3), one(4, 3) + one(3)] * 2
    of_b = [part for memory in memories for part in memory if part.shape[1:] == (3,)]
    assert not of_b[0].any() and of_b[1].any()
    assert_same_bits(of_b[2], of_b[1])


def test_a_lossless_link_changes_nothing_of_partial_averaging():
    half = fl.compose(fedavg(MODEL, optax.sgd(0.1)), partial_averaging(periods({"params/b": 2})))
    process, state, _ = ran(half, sampler=fl.fixed([0, 3]))
    sparse, other, _ = ran(fl.compose(half, fl.uplink(wire.clip(1e6))), sampler=fl.fixed([0, 3]))
    assert_close(sparse.params(other), process.params(state), atol=1e-6)


def test_the_way_down_is_charged_for_the_leaves_that_are_new():
    half = fl.compose(fedavg(MODEL, optax.sgd(0.1)), partial_averaging(periods({"params/b": 2})))
    process, state, _ = ran(half, sampler=fl.fixed([0, 3]))
    versions, pairs = 2 * 4, lambda *shape: int(wire.round_trip(wire.top_k(1.0), jnp.ones(shape))[1])
    for deltas in (True, False):
        link = fl.downlink(wire.top_k(1.0), deltas=deltas)
        other, end, sent = ran(fl.compose(half, link), sampler=fl.fixed([0, 3]))
        assert_close(other.params(end), process.params(state), atol=1e-6)
        w, b = pairs(4, 3), pairs(3)
        first = W + B if deltas else w + b  # at first contact all of it, as it is
        assert [down - versions for _, down in sent] == [first, w, w + b, w]


# ---- by itself ----


def tree(there, seed=0):
    x = jnp.asarray(np.random.default_rng(seed).standard_normal(40), jnp.float32)
    return {"a": x[:20], "b": Sometimes({"c": x[20:30], "d": x[30:]}, jnp.asarray(there))}


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(
    "link", [wire.qsgd(4), wire.chain(wire.hadamard(), wire.top_k(0.3)), wire.chain(wire.qsgd(2), wire.elias())]
)
def test_a_payload_is_as_long_as_its_bytes_and_can_be_read_back(link, there):
    link, x = by_occasion(link), tree(there)
    ctx = wire.context(0)
    payload, _, size = link.encode(x, (), ctx)
    data, template = wire.serialize(payload), link.encode(tree(there, seed=1), (), ctx)[0]
    assert len(data) == int(size) == int(wire.length(payload))
    again = wire.deserialize(data, template)
    got = link.decode(link.open(again, ctx), ctx)[0]
    assert_same_bits(got, link.decode(link.open(payload, ctx), ctx)[0])
    assert bool(np.any(got["b"].content["c"])) == there
    alone = link.encode([x["a"]], (), ctx.part(0))[2]
    assert (int(alone) < int(size)) == there


@pytest.mark.parametrize("link", [wire.majority_vote(0.1), wire.fetch_sgd(3, width=20, k=4)])
def test_links_that_work_on_sums_are_refused(link):
    with pytest.raises(ValueError, match=r"works on sums|needs an aggregator"):
        fl.synchronous(fl.compose(dane(), fl.uplink(link)), softmax_data(), BOTH)


def test_parts_of_another_shape_than_the_upload_are_refused():
    upload = {"a": jnp.ones(3), "b": jnp.ones(2)}
    output = ClientOutput(upload, 1.0, parts={"a": jnp.bool_(True), "b": jnp.bool_(False)})
    assert int(upload_bytes(output)) == 12
    with pytest.raises(ValueError, match=r"ClientOutput\.parts must have the structure of the upload"):
        upload_bytes(output._replace(parts={"a": jnp.bool_(True)}))
