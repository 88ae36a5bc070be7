"""from_flax: any Flax Linen module as a Model."""

from collections.abc import Callable, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.models import functional, losses
from fedjax_lab.models.base import Model
from fedjax_lab.models.precision import typed_as

PyTree = Any


def from_flax(
    module: nn.Module,
    sample_input: Any = None,
    *,
    loss: losses.PerExample = losses.cross_entropy,
    metrics: functional.Metrics | None = None,
    num_classes: int | None = None,
    inputs: Callable[[PyTree], PyTree] = functional.features,
    train_argument: str | None = None,
    mask_argument: str | None = "mask",
    rngs: Sequence[str] = ("dropout",),
    compute_dtype: Any = None,
) -> Model:
    """A Model from a Linen module.

    The module's ``params`` are what is trained; every other collection (``batch_stats``, ...) is
    the model state, changed in training and left alone in evaluation.

    Args:
      module: its ``__call__`` may take ``train``, ``training``, ``is_training``, ``deterministic``
        or ``use_running_average``, which then say whether it trains, and ``mask: bool[batch]``, the
        real examples. Every ``nn.BatchNorm`` that gets no mask from the module gets this one.
      sample_input: what the module is initialised with if there are no data: an array, a
        ShapeDtypeStruct or a shape, with the batch axis: ``(1, 28, 28, 1)``; several in a list if
        the module takes several arguments. With data, the shape is theirs.
      loss: ``(outputs, batch) -> float[batch]``.
      metrics: further ``{name: (outputs, batch) -> float[batch]}``; the loss is always among them.
        By default what suits the loss: accuracy for a classifier.
      num_classes: refuse labels outside ``0..num_classes-1`` before training starts.
      inputs: what of a batch the module gets, ``batch["x"]``; a tuple gives several arguments.
        Bytes (uint8) are taken for image intensities and scaled to 0..1.
      train_argument: the argument that says whether the module trains, if none of the above does.
      mask_argument: the argument that takes the mask; ``None`` if ``mask`` means something else.
      rngs: names of the random streams that training draws from, all fed from the loss's key.
      compute_dtype: ``jnp.bfloat16`` for :func:`fedjax_lab.models.mixed_precision`; by default as the module says.

    Raises:
      ValueError: what is no Linen module; an unknown ``train_argument``; by ``init`` without ``sample_input``; by
        ``init_from`` for data that don't fit ``sample_input``; while tracing, for a loss that isn't
        per example and for a collection whose structure changes (sown values).
    """
    if not isinstance(module, nn.Module):
        is_class = isinstance(module, type) and issubclass(module, nn.Module)
        hint = "build it first, Net(...)" if is_class else "NNX modules go to from_nnx, functions to from_functions"
        raise ValueError(f"from_flax needs a Linen module; got {checks.shown(module)}: {hint}")
    modes = functional.mode_arguments(type(module).__call__, train_argument, mask_argument)
    sample = None if sample_input is None else _sample(sample_input)

    def streams(key):
        return {name: jax.random.fold_in(key, i) for i, name in enumerate(("params", *rngs))}

    @jax.jit  # initialisation op by op takes seconds for a deep network
    def start(key, x):
        variables = module.init(streams(key), *x, **modes(False, None, functional.batch_size(x)))
        # Partitioning boxes, if any, would not survive arithmetic on the parameters.
        variables = dict(flax.core.unfreeze(nn.meta.unbox(variables)))
        return variables.pop("params", {}), variables or ()

    def init(key):
        if sample is None:
            raise ValueError(
                "this model takes its input's shape from the data: call init_from(key, batch), or "
                "build it with sample_input=(1, 28, 28, 1) or the like (one of fl.models: with "
                "input_shape=(28, 28, 1))"
            )
        return start(key, _zeros(sample))

    def init_from(key, batch):
        x = functional.arguments(inputs, batch)
        if sample is not None:
            _same_parameters(start, key, sample, x)
        return start(key, x)

    def apply(params, model_state, batch, mask, key, train):
        x = functional.arguments(inputs, batch, params)
        size = functional.batch_size(x)
        call = dict(modes(train, mask, size))
        call["rngs"] = None if key is None else streams(key)
        variables = {"params": params, **(model_state or {})}
        if not model_state:
            return module.apply(variables, *x, **call), model_state
        # Mutable in evaluation too, for modules that write there; what they write is then dropped.
        with nn.intercept_methods(_masking(functional.some_real(mask, size))):
            outputs, state = module.apply(variables, *x, mutable=list(model_state), **call)
        return outputs, _same_collections(flax.core.unfreeze(state), model_state) if train else model_state

    return functional.model(
        init,
        apply,
        loss=loss,
        metrics=metrics,
        num_classes=num_classes,
        init_from=init_from,
        compute_dtype=compute_dtype,
    )


def _masking(mask: jax.Array) -> Callable:
    """Gives batch normalisation the mask of the real examples, where the module itself passes none on."""

    def call(next_method, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__" and "mask" not in kwargs:
            x = args[0] if args else kwargs["x"]
            if x.ndim and x.shape[0] == mask.shape[0]:
                kwargs = {**kwargs, "mask": mask.reshape(-1, *[1] * (x.ndim - 1))}
        return next_method(*args, **kwargs)

    return call


def from_shape(
    module: nn.Module,
    input_shape: Sequence[int] | None,
    usual: Sequence[int] | None,
    **options: Any,
) -> Model:
    """A Model for inputs of ``input_shape`` (one example's), or of whatever shape the data have.

    ``usual`` is the paper's shape: what ``init`` falls back on without holding the data to it.
    """
    if input_shape is not None:
        return from_flax(module, (1, *input_shape), **options)
    model = from_flax(module, **options)
    return model if usual is None else model._replace(init=from_flax(module, (1, *usual), **options).init)


def _sample(given: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    if isinstance(given, tuple) and all(isinstance(n, int) for n in given):
        return (jax.ShapeDtypeStruct(given, jnp.float32),)
    if isinstance(given, list):
        return tuple(s for one in given for s in _sample(one))
    shape, dtype = getattr(given, "shape", None), getattr(given, "dtype", None)
    if shape is None or dtype is None:
        raise ValueError(f"sample_input must be an array, a shape or a ShapeDtypeStruct; got {given!r}")
    return (jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype)),)


def _zeros(shapes: tuple[jax.ShapeDtypeStruct, ...]) -> tuple[jax.Array, ...]:
    return functional.arguments(lambda s: tuple(jnp.zeros(a.shape, a.dtype) for a in s), shapes)


def _same_parameters(start: Callable, key: jax.Array, sample: PyTree, x: PyTree) -> None:
    asked, found = (jax.tree.map(lambda a: a.shape[1:], s) for s in (sample, x))
    if asked == found:
        return
    by_sample, by_data = (jax.eval_shape(start, key, s)[0] for s in (_zeros(sample), x))
    if jax.tree.map(jnp.shape, by_sample) != jax.tree.map(jnp.shape, by_data):
        one = lambda shapes: shapes[0] if len(shapes) == 1 else shapes
        raise ValueError(f"the model was built for inputs of shape {one(asked)}, but the data's have {one(found)}")


def _same_collections(new: PyTree, old: PyTree) -> PyTree:
    if jax.tree.structure(new) != jax.tree.structure(old):
        changed = [n for n in old if jax.tree.structure(new[n]) != jax.tree.structure(old[n])]
        raise ValueError(
            f"the module's collections {changed} change their structure in a training call (sown "
            "values do); a model state must keep it. Remove the sow, or return them as outputs"
        )
    return typed_as(new, old)  # statistics of float64 inputs would be float64
