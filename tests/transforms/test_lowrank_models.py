"""FedPara: ranks, shapes and gradients against NumPy, bytes, and the private half of pFedPara."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.fedpara import fedpara as fedpara_of_fedavg
from algorithms.pfedpara import pfedpara
from fedjax_lab.transforms import fedpara, leaves
from fedjax_lab.transforms.fedpara import Factors, composed, kernel_of, rank_of
from tests.problems import softmax_data, steps
from tests.transforms.networks import network

MODEL = network(hidden=16)
DATA = softmax_data((7, 4, 9))


def test_a_kernel_is_the_product_of_two_low_rank_ones_and_of_full_rank():
    """Proposition 1 and corollary 1: two ranks of 4 make a 16 x 16 kernel of rank 16, out of half its numbers."""
    rng = np.random.default_rng(0)
    x1, y1, x2, y2 = rng.normal(size=(4, 16, 4)).astype(np.float32)
    kernel = np.asarray(kernel_of(Factors(x1, y1, (), x2, y2, ())))
    np.testing.assert_allclose(kernel, (x1 @ y1.T) * (x2 @ y2.T), rtol=1e-5, atol=1e-6)
    assert np.linalg.matrix_rank(x1 @ y1.T) == 4 and np.linalg.matrix_rank(kernel) == 16
    np.testing.assert_allclose(
        kernel_of(Factors(x1, y1, (), x2, y2, ()), personal=True), (x1 @ y1.T) * (x2 @ y2.T + 1), rtol=1e-5, atol=1e-6
    )


def test_a_convolution_is_proposition_3():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    f = Factors(draw(5, 2), draw(7, 2), draw(3, 3, 2, 2), draw(5, 2), draw(7, 2), draw(3, 3, 2, 2))
    expected = np.ones((3, 3, 5, 7))
    for x, y, t in ((f.x1, f.y1, f.t1), (f.x2, f.y2, f.t2)):
        half = np.zeros((3, 3, 5, 7))
        for r in range(2):
            for s in range(2):
                half += t[:, :, r, s][:, :, None, None] * np.outer(x[:, r], y[:, s])[None, None]
        expected *= half
    np.testing.assert_allclose(kernel_of(f), expected, rtol=1e-4, atol=1e-5)


def test_the_paper_s_ranks():
    """Gamma goes from the least rank that can be full to the largest that saves anything."""
    # 2 r (m + n) <= m n for 256 x 256: r <= 64; ceil(sqrt(256)) = 16.
    assert [rank_of((256, 256), gamma) for gamma in (0.0, 0.5, 0.99)] == [16, 40, 63]
    # Table 1's example: 3x3 kernels of 256 channels, 2 R (O + I + R K1 K2) = 20,992 of 589,824 at R = 16.
    shapes = jax.eval_shape(lambda: fedpara(conv(), rank=16).init(jax.random.key(0))[0]["kernel"])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 20_992
    assert rank_of((4, 3), 0.1) is None  # factors would be longer


def conv():
    init = lambda key: {"kernel": jax.random.normal(key, (3, 3, 256, 256))}
    return fl.models.from_functions(init, lambda params, x: x, num_classes=3)


@pytest.mark.slow
def test_factors_start_with_the_model_s_own_variance():
    wide = network(hidden=256, features=64)
    own = wide.init(jax.random.key(0))[0]["hidden"]["kernel"]
    for options in ({"gamma": 0.1}, {"gamma": 0.1, "personal": True}):
        params = fedpara(wide, **options).init(jax.random.key(0))[0]
        kernel = composed(params, options.get("personal", False))["hidden"]["kernel"]
        assert float(jnp.std(kernel)) == pytest.approx(float(jnp.std(own)), rel=0.15)
    zeros = MODEL._replace(init=lambda key: (jax.tree.map(jnp.zeros_like, MODEL.init(key)[0]), ()))
    model = fedpara(zeros, rank=2)
    params = model.init(jax.random.key(0))[0]
    assert not composed(params)["hidden"]["kernel"].any()
    assert params["hidden"]["kernel"].y1.any()  # which is where its gradient goes
    one, two = (fedpara(MODEL, rank=2).init(jax.random.key(i))[0]["hidden"]["kernel"] for i in range(2))
    assert (one.x1 != two.x1).all() and (one.x1 != one.x2).all()


def test_gradients_are_the_chain_rule_s():
    model = fedpara(MODEL, rank=3, predicate=leaves("hidden/kernel"))
    params = model.init(jax.random.key(0))[0]
    batch = DATA.client("c0").arrays
    mean = lambda m: lambda p: jnp.mean(m.loss(p, (), batch, jnp.ones(7, bool), None, True)[0])
    factors, grads = params["hidden"]["kernel"], jax.grad(mean(model))(params)["hidden"]["kernel"]
    outer = np.asarray(jax.grad(mean(MODEL))(composed(params))["hidden"]["kernel"], np.float64)
    x1, y1, x2, y2 = (np.asarray(f, np.float64) for f in (factors.x1, factors.y1, factors.x2, factors.y2))
    np.testing.assert_allclose(grads.x1, (outer * (x2 @ y2.T)) @ y1, atol=1e-5)
    np.testing.assert_allclose(grads.y2, (outer * (x1 @ y1.T)).T @ x2, atol=1e-5)


@pytest.mark.slow
def test_only_factors_travel_and_links_work_on_them():
    round = fedpara_of_fedavg(MODEL, optax.sgd(0.1), rank=2, batch_size=None)
    process = fl.synchronous(fl.compose(round, fl.uplink(fl.wire.error_feedback(fl.wire.top_k(10)))), DATA)
    state, metrics = steps(process, 2)
    size = 4 * (2 * 2 * (4 + 16) + 16 + 2 * 2 * (16 + 3) + 3)
    assert fl.total_bytes(metrics["downlink_bytes"]) == 3 * size
    assert fl.total_bytes(metrics["uplink_bytes"]) == 3 * (10 * 4 + -(-10 * 8 // 8))
    assert fl.global_metrics(DATA)(process, state)["loss"] < 2
    assert composed(process.params(state))["hidden"]["kernel"].shape == (4, 16)


@pytest.mark.slow
def test_pfedpara_keeps_half_of_each_kernel_with_its_client():
    round = pfedpara(MODEL, optax.sgd(0.3), rank=2, epochs=2)
    process = fl.synchronous(round, DATA)
    state = process.init(jax.random.key(0))
    begin = fl.per_client_accuracy(DATA)(process, state)["personal_accuracy"]
    for _ in range(8):
        state, metrics = process.step(state, process.data)
    half = 4 * (2 * (4 + 16) + 16 + 2 * (16 + 3) + 3)
    assert fl.total_bytes(metrics["uplink_bytes"]) == fl.total_bytes(metrics["downlink_bytes"]) == 3 * half
    own = process.clients(state).table.part.params
    assert own["hidden"]["kernel"].x2.shape == (3, 4, 2) and own["hidden"]["kernel"].x1 is None
    assert float(jnp.std(own["hidden"]["kernel"].y2, axis=0).min()) > 0
    assert fl.per_client_accuracy(DATA)(process, state)["personal_accuracy"] > max(begin, 0.6)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: fedpara(MODEL, rank=0), "rank must be an integer of at least 1"),
        (lambda: fedpara(MODEL, gamma=1.5), "gamma must"),
        (lambda: fedpara("mlp"), "model must be"),
        (lambda: fedpara(MODEL, rank=4).init(jax.random.key(0)), "rank 4 is above that of output/kernel, 3"),
        (lambda: fedpara(MODEL, predicate=leaves("dense/*")).init(jax.random.key(0)), "names none of"),
        (lambda: fedpara(network(2)).init(jax.random.key(0)), "none of the kernels shorter"),
        (
            lambda: fl.synchronous(fedavg(fedpara(MODEL, rank=4), optax.sgd(0.1)), DATA),
            "rank 4 is above that of output/kernel",
        ),
    ],
)
def test_refusals(call, word):
    with pytest.raises(ValueError, match=word):
        call()
