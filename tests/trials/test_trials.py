"""Does Round's interface carry what later issues need? Each trial is held to a law of design.md."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedadam import fedadam
from algorithms.fedavg import fedavg
from fedjax_lab import wire
from tests.compiling import compiled_once
from tests.problems import (
    assert_close,
    assert_same_bits,
    quadratic_data,
    quadratic_model,
    softmax_data,
    softmax_model,
    steps,
)
from tests.trials import rounds, schedules

MODEL = softmax_model()
SGD = optax.sgd(0.1)
CORRECTED = fl.transforms.control_variates(learning_rate=0.1)  # SCAFFOLD


def base(**options):
    return fedavg(MODEL, SGD, **({"epochs": 1, "batch_size": 10} | options))


def test_scaffold_reaches_the_optimum_that_fedavg_misses():
    data, optimum = quadratic_data()
    plain = fedavg(quadratic_model(), optax.sgd(0.2), steps=5, batch_size=None, weighting="uniform")
    corrected = fl.compose(plain, fl.transforms.control_variates("II", "uniform", learning_rate=0.2))
    left = {}
    for name, round in (("fedavg", plain), ("scaffold", corrected)):
        process = fl.synchronous(round, data)
        left[name] = np.abs(process.params(steps(process, 150)[0]) - optimum).max()
    assert left["scaffold"] < 1e-5
    assert left["fedavg"] > 1e-2


def test_ditto_over_scaffold_leaves_its_global_model_untouched_and_trains_personal_ones():
    data = softmax_data()
    inner = fl.compose(base(), CORRECTED)
    outer = fl.compose(inner, fl.transforms.personal_model(0.0))
    a, b = fl.synchronous(inner, data, fl.uniform(4)), fl.synchronous(outer, data, fl.uniform(4))
    (sa, _), (sb, _) = steps(a, 3), steps(b, 3)
    assert_same_bits(a.server(sa), b.server(sb))
    report = fl.per_client_accuracy(data)(b, sb)
    assert report["personal_accuracy"] > report["accuracy"]


def test_maml_tilt_is_the_gradient_through_the_adaptation():
    data = softmax_data((8,))
    half = lambda n: jnp.arange(n) % 2 == 0
    alpha = 0.3
    process = fl.synchronous(
        fl.compose(fedavg(MODEL, optax.sgd(1.0), steps=1, batch_size=None), rounds.maml(alpha, half)), data
    )
    state = process.init(jax.random.key(0))
    before = process.params(state)
    state, _ = process.step(state, process.data)
    moved = jax.tree.map(lambda a, b: a - b, before, process.params(state))
    batch, mask = data.client("c0").full()

    def meta(params):
        loss = lambda p, m: fl.masked_mean(MODEL.loss(p, (), batch, m, None, True)[0], m)
        first = half(len(mask))
        adapted = jax.tree.map(lambda w, g: w - alpha * g, params, jax.grad(loss)(params, mask & first))
        return loss(adapted, mask & ~first)

    # The same examples, so their order in the batch doesn't matter; which half they are in does: a full
    # batch keeps the client's own order.
    assert_close(moved, jax.grad(meta)(before), atol=2e-6)


def test_sketches_are_summed_before_they_are_decoded():
    data = softmax_data()
    wide = fl.compose(base(), fl.uplink(wire.count_sketch(5, width=512)))
    a, b = fl.synchronous(base(), data), fl.synchronous(wide, data)
    assert_close(a.params(steps(a, 2)[0]), b.params(steps(b, 2)[0]), atol=1e-5)


@pytest.mark.parametrize("make", ["fedavg", "fedadam", "scaffold", "sparse", "rotated"])
def test_gossip_on_the_complete_graph_is_synchronous(make):
    data = softmax_data()
    n = data.num_clients
    round = {
        "fedavg": base(),
        "fedadam": fedadam(MODEL, SGD),
        "scaffold": fl.compose(base(), CORRECTED),
        "sparse": fl.compose(base(), fl.uplink(wire.error_feedback(wire.top_k(0.3)))),
        "rotated": fl.compose(base(), fl.uplink(wire.hadamard(), wire.random_k(0.5))),
    }[make]
    a = fl.synchronous(round, data)
    b = schedules.gossip(round, data, jnp.full((n, n), 1 / n))
    assert_close(a.params(steps(a, 3)[0]), b.params(steps(b, 3)[0]), atol=1e-5)


@pytest.mark.parametrize("make", ["fedavg", "scaffold", "sparse"])
def test_buffered_asynchronous_without_staleness_is_synchronous(make):
    data = softmax_data()
    round = {
        "fedavg": base(),
        "scaffold": fl.compose(base(), CORRECTED),
        "sparse": fl.compose(base(), fl.uplink(wire.error_feedback(wire.top_k(0.3)))),
    }[make]
    a = fl.synchronous(round, data, fl.uniform(4))
    fresh = schedules.buffered_asynchronous(round, data, fl.uniform(4), lambda key, n: jnp.zeros(n, jnp.int32))
    assert_close(a.params(steps(a, 3)[0]), fresh.params(steps(fresh, 3)[0]))
    stale = schedules.buffered_asynchronous(round, data, fl.uniform(4), lambda key, n: jnp.arange(n) % 3)
    assert not np.allclose(a.params(steps(a, 3)[0])["w"], stale.params(steps(stale, 3)[0])["w"], atol=1e-4)


def test_everything_at_once():
    """Ditto over SCAFFOLD, sketched uploads: nested states and messages thread through."""
    data = softmax_data(empty=1)
    round = fl.compose(
        base(), fl.uplink(wire.error_feedback(wire.top_k(5))), CORRECTED, fl.transforms.personal_model(0.5)
    )
    process = fl.synchronous(round, data, fl.dropout(fl.uniform(5), 0.3))
    with compiled_once():
        _, metrics = steps(process, 3)
    assert np.isfinite(metrics["loss"])
