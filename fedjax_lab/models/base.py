"""Model: three pure functions. Anything with these signatures is a model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fedjax_lab import checks

PyTree = Any


class Variables(NamedTuple):
    """What a model computes with: trained ``params`` and ``model_state`` (batch-norm statistics)."""

    params: PyTree
    model_state: PyTree = ()


class Model(NamedTuple):
    """A model as pure functions.

    Attributes:
      init: ``(key) -> (params, model_state)``.
      loss: ``(params, model_state, batch, mask, key, train) -> (losses: float[batch], model_state)``.
        ``mask: bool[batch]`` marks real examples, ``train`` is a Python bool, ``key`` feeds dropout.
        The losses of masked examples are ignored.
      metrics: ``(params, model_state, batch) -> {name: float[batch]}``, per example.
      init_from: ``(key, batch) -> (params, model_state)`` for models that take the shape of their
        input from the data; ``None`` if ``init`` needs no data.
      num_classes: labels ``batch["y"]`` must be integers below it; ``None`` if it isn't a classifier, or
      classes: ``(params, model_state, batch) -> int`` tells it, by the shape of what a network gives.
      check: ``(FederatedData) -> None`` raises ValueError for examples that the model isn't meant for, naming
        client and row; ``None`` if it takes any.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    loss: Callable[..., tuple[jax.Array, PyTree]]
    metrics: Callable[[PyTree, PyTree, PyTree], dict[str, jax.Array]]
    init_from: Callable[[jax.Array, PyTree], tuple[PyTree, PyTree]] | None = None
    num_classes: int | None = None
    classes: Callable[[PyTree, PyTree, PyTree], int] | None = None
    check: Callable[[Any], None] | None = None


def as_model(value: Any) -> Model:
    """A :class:`Model` from whatever has its functions under their names; what it doesn't have is ``None``.

    Raises:
      ValueError: it has no ``init`` and ``loss``.
    """
    checks.model(value)
    if isinstance(value, Model):
        return value
    return Model(*(getattr(value, name, None) for name in Model._fields))  # pyright: ignore[reportArgumentType]


def reparametrized(
    model: Model, start: Callable[[Any, jax.Array], tuple[PyTree, PyTree]], whole: Callable[[PyTree], PyTree]
) -> Model:
    """The model that trains other parameters than its own.

    Args:
      model: any model.
      start: ``((params, model_state), key) -> (params, model_state)``, the new parameters from what the model makes.
      whole: ``params -> params``, the model's own parameters from the new ones.
    """
    model = as_model(model)
    init_from, classes = model.init_from, model.classes
    return model._replace(
        init=lambda key: start(model.init(key), key),
        init_from=None if init_from is None else lambda key, batch: start(init_from(key, batch), key),
        loss=lambda params, *rest: model.loss(whole(params), *rest),
        metrics=lambda params, *rest: model.metrics(whole(params), *rest),
        classes=None if classes is None else lambda params, *rest: classes(whole(params), *rest),
    )


def initial_variables(model: Model, key: jax.Array, data: Any, params: PyTree = None) -> Variables:
    """The variables that training starts from, after checking that the data suit the model.

    Args:
      model: whose own initialisation is the default.
      key: PRNG key of the initialisation.
      data: FederatedData, for the input's shape and for checking the labels.
      params: parameters to start from instead; the model state still comes from the model.

    Raises:
      ValueError: labels outside the model's classes, other examples that the model isn't meant for, or ``params`` of
        another structure, shape or kind.
    """
    model = as_model(model)
    if model.num_classes is not None:
        checks.labels_in_range(data, model.num_classes)
    if model.check is not None:
        model.check(data)
    if model.init_from is not None:
        sample = jax.tree.map(lambda a: jnp.zeros((1, *a.shape[1:]), a.dtype), data.arrays)
        made = model.init_from(key, sample)
    else:
        made = model.init(key)
    own, model_state = checks.pair(made, "a model's init", "(params, model_state)")
    if model.classes is not None and not isinstance(data.sizes, Tracer):
        checks.labels_in_range(data, _counted(model.classes, own, model_state, data))
    if params is not None:
        _same_shapes(params, own)
    start = Variables(own if params is None else params, model_state)
    # Strongly typed arrays: a weak type would change in the first round and compile it twice.
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), start)


def _counted(classes: Callable, params: PyTree, model_state: PyTree, data: Any) -> int:
    """What ``classes`` says, computing nothing."""
    found = []
    rows = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), data.arrays)
    jax.eval_shape(lambda *args: found.append(classes(*args)), params, model_state, rows)
    return found[0]


def _same_shapes(given: PyTree, own: PyTree) -> None:
    if jax.tree.structure(given) != jax.tree.structure(own):
        raise ValueError(
            f"params has the leaves {[n for n, _ in checks.named_leaves(given)]}, "
            f"the model {[n for n, _ in checks.named_leaves(own)]}"
        )
    for (name, a), (_, b) in zip(checks.named_leaves(given), checks.named_leaves(own), strict=True):
        if np.shape(a) != np.shape(b):
            raise ValueError(f"params leaf {name} has shape {np.shape(a)}, the model's has {np.shape(b)}")
        if jnp.issubdtype(jnp.result_type(b), jnp.inexact) != jnp.issubdtype(jnp.result_type(a), jnp.inexact):
            raise ValueError(f"params leaf {name} is {jnp.result_type(a)}, the model's is {jnp.result_type(b)}")


def difference(new: PyTree, old: PyTree) -> PyTree:
    """``new - old``, leaf by leaf; what a client uploads. Integer leaves (counters) become float32."""
    wide = lambda x: x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)
    return jax.tree.map(lambda a, b: wide(a) - wide(b), new, old)


def add(tree: PyTree, update: PyTree) -> PyTree:
    """``tree + update`` in ``tree``'s dtypes; integer leaves are rounded."""

    def one(a, b):
        total = a + b
        exact = jnp.issubdtype(a.dtype, jnp.inexact)
        return (total if exact else jnp.round(total)).astype(a.dtype)

    return jax.tree.map(one, tree, update)
