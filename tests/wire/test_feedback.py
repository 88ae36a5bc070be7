"""Memories: nothing is lost, only late; and what they rescue."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedsgd import fedsgd
from fedjax_lab import wire
from fedjax_lab.wire.base import shapes
from tests.problems import assert_close, steps
from tests.refusals import refused
from tests.wire.table import context, tree

LOSSY = {
    "top_k": wire.top_k(0.1),
    "random_k": wire.random_k(0.3, unbiased=False),
    "threshold": wire.threshold(0.8),
    "quantize": wire.quantize(3),
    "sign": wire.sign(),
    "one_bit": wire.one_bit(),
    "low_rank": wire.low_rank(2),
    "power_sgd": wire.power_sgd(2),
    "drive": wire.drive(unbiased=False),
    "chain": wire.chain(wire.top_k(0.2), wire.qsgd(6)),
    "by parameter": wire.grouped(wire.top_k(0.2)),
    "in blocks": wire.grouped(wire.sign(), size=100),
}


@pytest.mark.parametrize("name", LOSSY)
def test_error_feedback_telescopes(name):
    """What arrived and what is remembered is all that there was to send, after every round."""
    link, rounds = wire.error_feedback(LOSSY[name]), 12
    like = shapes(tree())

    def round(carry, r):
        (own, server, came, gone) = carry
        x = {"w": jax.random.normal(jax.random.key(r), (40, 30)), "b": jnp.ones(7) / (r + 1), "n": jnp.arange(3)}
        ctx = context(jax.random.key(100 + r), link.sends(server))
        payload, own, _ = link.encode(x, own, ctx)
        got, server = link.decode(link.open(payload, ctx), ctx._replace(state=server))
        add = lambda total, y: total + y if jnp.issubdtype(y.dtype, jnp.floating) else total
        carry = own, server, jax.tree.map(add, came, got), jax.tree.map(add, gone, x)
        left = jax.tree.map(lambda c, m, g: c + m - g if m.size else c * 0, carry[2], own.memory, carry[3])
        return carry, jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(left)])

    zeros = {"w": jnp.zeros((40, 30)), "b": jnp.zeros(7), "n": jnp.arange(3)}
    start = (link.init_client(like), link.init(like), zeros, zeros)
    (own, *_), left = jax.jit(lambda s: jax.lax.scan(round, s, jnp.arange(rounds)))(start)
    assert float(left.max()) < 1e-5
    assert float(jnp.abs(own.memory["w"]).max()) > 0.01  # something was lost on the way


def test_ef21_by_hand():
    """Two clients, the largest change of each: the server's estimate is the mean of the clients'."""
    link = wire.error_feedback(wire.top_k(1), "ef21")
    like = shapes(jnp.zeros(2))
    own, server = [link.init_client(like)] * 2, link.init(like)
    expected = [
        ([[3.0, 1.0], [2.0, -4.0]], [[3.0, 0.0], [0.0, -4.0]]),
        ([[3.5, 1.0], [2.0, -4.0]], [[3.0, 1.0], [2.0, -4.0]]),
        ([[3.5, 1.0], [0.0, 0.0]], [[3.5, 1.0], [2.0, 0.0]]),
    ]
    for xs, memories in expected:
        opened = []
        for k, x in enumerate(xs):
            ctx = context(jax.random.key(0), ())
            payload, own[k], _ = link.encode(jnp.array(x), own[k], ctx)
            opened.append(link.open(payload, ctx))
            np.testing.assert_allclose(own[k].memory, memories[k])
        mean = sum(opened) / 2
        got, server = link.decode(mean, context(jax.random.key(0), server))
        np.testing.assert_allclose(got, np.mean(memories, 0))


def test_ef21_moves_by_the_share_of_the_population_that_is_present():
    link = wire.error_feedback(wire.top_k(2), "ef21")
    env = fl.Env(jnp.int32(0), jax.random.key(0), *[jnp.zeros(1)] * 3, jnp.int32(8), jnp.int32(2))
    ctx = context(jax.random.key(0), jnp.zeros(2))._replace(env=env)
    np.testing.assert_allclose(link.decode(jnp.array([4.0, -8.0]), ctx)[0], [1.0, -2.0])


def test_momentum_correction_by_hand():
    """Deep gradient compression, with momentum 1/2: the sent entry loses its velocity and its rest."""
    link = wire.momentum_correction(wire.top_k(1), 0.5)
    own, ctx = link.init_client(shapes(jnp.zeros(2))), context(jax.random.key(0), ())
    for x, sent, velocity, unsent in (
        ([3.0, 1.0], [3.0, 0.0], [0.0, 1.0], [0.0, 1.0]),
        ([0.0, 1.0], [0.0, 2.5], [0.0, 0.0], [0.0, 0.0]),
        ([1.0, 1.5], [0.0, 1.5], [1.0, 0.0], [1.0, 0.0]),
        ([0.0, 0.0], [1.5, 0.0], [0.0, 0.0], [0.0, 0.0]),
    ):
        payload, own, _ = link.encode(jnp.array(x), own, ctx)
        np.testing.assert_allclose(wire.undo(link, payload, ctx), sent)
        np.testing.assert_allclose(own.velocity, velocity)
        np.testing.assert_allclose(own.unsent, unsent)


def test_momentum_correction_without_momentum_is_error_feedback():
    a, b = wire.momentum_correction(wire.top_k(3), 0.0), wire.error_feedback(wire.top_k(3))
    x = jax.random.normal(jax.random.key(0), (3, 10))
    ctx = context(jax.random.key(0), ())
    one, two = a.init_client(shapes(x[0])), b.init_client(shapes(x[0]))
    for row in x:
        p, one, _ = a.encode(row, one, ctx)
        q, two, _ = b.encode(row, two, ctx)
        assert_close(wire.undo(a, p, ctx), wire.undo(b, q, ctx))
        assert_close(one.unsent, two.memory)


def counterexample(epsilon=0.5):
    """Karimireddy et al. 2019, counterexample 2: eps |w1 + w2| + |w1 - w2|, one client, one row."""

    def loss(params, model_state, batch, mask, key, train):
        w = params
        value = epsilon * jnp.abs(w[0] + w[1]) + jnp.abs(w[0] - w[1])
        return value + 0 * batch["x"], model_state

    return fl.Model(lambda key: (jnp.array([1.0, 1.0]), ()), loss, lambda p, s, b: {"loss": loss(p, s, b, 0, 0, 0)[0]})


def test_error_feedback_rescues_sign_descent():
    """Signs of this subgradient only ever move along (1, -1), so w1 + w2 stays 2; with feedback it goes to 0."""
    data = fl.FederatedData.from_clients({"a": {"x": np.zeros(1, np.float32)}})
    left = {}
    for name, link in {"sign": wire.sign(), "feedback": wire.error_feedback(wire.sign())}.items():
        rule = lambda r: optax.sgd(0.1 / jnp.sqrt(r + 1.0))
        process = fl.synchronous(fl.compose(fedsgd(counterexample(), rule), fl.uplink(link)), data)
        body = lambda state, _, process=process: process.step(state, process.data)
        last = jax.jit(lambda s, body=body: jax.lax.scan(body, s, length=600)[0])(process.init(jax.random.key(0)))
        w = process.params(last)
        left[name] = float(0.5 * abs(w[0] + w[1]) + abs(w[0] - w[1]))
    assert left["sign"] >= 1 - 1e-4  # eps |w1 + w2| alone
    assert left["feedback"] < 0.05


def test_a_memory_is_refused_around_what_it_can_not_know():
    refused(lambda: wire.error_feedback(wire.majority_vote(0.1)), "majority_vote", "sums only")
    refused(lambda: wire.error_feedback(wire.fetch_sgd(width=10, k=2)), "fetch_sgd", "sums only")
    refused(lambda: wire.momentum_correction(wire.error_feedback(wire.top_k(2), "ef21")), "sums only")
    noisy = wire.chain(wire.clip(1.0), wire.gaussian(1.0, by="client"))
    refused(lambda: wire.error_feedback(noisy), "noise", "back in the next round")
    refused(lambda: wire.error_feedback(wire.top_k), "wire.top_k(0.05)")
    refused(lambda: wire.error_feedback(wire.top_k(2), "ef12"), "ef14", "did you mean")
    refused(lambda: wire.error_feedback(wire.fixed_point(limit=1.0, clients=2), "ef21"), "EF21", "sums")
    refused(lambda: wire.momentum_correction(wire.top_k(2), 1.5), "momentum", "1.5")


@pytest.mark.slow
def test_fedavg_with_momentum_and_ef21_runs():
    """The engine keeps both memories as part of the client's state."""
    from algorithms.fedavg import fedavg
    from tests.problems import softmax_data, softmax_model

    for link in (wire.momentum_correction(wire.top_k(3)), wire.error_feedback(wire.top_k(3), "ef21")):
        process = fl.synchronous(fl.compose(fedavg(softmax_model(), optax.sgd(0.1)), fl.uplink(link)), softmax_data())
        state, metrics = steps(process, 3)
        assert np.isfinite(metrics["loss"])
        assert jax.tree.leaves(process.clients(state).table)


