"""Losses that lose their second derivatives are refused before a second-order method starts, and no others are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab.models.base import Variables
from fedjax_lab.transforms import meta_sgd, per_fedavg, with_rates
from fedjax_lab.transforms.smoothness import twice_differentiable
from tests.problems import softmax_data

stop = jax.lax.stop_gradient
DATA = softmax_data((6, 4))
INIT = {"w": jnp.ones((4, 3)), "v": jnp.ones((3, 3))}


def network(first=lambda w: w, second=lambda v: v, between=jnp.tanh, loss=None, init=INIT):
    """Two layers whose kernels, activation and loss may be anything."""

    def apply(params, x):
        return between(x @ first(params["w"])) @ second(params["v"])

    return fl.models.from_functions(lambda key: init, apply, **({} if loss is None else {"loss": loss}))


def hinge(scores, batch):
    margins = 1 - scores * (2 * jax.nn.one_hot(batch["y"], 3) - 1)
    return jnp.maximum(margins, 0).sum(1)


def straight_through(w):
    return w + stop(jnp.round(w) - w)


def sine_on_the_host(x):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="expand_dims")


backward_only = jax.custom_vjp(sine_on_the_host)
backward_only.defvjp(lambda x: (sine_on_the_host(x), x), lambda x, g: (g * jnp.cos(x),))


@jax.custom_vjp
def own_rule(x):
    return jnp.sin(x)


own_rule.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


@jax.custom_jvp
def derivative_cut(x):
    return x**3


derivative_cut.defjvp(lambda x, t: (x[0] ** 3, stop(3 * x[0] ** 2) * t[0]))


def built(model, **options):
    return fl.synchronous(fl.compose(fedavg(model, optax.sgd(0.1)), per_fedavg(0.1, **options)), DATA)


INTEGERS = {**INIT, "w": jnp.ones((4, 3), jnp.int32)}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (network(init=INTEGERS), "differentiates parameters, but w is int32"),
        (network(first=stop), "the loss depends on w only through"),
        (network(second=jnp.round), "the loss depends on v only through"),
        (network(second=lambda v: v.astype(jnp.int32).astype(jnp.float32)), "the loss depends on v only through"),
        (network(between=derivative_cut, second=lambda v: stop(v), loss=hinge), "only through"),
        (network(between=backward_only), "which the loss doesn't have"),
    ],
)
def test_refused_when_the_process_is_built(model, words):
    with pytest.raises(ValueError, match=words):
        built(model)


def test_a_gradient_that_lost_its_derivative_is_named():
    """Of ``sum(f(w))`` with ``f' = stop_gradient(3 w^2)``, the gradient is right and its derivative zero."""
    cut = lambda params, x: jnp.sum(derivative_cut(params["w"])) + 0 * x
    model = fl.models.from_functions(lambda key: {"w": INIT["w"]}, cut, loss=lambda out, batch: out[:, 0])
    batch = jax.tree.map(lambda a: a[:2], DATA.arrays)
    with pytest.raises(ValueError, match="the gradient of w depends on w only through"):
        twice_differentiable(model.loss, Variables(*model.init(None)), batch, "this")


def test_other_forms_and_meta_sgd():
    built(network(between=backward_only), form="hessian_free")
    built(network(first=stop), form="first_order")
    with pytest.raises(ValueError, match="the loss depends on w only through"):
        built(network(first=stop), form="hessian_free")
    base = fedavg(with_rates(network(first=stop), 0.1), optax.sgd(0.1))
    with pytest.raises(
        ValueError, match=r"meta_sgd\(\) needs second derivatives, but the loss depends on params/w only"
    ):
        fl.synchronous(fl.compose(base, meta_sgd()), DATA)


@pytest.mark.parametrize(
    "model",
    [
        network(),  # whose softmax takes off a stopped maximum
        network(between=jax.nn.relu),
        network(loss=hinge),  # piecewise linear: its second derivatives are zero, and rightly
        network(loss=lambda scores, batch: jnp.abs(scores).sum(1)),
        network(between=own_rule),
        network(first=straight_through),  # a derivative by convention, which can be differentiated again
        fl.models.mlp(3),
        fl.models.char_lstm(90),
    ],
)
def test_others_pass(model):
    batch = jax.tree.map(lambda a: a[:2], DATA.arrays)
    if model.init_from is not None and model.num_classes == 90:
        batch = {"x": jnp.zeros((2, 5), jnp.int32), "y": jnp.zeros((2, 5), jnp.int32)}
    make = (lambda key: model.init(key)) if model.init_from is None else (lambda key: model.init_from(key, batch))
    variables = jax.eval_shape(lambda key: Variables(*make(key)), jax.random.key(0))
    twice_differentiable(model.loss, variables, batch, "this")
