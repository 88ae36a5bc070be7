"""The laws that every model obeys, whoever made it: one compiled step each, seen from all sides."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fedjax_lab import models

N = 5  # examples; the last two are padding
MASK = jnp.arange(N) < 3


class LinenNet(nn.Module):
    """Dropout and, with or without the mask, batch normalisation."""

    masked: bool

    @nn.compact
    def __call__(self, x, training, mask):
        x = nn.Dense(6)(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(momentum=0.9, use_running_average=not training)(x, mask=mask[:, None] if self.masked else None)
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not training)(x))


class NNXNet(nnx.Module):
    """The same by NNX, in lists, with its mode set from outside."""

    def __init__(self, *, rngs):
        layers = [nnx.Linear(4, 6, rngs=rngs), nnx.BatchNorm(6, momentum=0.9, rngs=rngs)]
        self.layers = nnx.List([*layers, nnx.Dropout(0.5, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)])

    def __call__(self, x, mask):
        first, norm, drop, last = self.layers
        return last(drop(norm(first(x), mask=mask[:, None])))


def linear(key):
    return {"w": jax.random.normal(key, (4, 3)), "b": jnp.zeros((1, 3))}


class Case(NamedTuple):
    model: models.Model
    x: tuple  # one example's shape; integers are tokens
    y: tuple | None = ()  # one example's labels; None is a real target
    random: bool = False
    stateful: bool = False
    mixes: bool = False  # a padded row reaches the others


flat, image = (4,), (8, 8, 1)
CASES = {
    "functions": Case(models.from_functions(linear, lambda p, x: x @ p["w"] + p["b"]), flat),
    "linen": Case(models.from_flax(LinenNet(True)), flat, random=True, stateful=True),
    "linen_unmasked": Case(models.from_flax(LinenNet(False)), flat, random=True, stateful=True, mixes=True),
    "nnx": Case(models.from_nnx(NNXNet), flat, random=True, stateful=True),
    "nnx_built": Case(models.from_nnx(NNXNet(rngs=nnx.Rngs(0))), flat, random=True, stateful=True),
    "logistic_regression": Case(models.logistic_regression(3), flat),
    "linear_regression": Case(models.linear_regression(), flat, None),
    "mlp": Case(models.mlp(3, hidden=(5, 4)), image),
    "two_nn": Case(models.two_nn(3), flat),
    "fedavg_cnn": Case(models.fedavg_cnn(3), image),
    "emnist_cnn": Case(models.emnist_cnn(3), image, random=True),
    "char_lstm": Case(models.char_lstm(3, 4, 5), (7, int), (7,)),
    "char_lstm_last": Case(models.char_lstm(3, 4, 5, 1, last_only=True), (7, int)),
    "word_lstm": Case(models.word_lstm(3, 4, 5), (7, int), (7,)),
    "resnet_batch": Case(models.resnet(3, blocks=(1, 1), width=4, norm=models.batch_norm()), image, stateful=True),
    "resnet_group": Case(models.resnet(3, blocks=(1, 1), width=4, norm=models.group_norm(2)), image),
}


def batch_for(case, seed):
    rng = np.random.default_rng(seed)
    if case.x[-1] is int:
        x = rng.integers(0, 3, (N, *case.x[:-1])).astype(np.int32)
    else:
        x = rng.normal(size=(N, *case.x)).astype(np.float32)
    y = rng.normal(size=N) if case.y is None else rng.integers(0, 3, (N, *case.y))
    return {"x": jnp.asarray(x), "y": jnp.asarray(y, np.float32 if case.y is None else np.int32)}


def start_shapes(case, batch):
    model, key = case.model, jax.random.key(0)
    if model.init_from is None:
        return jax.eval_shape(model.init, key)
    return jax.eval_shape(model.init_from, key, batch)


def drawn(case, batch, seed):
    """Parameters from NumPy (the initialisation has a test of its own) and a state of ones."""
    rng = np.random.default_rng(seed)
    params, state = start_shapes(case, batch)
    draw = lambda a: jnp.asarray(rng.normal(scale=0.4, size=a.shape), a.dtype)
    return jax.tree.map(draw, params), jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), state)


class Ran(NamedTuple):
    losses: jax.Array  # [N]
    new_state: object
    grads: object
    eval_losses: jax.Array
    eval_state: object
    metrics: dict


def step(model, params, state, batch, mask, key):
    """Everything a model can do, and the gradient of the mean loss over the real examples."""

    def objective(params):
        losses, new = model.loss(params, state, batch, mask, key, True)
        return jnp.where(mask, losses, 0).sum() / jnp.maximum(mask.sum(), 1), (losses, new)

    grads, (losses, new) = jax.grad(objective, has_aux=True)(params)
    held, kept = model.loss(params, state, batch, mask, key, False)
    return Ran(losses, new, grads, held, kept, model.metrics(params, state, batch))


@functools.cache
def ran(name):
    """``start, base, other padding, other key, no real example`` of one compiled step."""
    case = CASES[name]
    batch, other = batch_for(case, 0), batch_for(case, 1)
    repadded = jax.tree.map(lambda a, b: jnp.concatenate([a[:3], b[3:]]), batch, other)
    params, state = drawn(case, batch, 0)
    traced = []
    run = jax.jit(lambda *args: traced.append(1) or step(case.model, *args))
    key, other_key, nothing = jax.random.key(0), jax.random.key(1), jnp.zeros(N, bool)
    scenarios = [(batch, MASK, key), (repadded, MASK, key), (batch, MASK, other_key)]
    results = [run(params, state, *s) for s in (*scenarios, (batch, nothing, key))]
    assert len(traced) == 1
    return jax.device_get(((params, state), *results))


def assert_close(a, b, rtol=1e-4, atol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def differs(a, b):
    return any(not np.allclose(x, y, atol=1e-6) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def finite(tree):
    return all(np.isfinite(a).all() for a in jax.tree.leaves(tree))


every = pytest.mark.parametrize("name", CASES)


@every
def test_one_finite_loss_for_each_example(name):
    _, base, *_ = ran(name)
    assert base.losses.shape == base.eval_losses.shape == (N,)
    assert finite(base)


@every
def test_padding_reaches_nothing(name):
    _, base, repadded, *_ = ran(name)
    assert differs(base.losses[3:], repadded.losses[3:])
    assert differs(base.grads, repadded.grads) == CASES[name].mixes
    assert differs(base.new_state, repadded.new_state) == CASES[name].mixes


@every
def test_the_key_matters_only_in_training_and_only_with_dropout(name):
    _, base, _, other_key, _ = ran(name)
    assert differs(base.losses, other_key.losses) == CASES[name].random
    np.testing.assert_array_equal(base.eval_losses, other_key.eval_losses)


@every
def test_the_state_changes_in_training_only(name):
    (_, state), base, *_ = ran(name)
    assert bool(jax.tree.leaves(state)) == CASES[name].stateful
    assert differs(base.new_state, state) == CASES[name].stateful
    jax.tree.map(np.testing.assert_array_equal, base.eval_state, state)


@every
def test_structures_and_dtypes_are_kept(name):
    """Also under vmap, as the engine runs it, and without a weak type, which would compile twice."""
    case = CASES[name]
    batch = batch_for(case, 0)
    start = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *a.shape), a.dtype), start_shapes(case, batch))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0)))
    run = jax.vmap(functools.partial(step, case.model), (0, 0, None, None, 0))
    out = jax.eval_shape(run, *start, batch, MASK, keys)
    kinds = lambda tree: jax.tree.map(lambda a: (a.dtype, a.shape, a.weak_type), tree)
    assert kinds((out.grads, out.new_state)) == kinds(start)
    assert out.losses.shape == out.eval_losses.shape == (2, N)
    params = start[0]
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    assert all(type(p.key) is str for path in paths for p in path)


@every
def test_metrics_are_per_example_and_hold_the_evaluation_loss(name):
    _, base, *_ = ran(name)
    np.testing.assert_allclose(base.metrics["loss"], base.eval_losses, rtol=1e-5, atol=1e-6)
    assert all(values.shape == (N,) for values in base.metrics.values())
    if name != "linear_regression":
        assert set(base.metrics) == {"loss", "accuracy"}
        assert ((base.metrics["accuracy"] >= 0) & (base.metrics["accuracy"] <= 1)).all()


@every
def test_a_batch_of_padding_only_gives_no_nan(name):
    *_, nothing = ran(name)
    assert finite(nothing.new_state)
    assert all(not np.any(g) for g in jax.tree.leaves(nothing.grads))


@pytest.mark.parametrize("name", ["linen", "nnx", "char_lstm"])
def test_vmap_over_models_is_each_model_alone(name):
    case = CASES[name]
    batch = batch_for(case, 0)
    start, base, *_ = ran(name)
    (params, states) = jax.tree.map(lambda a, b: np.stack([a, b]), start, drawn(case, batch, 1))
    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, 0))
    def run(params, state, key):
        return case.model.loss(params, state, batch, MASK, key, True)

    losses, new_state = jax.device_get(run(params, states, keys))
    assert_close(losses[0], base.losses)
    assert_close(jax.tree.map(lambda a: a[0], new_state), base.new_state)
    assert differs(losses[0], losses[1])


@pytest.mark.parametrize(
    ("name", "varies"),
    [("linen", True), ("nnx", True), ("nnx_built", False), ("char_lstm", True),
     ("logistic_regression", False)],
)  # fmt: skip
def test_the_initialisation_is_a_function_of_the_key(name, varies):
    case, batch = CASES[name], batch_for(CASES[name], 0)
    model = case.model
    init = model.init if model.init_from is None else lambda k: model.init_from(k, batch)
    first, again, other = (init(jax.random.key(k))[0] for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert differs(first, other) == varies
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, start_shapes(case, batch)[0])
