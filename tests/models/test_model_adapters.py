"""What the adapters find out about a module, and what they refuse."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fedjax_lab as fl
from fedjax_lab import models

KEY = jax.random.key(0)
BATCH = {"x": jnp.ones((3, 2)), "y": jnp.zeros(3, jnp.int32)}
MASK = jnp.array([True, True, False])
NO_MASK = jnp.zeros(3, bool)
# The module's first output as the loss: a look at what reached it.
LOOK = {"loss": lambda outputs, batch: outputs[:, 0], "metrics": {}}


def taking(*names, base):
    """A module whose output is the argument ``names[0]``, and whose signature has all of them."""

    def call(self, x, **given):
        assert set(given) == set(names)
        return jnp.broadcast_to(jnp.asarray(given[names[0]], jnp.float32), x.shape[:1])[:, None]

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(n, kind, default=None) for n in ("self", "x", *names)]
    call.__signature__ = inspect.Signature(parameters)
    return type("Taking", (base,), {"__call__": call})


linen_taking = lambda *names, **options: models.from_flax(taking(*names, base=nn.Module)(), (1, 2), **LOOK, **options)
nnx_taking = lambda *names, **options: models.from_nnx(
    lambda rngs: taking(*names, base=nnx.Module)(), **LOOK, **options
)
both = pytest.mark.parametrize("adapted", [linen_taking, nnx_taking])


def seen(model, train, mask=MASK):
    return model.loss({}, (), BATCH, mask, KEY, train)[0]


class TwoToThree(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(2, 3, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: models.from_flax(nn.Dense), "build it first"),
        (lambda: models.from_flax(TwoToThree(nnx.Rngs(0))), "from_nnx"),
        (lambda: models.from_flax(lambda x: x), "from_functions"),
        (lambda: models.from_nnx(nn.Dense(3)), "a Linen one: use from_flax"),
        (lambda: models.from_nnx(nn.Dense), "a Linen one: use from_flax"),
    ],
)
def test_a_module_of_the_other_kind(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_examples_that_an_nnx_module_can_not_take():
    model = models.from_nnx(TwoToThree)
    with pytest.raises(ValueError, match=r"can't take examples of float32\[5\].*dot_general"):
        model.metrics(*model.init(KEY), BATCH | {"x": jnp.ones((3, 5))})


def test_a_classifier_without_scores():
    model = models.from_functions(lambda key: jnp.zeros(2), lambda params, x: x @ params)
    data = fl.FederatedData.from_clients({0: {"x": np.ones((3, 2)), "y": np.zeros(3, int)}})
    with pytest.raises(ValueError, match=r"scores \[examples, classes\].*shape \(1,\).*squared_error"):
        fl.initial_variables(model, KEY, data)


@both
@pytest.mark.parametrize(
    ("name", "training", "evaluating"),
    [("train", 1, 0), ("training", 1, 0), ("is_training", 1, 0), ("deterministic", 0, 1),
     ("use_running_average", 0, 1)],
)  # fmt: skip
def test_the_modes_argument_is_found(adapted, name, training, evaluating):
    model = adapted(name)
    np.testing.assert_array_equal(seen(model, True), [training] * 3)
    np.testing.assert_array_equal(seen(model, False), [evaluating] * 3)
    np.testing.assert_array_equal(model.metrics({}, (), BATCH)["loss"], [evaluating] * 3)


@both
def test_several_modes_and_the_mask_are_given_together(adapted):
    model = adapted("mask", "train", "deterministic")
    np.testing.assert_array_equal(seen(model, True), [1, 1, 0])
    np.testing.assert_array_equal(seen(model, True, NO_MASK), [1, 1, 1])  # see some_real
    np.testing.assert_array_equal(seen(model, False, None), [1, 1, 1])


@both
def test_arguments_of_other_names(adapted):
    np.testing.assert_array_equal(seen(adapted("learn", train_argument="learn"), True), [1] * 3)
    np.testing.assert_array_equal(seen(adapted("real", mask_argument="real"), True), [1, 1, 0])
    with pytest.raises(ValueError, match="no argument 'trian'; did you mean 'train'"):
        adapted("train", train_argument="trian")


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x)


def test_linen_initialises_from_an_array_a_shape_or_the_data():
    array = models.from_flax(Linear(), BATCH["x"], **LOOK).init(KEY)
    assert array[1] == ()
    for given in ((1, 2), jax.ShapeDtypeStruct((7, 2), jnp.float32)):
        again = models.from_flax(Linear(), given, **LOOK).init(KEY)
        jax.tree.map(np.testing.assert_array_equal, again, array)
    from_data = models.from_flax(Linear(), **LOOK).init_from(KEY, BATCH)
    jax.tree.map(np.testing.assert_array_equal, from_data, array)


def test_linen_refuses_a_missing_or_other_shape():
    with pytest.raises(ValueError, match=r"call init_from.*sample_input"):
        models.from_flax(Linear(), **LOOK).init(KEY)
    with pytest.raises(ValueError, match=r"inputs of shape \(5,\), but the data's have \(2,\)"):
        models.from_flax(Linear(), (1, 5), **LOOK).init_from(KEY, BATCH)
    with pytest.raises(ValueError, match="sample_input must be an array"):
        models.from_flax(Linear(), "image", **LOOK)


def test_bytes_are_image_intensities():
    batch = {"x": jnp.array([[0], [51], [255]], jnp.uint8), "y": BATCH["y"]}
    model = models.from_functions(lambda key: (), lambda params, x: x, **LOOK)
    np.testing.assert_allclose(model.metrics((), (), batch)["loss"], [0, 0.2, 1], rtol=1e-6)

    class Same(nn.Module):
        def __call__(self, x):
            return x

    np.testing.assert_allclose(models.from_flax(Same(), **LOOK).metrics({}, (), batch)["loss"], [0, 0.2, 1], rtol=1e-6)


def test_several_inputs():
    class Product(nn.Module):
        @nn.compact
        def __call__(self, a, b):
            return self.param("w", nn.initializers.ones, (1, 1)) * a * b

    options = {**LOOK, "inputs": lambda batch: (batch["a"], batch["b"])}
    batch = {"a": jnp.array([[2.0], [3]]), "b": jnp.array([[5.0], [7]])}
    model = models.from_flax(Product(), [(1, 1), (1, 1)], **options)
    params, state = model.init(KEY)
    np.testing.assert_array_equal(model.metrics(params, state, batch)["loss"], [10, 21])


def test_a_field_that_is_not_there_is_named():
    model = models.from_flax(Linear(), **LOOK)
    with pytest.raises(ValueError, match=r"field \"x\"; the data have the fields \['pixels'\]"):
        model.init_from(KEY, {"pixels": jnp.ones((1, 2))})


def test_a_loss_over_the_whole_batch_is_refused():
    model = models.from_flax(Linear(), (1, 2), loss=lambda outputs, batch: outputs.mean())
    params, state = model.init(KEY)
    with pytest.raises(ValueError, match=r"loss must give one value .* \(3,\); got shape \(\)"):
        model.loss(params, state, BATCH, MASK, KEY, True)
    wrong = {"half": lambda outputs, batch: outputs}
    model = models.from_flax(Linear(), (1, 2), loss=LOOK["loss"], metrics=wrong)
    with pytest.raises(ValueError, match=r"half must give one value .* got shape \(3, 1\)"):
        model.metrics(params, state, BATCH)


def test_usual_metrics_and_chosen_ones():
    model = models.from_flax(Linear(), (1, 2))
    params, state = model.init(KEY)
    assert set(model.metrics(params, state, BATCH)) == {"loss", "accuracy"}
    one = models.from_flax(Linear(), (1, 2), metrics={"top": models.accuracy})
    assert set(one.metrics(params, state, BATCH)) == {"loss", "top"}


class LinenCounter(nn.Module):
    """A state that the module itself would change in evaluation too."""

    @nn.compact
    def __call__(self, x):
        calls = self.variable("counts", "calls", lambda: jnp.zeros(1))
        if not self.is_initializing():
            calls.value = calls.value + 1
        return jnp.broadcast_to(calls.value, x.shape)


class NNXCounter(nnx.Module):
    def __init__(self, rngs):
        self.calls = nnx.BatchStat(jnp.zeros(1))

    def __call__(self, x):
        self.calls[...] += 1
        return jnp.broadcast_to(self.calls[...], x.shape)


@pytest.mark.parametrize(
    "model", [models.from_flax(LinenCounter(), (1, 2), **LOOK), models.from_nnx(NNXCounter, **LOOK)]
)
def test_evaluation_leaves_every_kind_of_state_alone(model):
    params, state = model.init(KEY)
    (count,) = jax.tree.leaves(state)
    for _ in range(2):
        _, state = model.loss(params, state, BATCH, MASK, KEY, True)
    _, kept = model.loss(params, state, BATCH, MASK, KEY, False)
    assert (count, *jax.tree.leaves(state), *jax.tree.leaves(kept)) == (0, 2, 2)


def test_sown_values_are_refused_as_state():
    class Sower(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("penalties", "size", x.sum())
            return nn.Dense(1)(x)

    model = models.from_flax(Sower(), (1, 2), **LOOK)
    params, state = model.init(KEY)
    with pytest.raises(ValueError, match=r"collections \['penalties'\] change their structure"):
        model.loss(params, state, BATCH, MASK, KEY, True)


def test_linen_streams_of_other_names_are_fed():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jax.random.normal(self.make_rng("noise"), x.shape)

    model = models.from_flax(Noisy(), (1, 2), rngs=("noise",), **LOOK)
    draw = lambda key: model.loss({}, (), BATCH, MASK, key, True)[0]
    np.testing.assert_array_equal(draw(KEY), draw(KEY))
    assert np.all(draw(KEY) != draw(jax.random.key(1)))
    # Evaluation has no key of its own and repeats.
    np.testing.assert_array_equal(*(model.metrics({}, (), BATCH)["loss"] for _ in range(2)))


def test_plain_functions():
    model = models.from_functions(
        lambda key: jnp.array([1.0, -1]),
        lambda w, x: (x @ w)[:, None] * jnp.array([[0.0, 1]]),
        num_classes=2,
    )
    params, state = model.init(KEY)
    assert state == () and model.num_classes == 2 and model.init_from is None
    batch = {"x": jnp.array([[2.0, 0], [0, 2]]), "y": jnp.array([1, 1])}
    losses, _ = model.loss(params, state, batch, jnp.ones(2, bool), None, True)
    np.testing.assert_allclose(losses, np.log1p(np.exp([-2.0, 2])), rtol=1e-6)
    np.testing.assert_array_equal(model.metrics(params, state, batch)["accuracy"], [1, 0])
