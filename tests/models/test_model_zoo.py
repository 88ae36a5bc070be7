"""The papers' networks: published parameter counts, and forward and backward passes by NumPy."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lab import FederatedData, models
from fedjax_lab.models.base import initial_variables
from fedjax_lab.models.convolutional import as_images, max_pool
from fedjax_lab.models.recurrent import LSTM
from fedjax_lab.models.residual import ResNet, batch_norm


def size(model):
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


resnet_18 = {"blocks": (2, 2, 2, 2), "width": 64}


@pytest.mark.parametrize(
    ("model", "published"),
    [
        (models.logistic_regression(10, (784,)), 7_850),
        (models.logistic_regression(10, (60,)), 610),
        (models.logistic_regression(10, (60,), bias=False), 600),
        (models.linear_regression(1, (5,)), 6),
        (models.tag_regression(), 5_000_500),
        (models.mlp(10, input_shape=(64,)), 4_810),
        (models.two_nn(), 199_210),
        (models.fedavg_cnn(), 1_663_370),
        (models.emnist_cnn(), 1_206_590),
        (models.char_lstm(), 820_522),
        (models.word_lstm(), 4_050_748),
        (models.resnet(), 78_042),
        (models.resnet(blocks=(3, 3, 3)), 272_474),
        (models.resnet(**resnet_18, norm=models.group_norm(32)), 11_173_962),
        (models.resnet(**resnet_18, norm=models.batch_norm()), 11_173_962),
    ],
)
def test_parameter_counts(model, published):
    assert size(model) == published


def test_resnet_halves_the_image_and_doubles_the_channels_from_stage_to_stage():
    module = ResNet(10, (1, 1, 1), 16, models.group_norm(8))
    x, mask = jnp.zeros((2, 32, 32, 3)), jnp.ones(2, bool)
    run = lambda key: module.init_with_output(key, x, False, mask, capture_intermediates=True, mutable=True)[1]
    inner = jax.eval_shape(run, jax.random.key(0))["intermediates"]
    convolutions = [v["__call__"][0].shape for k, v in inner.items() if k.startswith("Conv")]
    assert convolutions == [(2, 32, 32, 16)] * 3 + [(2, 16, 16, 32)] * 3 + [(2, 8, 8, 64)] * 3


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def test_logistic_regression_has_the_closed_forms_gradient():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 2, 2)).astype(np.float32), np.array([0, 1, 2, 2, 1, 0])
    w, b = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    model = models.logistic_regression(3)
    params, state = model.init_from(jax.random.key(0), {"x": jnp.asarray(x)})
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(params))  # it starts at zero
    batch = {"x": jnp.asarray(x), "y": jnp.asarray(y)}

    def mean_loss(params):
        return model.loss(params, state, batch, jnp.ones(6, bool), None, True)[0].mean()

    given = {"output": {"kernel": jnp.asarray(w), "bias": jnp.asarray(b)}}
    grads = jax.jit(jax.grad(mean_loss))(given)["output"]
    flat = x.reshape(6, 4)
    error = softmax(flat @ w + b) - np.eye(3)[y]
    np.testing.assert_allclose(grads["kernel"], flat.T @ error / 6, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grads["bias"], error.mean(0), rtol=1e-5, atol=1e-6)


def test_two_nn_is_three_matrix_products():
    rng = np.random.default_rng(1)
    shapes = {"hidden_0": (4, 200), "hidden_1": (200, 200), "output": (200, 10)}
    p = {
        name: {"kernel": rng.normal(size=s).astype(np.float32) / 5, "bias": np.full(s[1], 0.1)}
        for name, s in shapes.items()
    }
    x = rng.normal(size=(3, 4)).astype(np.float32)
    h = x
    for name in ("hidden_0", "hidden_1"):
        h = np.maximum(h @ p[name]["kernel"] + p[name]["bias"], 0)
    logits = h @ p["output"]["kernel"] + p["output"]["bias"]
    y = np.array([3, 1, 4])
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), p)
    metrics = models.two_nn().metrics(params, (), {"x": jnp.asarray(x), "y": jnp.asarray(y)})
    expected = -np.log(softmax(logits)[np.arange(3), y])
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    np.testing.assert_array_equal(metrics["accuracy"], logits.argmax(1) == y)


def test_lstm_is_numpys():
    rng = np.random.default_rng(2)
    d, units, x = 3, 4, rng.normal(size=(2, 5, 3))
    w, r, b = rng.normal(size=(d, 16)), rng.normal(size=(units, 16)), rng.normal(size=16)
    cell = hidden = np.zeros((2, units))
    expected = []
    for t in range(5):
        i, f, g, o = np.split(x[:, t] @ w + hidden @ r + b, 4, axis=1)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
        expected.append(hidden)
    params = {"input": {"kernel": w, "bias": b}, "recurrent": r}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    out = LSTM(units).apply({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(out, np.stack(expected, 1), rtol=1e-5, atol=1e-6)


def test_lstm_starts_by_remembering():
    params, _ = models.char_lstm(5, 2, 3).init(jax.random.key(0))
    bias = params["lstm_0"]["input"]["bias"]
    np.testing.assert_array_equal(bias, [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0])


def test_language_model_does_not_see_the_future():
    model = models.char_lstm(5, 2, 3)
    params, _ = model.init(jax.random.key(0))
    x = jnp.array([[1, 2, 3, 4]])
    upto = jax.jit(lambda x, y: model.metrics(params, (), {"x": x, "y": y})["loss"])
    y = jnp.array([[2, 3, 0, 0]])  # only the first two positions count
    np.testing.assert_array_equal(upto(x, y), upto(x.at[0, 2:].set(1), y))
    assert upto(x, y) != upto(x.at[0, 1].set(1), y)


def test_batch_norm_uses_and_keeps_the_real_rows_statistics():
    rng = np.random.default_rng(3)
    x = rng.normal(2, 3, size=(6, 2, 2, 3)).astype(np.float32)
    mask = np.array([1, 0, 1, 1, 0, 1], bool)
    real = x[mask].reshape(-1, 3)

    class Alone(nn.Module):
        @nn.compact
        def __call__(self, x, mask, train):
            return batch_norm(momentum=0.75, epsilon=1e-5)(x, mask, train)

    start = {
        "params": {"BatchNorm_0": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}},
        "batch_stats": {"BatchNorm_0": {"mean": jnp.zeros(3), "var": jnp.ones(3)}},
    }
    args = jnp.asarray(x), jnp.asarray(mask)
    y, new = Alone().apply(start, *args, True, mutable=["batch_stats"])
    expected = (x[mask] - real.mean(0)) / np.sqrt(real.var(0) + 1e-5)
    np.testing.assert_allclose(y[mask], expected, rtol=1e-4, atol=1e-5)
    stats = new["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], 0.25 * real.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.75 + 0.25 * real.var(0), rtol=1e-4)
    held = Alone().apply(start, *args, False)  # evaluation: the kept statistics, 0 and 1
    np.testing.assert_allclose(held, x / np.sqrt(1 + 1e-5), rtol=1e-5)


def test_max_pool_is_the_windows_maximum():
    x = np.random.default_rng(4).normal(size=(2, 5, 4, 3)).astype(np.float32)
    expected = np.max([x[:, i:4:2, j:4:2] for i in (0, 1) for j in (0, 1)], axis=0)
    np.testing.assert_array_equal(max_pool(jnp.asarray(x)), expected)


def test_max_pool_has_the_derivatives_of_a_maximum_that_ties_share():
    """Forward, backward and of second order: those of ``jnp.max``, in whole numbers with many ties."""
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.integers(0, 3, (3, 5, 6, 4)), jnp.float32)
    moves, weights = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (x.shape, (3, 2, 3, 4)))
    plain = lambda x: x[:, :4].reshape(3, 2, 2, 3, 2, 4).max((2, 4))
    loss = lambda pool, x: jnp.sum(weights * jnp.sin(pool(x)))
    for of in (
        lambda pool: jax.jvp(pool, (x,), (moves,)),
        lambda pool: jax.grad(lambda x: loss(pool, x))(x),
        lambda pool: jax.jvp(jax.grad(lambda x: loss(pool, x)), (x,), (moves,))[1],
        lambda pool: jax.vmap(jax.grad(lambda x: loss(pool, x)))(jnp.stack([x, x + moves])),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), of(max_pool), of(plain))


def test_images_may_come_flat_or_without_channels():
    x = jnp.arange(2 * 9.0).reshape(2, 9)
    for given in (x, x.reshape(2, 3, 3), x.reshape(2, 3, 3, 1)):
        np.testing.assert_array_equal(as_images(given), x.reshape(2, 3, 3, 1))
    with pytest.raises(ValueError, match=r"needs images .* shape \(8,\)"):
        as_images(jnp.zeros((2, 8)))


def test_the_shape_comes_from_the_data_unless_it_is_given():
    data = {"x": jnp.zeros((2, 64)), "y": jnp.zeros(2, jnp.int32)}
    key = jax.random.key(0)
    for build in (models.logistic_regression, models.mlp, models.two_nn, models.fedavg_cnn):
        shapes = jax.eval_shape(build(10).init_from, key, data)[0]
        assert any(64 in leaf.shape for leaf in jax.tree.leaves(shapes))
    with pytest.raises(ValueError, match=r"inputs of shape \(784,\).*data's have \(64,\)"):
        models.mlp(10, input_shape=(784,)).init_from(key, data)
    with pytest.raises(ValueError, match="call init_from"):
        models.mlp(10).init(key)
    # Dense models flatten: another shape with as many numbers fits.
    assert models.mlp(10, input_shape=(8, 8)).init_from(key, data)


def test_labels_outside_the_classes_are_refused():
    x = np.zeros((3, 4), np.float32)
    flat = FederatedData.from_clients({"ann": {"x": x, "y": np.array([0, 1, 3])}})
    with pytest.raises(ValueError, match=r"label 3 of client 'ann'.*0\.\.2"):
        initial_variables(models.mlp(3), jax.random.key(0), flat)
    tokens = np.array([[1, 2, 9]] * 3)
    text = FederatedData.from_clients({"bob": {"x": tokens, "y": tokens}})
    with pytest.raises(ValueError, match=r"label 9 of client 'bob'.*0\.\.4"):
        initial_variables(models.char_lstm(5, 2, 3), jax.random.key(0), text)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.mlp(0), "num_classes must be positive"),
        (lambda: models.mlp(10, hidden=(64, 0)), "hidden must be positive"),
        (lambda: models.emnist_cnn(dropout=(0.5, 1)), "dropout needs two rates"),
        (lambda: models.resnet(norm="batch"), r"norm must be a function, batch_norm\(\)"),
        (lambda: models.group_norm(0), "groups must be positive"),
        (lambda: size(models.resnet(width=12)), r"group_norm\(8\) needs a multiple of 8 channels"),
        (lambda: models.char_lstm(vocab_size=2.5), "vocab_size must be a positive integer"),
    ],
)
def test_wrong_numbers_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_language_model_wants_integers():
    model = models.char_lstm(5, 2, 3)
    params, _ = model.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"tokens \"x\" as integers .* got float32\[2, 3\]"):
        model.metrics(params, (), {"x": jnp.zeros((2, 3)), "y": jnp.zeros((2, 3), int)})
