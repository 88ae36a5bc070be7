"""mixed_precision: what is computed in bfloat16, and what is not."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab import models, rewriting
from tests.problems import assert_same_bits, softmax_data, softmax_model, steps

KEY = jax.random.key(0)
UNIT = 2.0**-8  # bfloat16's rounding: 8 bits of significand
BYTES = {
    "x": np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1)).astype(np.uint8),
    "y": np.arange(6, dtype=np.int32),
}
TOKENS = {"x": np.arange(20, dtype=np.int32).reshape(2, 10), "y": np.arange(1, 21, dtype=np.int32).reshape(2, 10)}


def value_and_grad(model, params, batch, model_state=(), key=KEY):
    """Of the mean training loss; and the next model state."""
    mask = jnp.ones(len(jax.tree.leaves(batch)[0]), bool)

    def mean(params):
        losses, state = model.loss(params, model_state, batch, mask, key, True)
        return jnp.mean(losses), state

    (value, state), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    return value, grads, state


def equations(jaxpr):
    """All of a program's equations, those of its loops and calls included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in rewriting.programs_of(eqn):
            yield from equations(sub)


def operand_types(jaxpr, *names):
    """``{primitive: {dtype of a floating-point operand}}``."""
    found = {}
    for eqn in equations(jaxpr):
        types = {v.aval.dtype.name for v in eqn.invars if jnp.issubdtype(v.aval.dtype, jnp.inexact)}
        if eqn.primitive.name in names and types:
            found[eqn.primitive.name] = found.get(eqn.primitive.name, set()) | types
    return found


# ---- what is computed narrow ----


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: models.mlp(6), BYTES),
        (lambda: models.emnist_cnn(6), {**BYTES, "x": np.zeros((6, 28, 28, 1), np.float32)}),
        (lambda: models.resnet(6, blocks=(1,), width=8, norm=models.batch_norm()), {**BYTES, "x": BYTES["x"] / 255.0}),
        (lambda: models.char_lstm(21, hidden=8), TOKENS),
        (lambda: softmax_model(6, 4), {"x": np.zeros((6, 4), np.float32), "y": BYTES["y"]}),
    ],
    ids=["bytes", "cnn", "batch_norm", "lstm", "functions"],
)
def test_every_product_of_a_clients_program_has_narrow_operands(make, data):
    population = fl.FederatedData.from_clients({k: data for k in range(2)})
    found = {}
    for model in (make(), models.mixed_precision(make())):
        process = fl.synchronous(fedavg(model, optax.sgd(0.1), batch_size=2), population, lanes=2)
        state = jax.eval_shape(lambda p=process: p.init(KEY))
        program = jax.make_jaxpr(process.step)(state, process.data).jaxpr
        found[model.loss] = operand_types(program, "dot_general", "conv_general_dilated")
    plain, mixed = found.values()
    assert set(plain) == set(mixed) >= {"dot_general"}
    assert all(types == {"float32"} for types in plain.values())
    assert all(types == {"bfloat16"} for types in mixed.values())


def test_what_lasts_and_what_travels_stays_float32():
    population = fl.FederatedData.from_clients({k: {**BYTES, "x": BYTES["x"] / np.float32(255)} for k in range(2)})
    plain = models.resnet(6, blocks=(1,), width=8, norm=models.batch_norm())
    rounds = [
        fedavg(m, optax.adam(0.1), batch_size=3, keep_optimizer_state=True, server_optimizer=optax.adam(0.1))
        for m in (plain, models.mixed_precision(plain))
    ]

    def one_turn(round, data):
        server = round.init(KEY, population)
        client = data.view(jnp.int32(0))
        state = round.init_client(server, client)
        message = round.broadcast(server, state, client, KEY)
        return server, state, message, round.client_update(message, state, client, KEY)

    shapes = [jax.eval_shape(lambda d, r=r: one_turn(r, d), population.on_device()) for r in rounds]
    of = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert of(shapes[0]) == of(shapes[1])
    types = {a.dtype for a in jax.tree.leaves(shapes[1][-1].upload)}
    assert types == {jnp.dtype(jnp.float32)}
    # Statistics of float32, kept so by a step, and moved by it.
    params, model_state = plain.init_from(KEY, population.arrays)
    _, _, after = value_and_grad(models.mixed_precision(plain), params, BYTES, model_state)
    assert of(after) == of(model_state)
    assert not np.allclose(jax.tree.leaves(after)[0], jax.tree.leaves(model_state)[0])


