"""from_nnx: any Flax NNX module as a Model."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from fedjax_lab import checks
from fedjax_lab.models import functional, losses
from fedjax_lab.models.base import Model
from fedjax_lab.models.precision import typed_as

PyTree = Any
# Reseeded in each call, and made anew in each call: neither is carried from step to step.
_TRANSIENT = (nnx.RngState, nnx.Intermediate)


def from_nnx(
    module: nnx.Module | Callable[..., nnx.Module],
    *,
    loss: losses.PerExample = losses.cross_entropy,
    metrics: functional.Metrics | None = None,
    num_classes: int | None = None,
    inputs: Callable[[PyTree], PyTree] = functional.features,
    trainable: Any = nnx.Param,
    train_argument: str | None = None,
    mask_argument: str | None = "mask",
    compute_dtype: Any = None,
) -> Model:
    """A Model from an NNX module: parameters and state become plain dicts of arrays.

    The module is taken apart once and put together inside each call, so that the Model is pure.
    Batch-norm statistics and whatever else isn't trained are the model state, changed in training
    and left alone in evaluation. Random streams are seeded from the loss's key in each call.

    Args:
      module: a factory, ``rngs -> module`` or a class that takes ``rngs=``, so that ``init``
        depends on its key; or a built module, whose parameters are where every ``init`` starts.
        ``.train()`` and ``.eval()`` set its mode; if its ``__call__`` takes ``train``,
        ``deterministic``, ... or ``mask: bool[batch]`` or ``rngs``, it gets these too (see
        :func:`from_flax`).
      trainable: NNX filter of what is trained, for instance ``nnx.LoRAParam``.
      loss, metrics, num_classes, inputs, train_argument, mask_argument, compute_dtype: as for :func:`from_flax`.

    Raises:
      ValueError: neither a module nor a factory of one; an unknown ``train_argument``; while
        tracing, for a loss that isn't per example or a random draw in training without a key.
    """
    if isinstance(module, linen.Module) or (isinstance(module, type) and issubclass(module, linen.Module)):
        raise ValueError(f"from_nnx needs an NNX module; got {checks.shown(module)}, a Linen one: use from_flax")
    make = _factory(module)
    abstract = nnx.eval_shape(lambda: make(jax.random.key(0)))
    if not isinstance(abstract, nnx.Module):
        raise ValueError(f"from_nnx needs an NNX module or a factory of one; it made a {type(abstract)}")
    graph, *templates = nnx.split(abstract, trainable, _TRANSIENT, ...)
    params_like, random_like, state_like = templates
    call = type(abstract).__call__
    modes = functional.mode_arguments(call, train_argument, mask_argument)
    takes_rngs = "rngs" in inspect.signature(call).parameters
    stateful = bool(jax.tree.leaves(state_like))

    def parts(net):
        _, params, _, state = nnx.split(net, trainable, _TRANSIENT, ...)
        return _plain(params), _plain(state) if stateful else ()

    def init(key):
        return parts(make(key))

    def apply(params, model_state, batch, mask, key, train):
        if key is None and train and (takes_rngs or jax.tree.leaves(random_like)):
            raise ValueError("this model draws random numbers in training: its loss needs a key")
        key = jax.random.key(0) if key is None else _typed(key)
        state = _filled(state_like, model_state) if stateful else state_like
        net = nnx.merge(graph, _filled(params_like, params), _seeded(random_like, key), state)
        net.train() if train else net.eval()
        x = functional.arguments(inputs, batch, params)
        size = functional.batch_size(x)
        keywords = modes(train, mask, size)
        if stateful and train:
            _mask_batch_norms(net, functional.some_real(mask, size))
        if takes_rngs:
            keywords["rngs"] = nnx.Rngs(jax.random.fold_in(key, 0))
        try:
            outputs = net(*x, **keywords)
        except TypeError as error:  # JAX's, of shapes that don't go together
            shapes = ", ".join(f"{a.dtype}{list(a.shape[1:])}" for a in jax.tree.leaves(x))
            raise ValueError(f"the module can't take examples of {shapes}: {error}") from error
        return outputs, typed_as(parts(net)[1], model_state) if train else model_state

    return functional.model(
        init, apply, loss=loss, metrics=metrics, num_classes=num_classes, compute_dtype=compute_dtype
    )


def _mask_batch_norms(net: nnx.Module, mask: jax.Array) -> None:
    """Has batch normalisations take ``mask: bool[batch]``, the real examples, where the module passes none on."""

    class Masked(nnx.BatchNorm):
        def __call__(self, x, *args, **kwargs):
            if kwargs.get("mask") is None and x.ndim and x.shape[0] == mask.shape[0]:
                kwargs["mask"] = mask.reshape(-1, *[1] * (x.ndim - 1))
            return super().__call__(x, *args, **kwargs)

    for _, node in nnx.iter_graph(net):
        if type(node) is nnx.BatchNorm:
            node.__class__ = Masked


def _factory(module: Any) -> Callable[[jax.Array], Any]:
    """``key -> module``; a built module is copied, so that later changes don't reach the Model."""
    if isinstance(module, nnx.Module):
        built = nnx.clone(module)
        return lambda key: nnx.clone(built)
    if not callable(module):
        raise ValueError(f"from_nnx needs an NNX module or a factory of one; got {module!r}")
    made_by = module
    while isinstance(made_by, functools.partial):
        made_by = made_by.func
    if isinstance(made_by, type):  # a class's own signature is its metaclass's: anything
        made_by = made_by.__init__
    by_name = "rngs" in inspect.signature(made_by).parameters
    return lambda key: module(rngs=nnx.Rngs(key)) if by_name else module(nnx.Rngs(key))


def _plain(state: Any) -> Any:
    """An NNX state as nested dicts with string keys (a list's indices too) and arrays as leaves."""
    if isinstance(state, nnx.Variable):
        return state.get_value()
    if isinstance(state, nnx.State):
        return {str(k): _plain(v) for k, v in state.items()}
    return state


def _filled(like: Any, values: Any) -> Any:
    """The inverse of :func:`_plain`: ``like``'s variables with other values."""
    if isinstance(like, nnx.Variable):
        return like.replace(jax.tree.map(jnp.asarray, values))  # NumPy's can't be assigned to
    if isinstance(like, nnx.State):
        return nnx.State({k: _filled(v, values[str(k)]) for k, v in like.items()})
    return values


def _seeded(like: nnx.State, key: jax.Array) -> nnx.State:
    """Random streams that start anew, each from its own part of ``key``."""
    number = 0

    def fresh(path, variable):
        nonlocal number
        if not isinstance(variable, nnx.RngKey):
            return variable.replace(jnp.zeros(variable.shape, variable.dtype))
        number += 1
        own = jax.random.fold_in(key, number)
        return variable.replace(jax.random.split(own, variable.shape) if variable.shape else own)

    return nnx.map_state(fresh, like)


def _typed(key: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(key) if key.dtype == jnp.uint32 else key
