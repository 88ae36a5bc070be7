"""Selective upload: rules by hand, thresholds of zero, fewer uploads for the same optimum."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.scaffold import scaffold
from fedjax_lab.transforms import changed_by, cmfl, lag_ps, lag_wk, local_accuracy
from tests.problems import (
    assert_close,
    assert_same_bits,
    quadratic_data,
    quadratic_model,
    softmax_data,
    softmax_model,
    steps,
)

MODEL = softmax_model()
SGD = optax.sgd(0.1)
ONE = {"steps": 1, "batch_size": None, "weighting": "uniform"}
RATE = 0.4


def trace(process, rounds):
    """The parameters before each round, and each round's uploads and bytes."""
    state, found = process.init(jax.random.key(0)), []
    for _ in range(rounds):
        before = np.asarray(process.params(state))
        state, m = process.step(state, process.data)
        down = fl.total_bytes(m["downlink_bytes"])
        found.append((before, int(m["survivors"]), fl.total_bytes(m["uplink_bytes"]), down))
    return process.params(state), found


def regression(*transforms):
    """Least squares of 9 clients of growing curvature, as in the paper's section 4, in an ill-conditioned problem."""
    rng, scale = np.random.default_rng(1), (1.3 ** np.arange(9) + 1) ** 2
    x = rng.normal(size=(9, 12, 3)) * np.linspace(1, 0.15, 3)
    A = scale[:, None, None] * np.einsum("kni,knj->kij", x, x)
    A /= np.linalg.eigvalsh(A).max()
    b = rng.normal(0, 2, (9, 3))
    data = fl.FederatedData.from_clients({k: {"A": A[k : k + 1], "b": b[k : k + 1]} for k in range(9)})
    optimum = np.linalg.solve(A.sum(0), np.einsum("kij,kj->i", A, b))
    smoothness, rate = np.linalg.eigvalsh(A).max(1), 1 / np.linalg.eigvalsh(A.mean(0)).max()
    base = fedavg(quadratic_model(3), optax.sgd(rate), **ONE)
    return fl.synchronous(fl.compose(base, *[t(smoothness, rate) for t in transforms]), data), optimum


RULES = {
    "lag_wk": lambda: lag_wk(0.0, instead="nothing"),
    "lag_ps": lambda: lag_ps(1.0, 0.1, 0.0, instead="nothing"),
    "cmfl": lambda: cmfl(0.0),
    "local_accuracy": lambda: local_accuracy(0.0),
    "changed_by": lambda: changed_by(0.0, instead="nothing"),
}


@pytest.fixture(scope="module")
def plain():
    process = fl.synchronous(fedavg(MODEL, SGD), softmax_data(), fl.uniform(5))
    state, metrics = steps(process, 3)
    return process.params(state), metrics


ALWAYS = ("lag_wk", "cmfl")


@pytest.mark.parametrize("name", [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.slow) for n in RULES])
def test_a_threshold_of_zero_is_the_inner_round_bit_for_bit(name, plain):
    process = fl.synchronous(fl.compose(fedavg(MODEL, SGD), RULES[name]()), softmax_data(), fl.uniform(5))
    state, metrics = steps(process, 3)
    assert_same_bits(process.params(state), plain[0])
    np.testing.assert_array_equal(metrics["uplink_bytes"], plain[1]["uplink_bytes"])


@pytest.mark.slow
def test_stale_values_with_a_threshold_of_zero_are_the_inner_round():
    """With everybody in every round, up to the order of additions."""
    final = lambda *t: (p := fl.synchronous(fl.compose(fedavg(MODEL, SGD), *t), softmax_data())).params(steps(p, 5)[0])
    assert_close(final(lag_wk(0.0)), final(), atol=2e-6)