def test_float32_is_the_model_itself_bit_for_bit():
    model, batch = softmax_model(), dict(softmax_data().arrays)
    same = models.mixed_precision(model, jnp.float32)
    params, _ = model.init(KEY)
    assert_same_bits(value_and_grad(same, params, batch), value_and_grad(model, params, batch))
    assert_same_bits(same.metrics(params, (), batch), model.metrics(params, (), batch))


def test_all_but_loss_and_metrics_is_kept():
    model = models.mlp(10)
    mixed = models.mixed_precision(model)
    assert mixed._replace(loss=None, metrics=None) == model._replace(loss=None, metrics=None)


# ---- how exact it is ----


def test_gradients_of_logistic_regression_are_within_the_bound_of_bfloat16():
    """Closed form in float64, ``x' (softmax(x w + b) - y) / n``; every rounding counted at its worst."""
    rng = np.random.default_rng(3)
    n, features, classes = 200, 12, 5
    x, w, b = rng.normal(size=(n, features)), rng.normal(size=(features, classes)), rng.normal(size=classes)
    x, w, b = (np.asarray(a, np.float32).astype(np.float64) for a in (x, w, b))
    y = rng.integers(0, classes, n)
    z = x @ w + b
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    error = p - np.eye(classes)[y]
    exact = {"w": x.T @ error / n, "b": error.mean(0)}
    # x, w and b are rounded, the product, and its sum with b; softmax halves a score's error at most.
    scores = (1 + UNIT) ** 4 - 1
    delta = (scores * (np.abs(x) @ np.abs(w) + np.abs(b))).max(1, keepdims=True) / 2
    # Then the scores' gradient is rounded, x again, and the result.
    summand = ((1 + UNIT) ** 3 - 1) * np.abs(error) + (1 + UNIT) ** 3 * delta
    bound = {"w": np.abs(x).T @ summand / n, "b": summand.mean(0)}

    params = {"w": jnp.asarray(w, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    batch = {"x": x.astype(np.float32), "y": y.astype(np.int32)}
    model = models.from_functions(lambda key: params, lambda p, x: x @ p["w"] + p["b"][None])
    for made, tolerance in ((model, None), (models.mixed_precision(model), bound)):
        _, grads, _ = value_and_grad(made, params, batch)
        for name in exact:
            assert grads[name].dtype == jnp.float32
            off = np.abs(np.asarray(grads[name], np.float64) - exact[name])
            if tolerance is None:
                assert off.max() < 2e-6
            else:
                assert (off <= bound[name]).all()
                assert off.max() > 2e-5  # it is bfloat16


def test_a_sum_over_clients_is_not_narrow():
    """600 uploads of 1 and 3 have the mean 2. In bfloat16, 256 + 1 is 256."""
    data = fl.FederatedData.from_clients({k: {"x": np.float32([1 + 2 * (k % 2)])} for k in range(600)})

    def loss(params, model_state, batch, mask, key, train):
        return -params[None] * batch["x"], model_state

    model = models.mixed_precision(fl.Model(lambda key: (jnp.float32(0), ()), loss, lambda p, s, b: {}))
    for lanes in (1, 16):
        process = fl.synchronous(fedavg(model, optax.sgd(1.0), weighting="uniform"), data, lanes=lanes)
        assert process.params(steps(process, 1)[0]) == 2


def test_local_steps_smaller_than_bfloat16_resolves_add_up():
    """100 steps of 1e-4 from 1; the next number below 1 in bfloat16 is 1 - 0.004."""
    data = fl.FederatedData.from_clients({0: {"x": np.float32([1])}})

    def loss(params, model_state, batch, mask, key, train):
        return params[None] * batch["x"], model_state

    model = models.mixed_precision(fl.Model(lambda key: (jnp.float32(1), ()), loss, lambda p, s, b: {}))
    process = fl.synchronous(fedavg(model, optax.sgd(1e-4), steps=100), data)
    np.testing.assert_allclose(process.params(steps(process, 1)[0]), 0.99, rtol=1e-5)


def test_full_batches_read_in_pieces_are_not_summed_narrow():
    """1,000 pieces of one row, each 1/1000 of a gradient of 1."""
    data = fl.FederatedData.from_clients({0: {"x": np.ones(1000, np.float32)}})
    data = dataclasses.replace(data, tile=1)

    def loss(params, model_state, batch, mask, key, train):
        return params[None] * batch["x"], model_state

    model = models.mixed_precision(fl.Model(lambda key: (jnp.float32(1), ()), loss, lambda p, s, b: {}))
    process = fl.synchronous(fedavg(model, optax.sgd(1.0), steps=1, batch_size=None), data)
    np.testing.assert_allclose(process.params(steps(process, 1)[0]), 0, atol=1e-5)


@pytest.mark.parametrize("use", ["bias", "gather", "take", "scan", "scan_in_jit", "scan_of_reshaped", "scan_back"])
def test_gradients_over_many_uses_are_not_summed_narrow(use):
    """1,000 uses of one parameter with gradient 1 each: examples, occurrences of a token, time steps."""
    n = 1000

    def over_time(w, rows):
        return jax.lax.scan(lambda total, row: (total + (row @ w).astype(jnp.float32), None), jnp.zeros((1,)), rows)[0]

    def backwards(w, rows):
        """Two carries, two rows, and an output at every step; the 500 first steps, from the end, count twice."""

        def step(carry, row):
            t, _ = carry
            out = (row["x"] @ w).astype(jnp.float32) * row["y"]
            return (t + 1, out), jnp.where(t < n // 2, 2, 0) * out

        rows = {"x": rows, "y": jnp.where(jnp.arange(n) < n // 2, 0.0, 1.0)}
        return jax.lax.scan(step, (0, jnp.zeros(1)), rows, reverse=True)[1].sum(0)

    def outputs(params, x):
        w = params["w"]  # [1, 1]
        if use == "bias":
            return jnp.zeros((n, 1), w.dtype) + w
        if use == "gather":
            return w[jnp.zeros(n, jnp.int32)]
        if use == "take":
            return jnp.take(w, jnp.zeros(n, jnp.int32), axis=0)
        rows = jnp.ones((n, 1, 1), w.dtype)
        if use == "scan_of_reshaped":
            w = w.reshape(1).reshape(1, 1).T
        run = {"scan_in_jit": jax.jit(over_time), "scan_back": backwards}.get(use, over_time)
        return run(w[:, 0], rows)[None]

    def loss(params, model_state, batch, mask, key, train):
        assert params["w"].dtype == jnp.bfloat16
        return jnp.full(1, jnp.sum(outputs(params, batch["x"]).astype(jnp.float32))), model_state

    params = {"w": jnp.full((1, 1), 1 / 3)}
    model = models.mixed_precision(fl.Model(lambda key: (params, ()), loss, lambda p, s, b: {}))
    value, grads, _ = value_and_grad(model, params, {"x": jnp.ones(1)})
    rounded = float(jnp.bfloat16(1 / 3))
    np.testing.assert_allclose(value, n * rounded, rtol=1e-5)  # forward: the rounded parameter, everywhere
    np.testing.assert_allclose(grads["w"], [[n]], rtol=1e-5)


def test_casting_late_changes_no_loss():
    """A network with an embedding and a scan: parameters cast where they are used, and cast before."""
    plain = models.char_lstm(21, hidden=8)
    mixed = models.mixed_precision(plain)
    params, _ = plain.init(KEY)
    early = plain._replace(
        loss=lambda params, *rest: plain.loss(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), *rest)
    )
    value, grads, _ = value_and_grad(mixed, params, TOKENS)
    by_hand, by_hand_grads, _ = value_and_grad(early, params, TOKENS)
    np.testing.assert_allclose(value, by_hand, rtol=1e-6)
    np.testing.assert_allclose(value, value_and_grad(plain, params, TOKENS)[0], rtol=UNIT)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=4 * UNIT * np.abs(b).max()), grads, by_hand_grads)


def test_targets_keep_their_digits():
    batch = {"x": np.ones((1, 2), np.float32), "y": np.float32([1000.3])}
    model = models.linear_regression()
    params, _ = model.init_from(KEY, batch)  # zeros
    losses = {
        keep: float(models.mixed_precision(model, keep=keep).metrics(params, (), batch)["loss"][0])
        for keep in (("y",), ())
    }
    np.testing.assert_allclose(losses["y",], np.float32(1000.3) ** 2, rtol=1e-6)
    assert losses[()] == 1000**2  # bfloat16 has 1000 and 1004


@pytest.mark.slow
def test_digits_are_learned_as_well():
    data = fl.datasets.digits(partition=fl.datasets.dirichlet(num_clients=10, alpha=1.0), seed=0)
    model, accuracy = models.mlp(10, hidden=(32,)), {}
    evaluate = fl.global_metrics(data.test)
    for name, made in (("float32", model), ("bfloat16", models.mixed_precision(model))):
        process = fl.synchronous(fedavg(made, optax.sgd(0.1), epochs=2), data.train, fl.uniform(5))
        result = fl.run(process, num_rounds=20, seed=0, evaluate=evaluate, every=20)
        accuracy[name] = result.metrics[-1]["accuracy"]
    assert accuracy["float32"] > 0.9
    assert abs(accuracy["bfloat16"] - accuracy["float32"]) <= 0.01


# ---- the one argument ----


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=False)(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.dropout = nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.linear(self.dropout(x))


@pytest.mark.parametrize(
    "build",
    [
        lambda **options: models.from_flax(Linen(), (1, 4), **options),
        lambda **options: models.from_nnx(Nnx, **options),
        lambda **options: models.from_functions(
            lambda key: {"w": jax.random.normal(key, (4, 3))}, lambda p, x: x @ p["w"], **options
        ),
    ],
    ids=["flax", "nnx", "functions"],
)
def test_the_adapters_take_it_as_an_argument(build):
    batch = dict(softmax_data().arrays)
    mixed, plain = build(compute_dtype=jnp.bfloat16), build()
    params, _ = plain.init(KEY)
    assert_same_bits(mixed.init(KEY), plain.init(KEY))
    value, grads, _ = value_and_grad(mixed, params, batch)
    assert_same_bits((value, grads), value_and_grad(models.mixed_precision(plain), params, batch)[:2])
    exact, exact_grads, _ = value_and_grad(plain, params, batch)
    assert value != exact
    np.testing.assert_allclose(value, exact, rtol=0.02)  # the same draws of dropout
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.05), grads, exact_grads)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (jnp.int8, "dtype must be a floating-point type such as jnp.bfloat16; got"),
        ("bflot16", "did you mean 'bfloat16'"),
        (None, "floating-point"),
        (16, "floating-point"),
    ],
)
def test_other_types_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        models.mixed_precision(models.mlp(10), given)


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match=r"must be a fl\.Model"):
        models.mixed_precision(Linen())