@pytest.mark.parametrize("first", [wire.hadamard(), wire.random_k(0.5), wire.top_k(2), wire.kashin()])
@pytest.mark.parametrize("form", ["ef14", "ef21"])
def test_memories_behind_what_hands_on_other_entries_each_round_are_refused(first, form):
    memory = wire.error_feedback(wire.sign(), form)
    if form == "ef14" or first.summable:
        refused(lambda: wire.chain(first, memory), "put the memory around both")
    refused(lambda: wire.chain(first, wire.momentum_correction(wire.top_k(1))), "put the memory around both")
    assert wire.chain(wire.clip(1.0), wire.error_feedback(wire.sign())).remembers


def test_sketches_that_are_read_after_the_sum_have_their_memory_at_the_server():
    """With the median of three rows, what two clients read of their own isn't what the server reads of both."""
    for memory in (wire.error_feedback, wire.momentum_correction):
        refused(lambda memory=memory: memory(wire.count_sketch(3, width=4)), "use fetch_sgd")
    assert wire.error_feedback(wire.count_mean_sketch(3, width=4)).remembers


def test_momentum_forgets():
    refused(lambda: wire.momentum_correction(wire.top_k(0.1), 1.0), "below 1")
    refused(lambda: wire.fetch_sgd(3, width=5, k=1, momentum=1.0), "below 1")