def test_lag_wk_by_hand():
    """Every decision, every stale mean and every byte from the paper's lines, in float64."""
    process, _ = regression(lambda L, alpha: lag_wk(0.1))
    A, b = (np.asarray(process.data.arrays[n], np.float64) for n in "Ab")
    alpha = 1 / np.linalg.eigvalsh(A.mean(0)).max()
    w, last, moves = np.zeros(3), np.zeros((9, 3)), np.zeros(10)
    final, found = trace(process, 25)
    for before, uploads, up, down in found:
        np.testing.assert_allclose(before, w, atol=2e-5)
        gradients = np.einsum("kij,kj->ki", A, w - b)
        sends = (alpha * np.linalg.norm(gradients - last, axis=1)) ** 2 >= (0.1 * moves).sum()
        assert (uploads, up, down) == (sends.sum(), 12 * sends.sum(), 9 * (12 + 4 + 4 + 1))
        last[sends] = gradients[sends]
        new = w - alpha * last.mean(0)
        moves = np.concatenate([[((new - w) ** 2).sum()], moves[:-1]])
        w = new
    np.testing.assert_allclose(final, w, atol=2e-5)
    counts = [uploads for _, uploads, _, _ in found]
    assert counts[0] == 9 and min(counts) == 0  # the server moves in rounds in which nobody sends, too


def test_lag_reaches_the_optimum_with_fewer_uploads_than_gradient_descent():
    """The paper's claim (figures 3 to 6): uploads until the distance to the optimum is a thousandth."""

    def needed(*transforms):
        process, optimum = regression(*transforms)
        _, found = trace(process, 400)
        near = [np.linalg.norm(w - optimum) < 1e-3 * np.linalg.norm(optimum) for w, *_ in found].index(True)
        return near, sum(n for _, n, _, _ in found[:near]), sum(d for *_, d in found[:near])

    descent, worker = needed(), needed(lambda L, alpha: lag_wk(0.1))
    server = needed(lambda L, alpha: lag_ps(L, alpha, 1.0))
    assert worker[1] < 0.1 * descent[1] and server[1] < 0.4 * descent[1]
    assert server[2] < 0.6 * descent[2]  # it saves messages, too
    assert max(worker[0], server[0]) < 1.1 * descent[0]  # and takes no more rounds


def test_lag_ps_asks_by_the_models_way():
    """One client of curvature 1: asked again once the model has gone further than its last moves together."""
    data = fl.FederatedData.from_clients({0: {"A": np.eye(1)[None], "b": np.full((1, 1), 8.0)}})
    base = fedavg(quadratic_model(1), optax.sgd(0.5), **ONE)
    process = fl.synchronous(fl.compose(base, lag_ps(1.0, 0.5, 1.0, memory=1)), data)
    final, found = trace(process, 5)
    # w: 0, 4 (asked), then (0.5 * 4)^2 < 4^2: the stale gradient again, 8; (0.5 * 8)^2 >= 4^2: asked at 8, gradient 0:
    # stays at 8; then (0.5 * 0)^2 >= 0: asked.
    assert [float(w[0]) for w, *_ in found] == [0, 4, 8, 8, 8] and float(final[0]) == 8
    assert [n for _, n, _, _ in found] == [1, 0, 1, 1, 1]
    assert [d for *_, d in found] == [5, 1, 5, 5, 5]


@pytest.mark.slow
def test_cmfl_by_hand():
    """Two of four signs agree with the last move: sent for a threshold of a half, and not for more."""
    rows = {0: [3.0, 1, -1, 2], 1: [1.0, 1, -3, 2]}
    data = fl.FederatedData.from_clients({k: {"A": np.eye(4)[None], "b": np.array([v])} for k, v in rows.items()})
    base = fedavg(quadratic_model(4), optax.sgd(1.0), **ONE)

    def second(threshold):
        process = fl.synchronous(fl.compose(base, cmfl(threshold)), data)
        state, metrics = steps(process, 2)
        return int(metrics["survivors"]), np.asarray(process.params(state)), metrics

    # The first round moves to the mean, (2, 1, -2, 2). Then client 0's update is (1, 0, 1, 0): one sign of four agrees
    # with the move's, client 1's is (-1, 0, -1, 0): one, too.
    assert second(0.25)[0] == 2
    sent, params, metrics = second(0.26)
    assert sent == 0 and fl.total_bytes(metrics["uplink_bytes"]) == 0
    np.testing.assert_array_equal(params, [2, 1, -2, 2])
    assert fl.total_bytes(metrics["downlink_bytes"]) == 2 * (2 * 16 + 4 + 1)
    assert second(lambda r: 0.5 / (1 + r))[0] == 2


