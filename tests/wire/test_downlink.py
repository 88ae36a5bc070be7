"""Broadcasts that go through a wire: references, first contacts, bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab import wire
from tests.compiling import compiled_once
from tests.problems import FEW_SHAPES, assert_close, assert_same_bits, softmax_data, softmax_model, steps
from tests.refusals import refused

MODEL, SGD = softmax_model(), optax.sgd(0.1)
SIZE = 4 * 3 + 3
WHOLE = 4 * SIZE


def base(**options):
    return fedavg(MODEL, SGD, **({"epochs": 1, "batch_size": 10} | options))


def test_identity_is_the_inner_round():
    inner = base()
    assert fl.compose(inner, fl.downlink()) is inner
    assert fl.compose(inner, fl.downlink(wire.top_k(1.0))) is inner


@pytest.mark.parametrize("deltas", [True, False])
def test_top_k_of_everything_is_the_inner_round(deltas):
    """Bit for bit without references; with them to the rounding of x = r + (x - r)."""
    data, cohort = softmax_data(), fl.uniform(5)
    a = fl.synchronous(base(), data, cohort)
    b = fl.synchronous(fl.compose(base(), fl.downlink(wire.top_k(SIZE), deltas=deltas)), data, cohort)
    one, two = a.params(steps(a, 3)[0]), b.params(steps(b, 3)[0])
    if deltas:
        assert_close(two, one, atol=1e-6)
    else:
        assert_same_bits(two, one)


def test_the_reference_is_what_the_client_really_has():
    """Both sides by hand: the server sends the largest 4 of 15 changes against what each client last acted on."""
    data, rounds = softmax_data(), 5
    seen = {}

    def spied(round):
        def client_update(message, state, client, key, tilt=fl.identity):
            out = round.client_update(message, state, client, key, tilt=tilt)
            return out._replace(metrics=out.metrics | {"w": message.params["w"][0, 0], "b": message.params["b"][1]})

        return round._replace(client_update=client_update)

    cohorts = [[1, 3], [2, 3], [1, 3], [1, 3], [2, 3]]  # 3 never answers

    def sample(state, key, population, probe):
        return jnp.array(cohorts)[state], jnp.array([True, False]), state

    sampler = fl.Sampler(lambda data: jnp.int32(0), sample, lambda state, ids, ok, metrics: state + 1)
    round = fl.compose(spied(base()), fl.downlink(wire.top_k(4)))
    process = fl.synchronous(round, data, sampler)
    state = process.init(jax.random.key(0))
    for r in range(rounds):
        start = np.concatenate([np.ravel(x) for x in jax.tree.leaves(process.params(state))])
        state, metrics = process.step(state, process.data)
        who = cohorts[r][0]
        first = who not in seen
        if first:
            seen[who] = start
        else:
            change = start - seen[who]
            keep = np.argsort(-np.abs(change), kind="stable")[:4]
            seen[who] = seen[who].copy()
            seen[who][keep] += change[keep]
        assert fl.total_bytes(metrics["downlink_bytes"]) == (WHOLE if first else 4 * 4 + 2) + WHOLE  # 3 never answered
        # Leaves in order: b, then w.
        np.testing.assert_allclose([metrics["b"], metrics["w"]], [seen[who][1], seen[who][3]], rtol=1e-6)
        reference = jax.tree.map(lambda t, k=who: t[k], process.clients(state).table.reference)
        np.testing.assert_allclose(
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(reference)]), seen[who], rtol=1e-6
        )
    assert not np.asarray(process.clients(state).known)[[0, 3]].any()


def test_what_is_lost_is_sent_later():
    """Nobody trains any more: after enough rounds of a few entries every client has the model."""
    data = softmax_data()
    still = fedavg(MODEL, optax.sgd(1e-30), server_optimizer=optax.sgd(1.0))
    process = fl.synchronous(fl.compose(still, fl.downlink(wire.top_k(4))), data)
    state, _ = steps(process, 1)
    moved = jax.tree.map(lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), process.params(state))
    server = state.server._replace(variables=fl.Variables(moved))
    state = state._replace(server=server)
    far = []
    for _ in range(4):
        state, _ = process.step(state, process.data)
        table = process.clients(state).table.reference.params
        far.append(
            max(float(jnp.abs(t - m[None]).max()) for t, m in zip(*map(jax.tree.leaves, (table, moved)), strict=True))
        )
    assert far[0] > 1
    assert far[-1] < 1e-5


def test_a_quantized_broadcast_keeps_nothing():
    data = softmax_data()
    process = fl.synchronous(fl.compose(base(), fl.downlink(wire.qsgd(8), deltas=False)), data)
    state, metrics = steps(process, 2)
    assert not jax.tree.leaves(process.clients(state).table)
    assert fl.total_bytes(metrics["downlink_bytes"]) == data.num_clients * (SIZE + 4)


def test_lengths_that_depend_on_the_data_are_counted():
    data = softmax_data()
    process = fl.synchronous(fl.compose(base(), fl.downlink(wire.qsgd(3), wire.elias())), data)
    state, first = steps(process, 1)
    _, second = process.step(state, process.data)
    assert fl.total_bytes(first["downlink_bytes"]) == data.num_clients * WHOLE
    assert data.num_clients * 6 <= fl.total_bytes(second["downlink_bytes"]) < data.num_clients * 12


@pytest.mark.slow
def test_both_directions_with_evaluation():
    """Messages travel inside others: lenses and personal models find what the client has."""
    data = softmax_data()
    round = fl.compose(base(), fl.downlink(wire.qsgd(6)), fl.uplink(wire.error_feedback(wire.top_k(0.3))))
    other = fl.compose(base(), fl.uplink(wire.error_feedback(wire.top_k(0.3))), fl.downlink(wire.qsgd(6)))
    for r in (round, other):
        process = fl.synchronous(r, data, fl.uniform(5), lanes=2)
        with compiled_once():
            state, metrics = steps(process, 3)
        assert np.isfinite(metrics["loss"])
        report = fl.per_client_accuracy(data)(process, state)
        assert 0 < report["accuracy"] <= 1
    # A tilt outside of the wire pulls towards what the client received.
    pulled = fl.compose(round, fl.transforms.proximal(5.0))
    process = fl.synchronous(pulled, data)
    free = fl.synchronous(round, data)
    start = process.params(process.init(jax.random.key(0)))
    far = lambda p: float(optax.tree.norm(jax.tree.map(lambda a, b: a - b, p.params(steps(p, 1)[0]), start)))
    assert far(process) < 0.9 * far(free)


def test_the_engine_agrees_with_the_slow_twin():
    round = fl.compose(base(), fl.downlink(wire.hadamard(), wire.quantize(6)))
    data = softmax_data(FEW_SHAPES, empty=1)
    process = fl.synchronous(round, data, fl.uniform(5), lanes=2)
    state, _ = steps(process, 3)
    slow = fl.oracle_run(round, data, fl.uniform(5), num_rounds=3)
    assert_close(process.server(state), slow.server, atol=3e-6, rtol=1e-5)


def test_links_that_make_no_sense_on_the_way_down_are_refused_when_built():
    for link, words in (
        (wire.error_feedback(wire.top_k(2)), ("remembers what it lost", "Give the link alone")),
        (wire.momentum_correction(wire.top_k(2)), ("remembers",)),
        (wire.fixed_point(limit=1.0, clients=2), ("fixed_point works on sums",)),
        (wire.majority_vote(0.1), ("majority_vote works on sums",)),
        (wire.power_sgd(2), ("power_sgd works on sums",)),
        (wire.chain(wire.clip(1.0), wire.gaussian(1.0, by="client")), ("noise on a broadcast",)),
    ):
        refused(lambda k=link: fl.downlink(k), *words)


ENV = fl.Env(3, jax.random.key(0), jnp.arange(2), jnp.ones(2, bool), jnp.ones(2, bool), 8, 2)
POWER = fl.uplink(wire.error_feedback(wire.power_sgd(1)))


@pytest.mark.parametrize("down", [fl.downlink(wire.top_k(2)), fl.downlink(wire.quantize(4), deltas=False)])
def test_what_undoes_an_upload_arrives_as_it_is(down):
    """Of PowerSGD's basis clients and server must have the same, whatever the model goes through."""
    process = fl.synchronous(fl.compose(base(steps=1, epochs=None, batch_size=None), POWER, down), softmax_data())
    state, _ = steps(process, 3)
    own, client = jax.tree.map(lambda t: t[0], process.clients(state).table), process.data.view(jnp.int32(0), ENV)
    sent = process.round.broadcast(process.server(state), own, client, jax.random.key(0)).content
    assert_same_bits(sent.wire.content, process.server(state).wire)
    assert np.abs(sent.inner.params["w"] - process.params(state)["w"]).max() > 1e-4


def test_a_basis_costs_what_travels_of_it():
    """Of a 4 x 3 matrix: 3 numbers on even turns, 4 on odd ones, and which it is."""
    process = fl.synchronous(fl.compose(base(), POWER), softmax_data(), fl.uniform(5))
    state, down = process.init(jax.random.key(0)), []
    for _ in range(4):
        state, metrics = process.step(state, process.data)
        down.append(fl.total_bytes(metrics["downlink_bytes"]) / 5)
    assert down == [WHOLE + 4 * 3 + 1, WHOLE + 4 * 4 + 1] * 2