@pytest.mark.slow
def test_only_good_enough_models_are_sent():
    data = softmax_data()
    level = 0.68
    base = fedavg(MODEL, SGD, steps=3, batch_size=None)
    process = fl.synchronous(fl.compose(base, local_accuracy(level)), data)
    state = process.init(jax.random.key(0))
    good = []
    for k in range(data.num_clients):  # each client's own model, from a round of its own
        alone = fl.synchronous(base, data, fl.fixed([k]))
        after = jax.tree.map(np.asarray, alone.params(steps(alone, 1)[0]))
        rows = data.client(data.ids[k]).arrays
        good.append(np.mean(np.argmax(rows["x"] @ after["w"] + after["b"], 1) == rows["y"]) >= level)
    _, metrics = process.step(state, process.data)
    assert 0 < sum(good) < data.num_clients
    assert int(metrics["survivors"]) == sum(good) == fl.total_bytes(metrics["uplink_bytes"]) // 60


@pytest.mark.slow
def test_a_silent_client_keeps_its_state_and_goes_well_with_links():
    """As if it had not taken part: SCAFFOLD's control variates still add up to the server's."""
    data = softmax_data()
    round = fl.compose(
        scaffold(MODEL, SGD, weighting="uniform"),
        cmfl(0.6, weighting="uniform"),
        fl.uplink(fl.wire.error_feedback(fl.wire.top_k(0.5))),
    )
    process = fl.synchronous(fl.compose(scaffold(MODEL, SGD, weighting="uniform"), cmfl(0.6)), data)
    state, _ = steps(process, 4)
    mean = jax.tree.map(lambda c: jnp.mean(c, 0), process.clients(state).table.inner.c)
    assert_close(mean, process.server(state).inner.c, atol=1e-6)
    linked = fl.synchronous(round, data)
    state, metrics = steps(linked, 4)
    assert fl.total_bytes(metrics["uplink_bytes"]) % max(int(metrics["survivors"]), 1) == 0
    assert np.isfinite(linked.params(state)["w"]).all()


def test_nothing_moves_when_everybody_is_away():
    base = fl.compose(fedavg(quadratic_model(3), optax.sgd(0.3), **ONE), lag_wk(0.1))
    process = fl.synchronous(base, quadratic_data()[0], fl.dropout(fl.everyone(), 1.0))
    state = process.init(jax.random.key(0))
    after, _ = process.step(state, process.data)
    assert_same_bits(after.server, state.server)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: lag_wk(-0.1), "xi must be at least 0"),
        (lambda: lag_wk([0.1, 0.2], memory=3), "memory=3"),
        (lambda: lag_wk(memory=0), "memory must"),
        (lambda: lag_wk(instead="stall"), "did you mean 'stale'"),
        (lambda: lag_ps(-1.0, 0.1), "smoothness must"),
        (lambda: lag_ps(1.0, 0), "learning_rate must"),
        (lambda: cmfl(1.2), "threshold must lie between"),
        (lambda: cmfl(-0.2), "threshold must"),
        (lambda: local_accuracy(1.01), "level must lie between"),
        (lambda: changed_by(-1), "threshold must"),
        (lambda: fl.compose(fedavg(MODEL, SGD), fl.uplink(fl.wire.qsgd(8)), lag_wk()), "put it before fl.uplink"),
    ],
)
def test_refusals(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_refusals_when_the_process_is_built():
    data = softmax_data()
    with pytest.raises(ValueError, match="treats parts of an upload differently"):
        fl.synchronous(fl.compose(scaffold(MODEL, SGD), lag_wk()), data)
    with pytest.raises(ValueError, match="did you mean 'accuracy'"):
        fl.synchronous(fl.compose(fedavg(MODEL, SGD), local_accuracy(0.5, metric="acuracy")), data)


def test_what_is_not_swept_is_checked_within_a_sweep_too():
    """There jax.numpy's constants have no values, whatever it is that is swept."""
    build = lambda xi: lambda rate: [lag_wk(xi), lag_ps(1.0, rate, xi), rate][-1]
    jax.eval_shape(build(0.1), 0.1)
    with pytest.raises(ValueError, match="xi must be at least 0"):
        jax.eval_shape(build(-0.1), 0.1)
