"""What the adapters share: from a network's outputs to a Model, with checks made while tracing."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.models import losses
from fedjax_lab.models.base import Model
from fedjax_lab.models.precision import mixed_precision, widened

PyTree = Any
Metrics = Mapping[str, losses.PerExample]
# (params, model_state, batch, mask, key, train) -> (outputs, model_state)
Apply = Callable[..., tuple[PyTree, PyTree]]

TRAIN_ARGUMENTS = ("train", "training", "is_training")
EVAL_ARGUMENTS = ("deterministic", "use_running_average")


def features(batch: PyTree) -> jax.Array:
    """``batch["x"]``. Raises ValueError, naming the fields there are, if there is none."""
    if not isinstance(batch, Mapping) or "x" not in batch:
        fields = f"the fields {sorted(batch)}" if isinstance(batch, Mapping) else "no named fields"
        raise ValueError(
            f'the model reads its input from the field "x"; the data have {fields}. '
            "Say what it should read: inputs=lambda batch: batch[...]"
        )
    return batch["x"]


def arguments(inputs: Callable[[PyTree], PyTree], batch: PyTree, params: PyTree = ()) -> tuple[PyTree, ...]:
    """The network's positional arguments; a plain tuple from ``inputs`` gives several.

    Bytes are taken for image intensities and scaled to 0..1, in the type that ``params`` have (float32 if they
    have none): float32 images would make a network compute in float32.
    """
    x = inputs(batch)
    x = x if type(x) is tuple else (x,)
    types = {p.dtype for p in jax.tree.leaves(params) if jnp.issubdtype(p.dtype, jnp.floating)}
    kind = jnp.result_type(*types) if types else jnp.float32
    return jax.tree.map(lambda a: (a / jnp.float32(255)).astype(kind) if a.dtype == jnp.uint8 else a, x)


def model(
    init: Callable[[jax.Array], tuple[PyTree, PyTree]],
    apply: Apply,
    *,
    loss: losses.PerExample = losses.cross_entropy,
    metrics: Metrics | None = None,
    num_classes: int | None = None,
    init_from: Callable[[jax.Array, PyTree], tuple[PyTree, PyTree]] | None = None,
    compute_dtype: Any = None,
) -> Model:
    """A Model from a network with state; see :data:`Apply` and :func:`from_functions`.

    Losses and metrics get outputs in float32 at least, whatever the network computes in.
    """
    if num_classes is not None:
        checks.positive(num_classes, "num_classes", integer=True)
    measured = {"loss": loss, **(losses.usual_metrics(loss) if metrics is None else metrics)}

    def model_loss(params, model_state, batch, mask, key, train):
        outputs, model_state = apply(params, model_state, batch, mask, key, train)
        return _one_each("loss", loss(widened(outputs), batch), batch), model_state

    def model_metrics(params, model_state, batch):
        # A fixed key: should a network draw numbers in evaluation too, it draws the same each time.
        outputs, _ = apply(params, model_state, batch, None, jax.random.key(0), False)
        outputs = widened(outputs)
        return {name: _one_each(name, f(outputs, batch), batch) for name, f in measured.items()}

    def classes(params, model_state, batch):
        """How many the network tells apart; it is a classifier by its loss."""
        outputs = apply(params, model_state, batch, None, jax.random.key(0), False)[0]
        if jnp.ndim(outputs) < 2:
            raise ValueError(
                "cross_entropy needs a model that gives scores [examples, classes]; its outputs for "
                f"{batch_size(batch)} example have shape {jnp.shape(outputs)}. For a regression: "
                "loss=fl.models.squared_error"
            )
        return outputs.shape[-1]

    counted = classes if loss is losses.cross_entropy and num_classes is None else None
    check = _applies_or_not if loss is losses.binary_cross_entropy else None
    made = Model(init, model_loss, model_metrics, init_from, num_classes, counted, check)
    return made if compute_dtype is None else mixed_precision(made, compute_dtype)


def _applies_or_not(data: Any) -> None:
    """Labels of a sigmoid cross-entropy, which any other number would draw below zero."""
    checks.values_in_range(data, "y", 0, 1, "label", "what a label may be, 1 where it applies and 0 where not,")


def from_functions(
    init: Callable[[jax.Array], PyTree],
    apply: Callable[..., PyTree],
    *,
    loss: losses.PerExample = losses.cross_entropy,
    metrics: Metrics | None = None,
    num_classes: int | None = None,
    inputs: Callable[[PyTree], PyTree] = features,
    compute_dtype: Any = None,
) -> Model:
    """A Model from two plain functions.

    Args:
      init: ``(key) -> params``.
      apply: ``(params, x) -> outputs``.
      loss: ``(outputs, batch) -> float[batch]``.
      metrics: further ``{name: (outputs, batch) -> float[batch]}``; the loss is always among them.
        By default what suits the loss: accuracy for a classifier.
      num_classes: refuse labels outside ``0..num_classes-1`` before training starts.
      inputs: what of a batch is ``x``; a tuple gives ``apply`` several arguments.
      compute_dtype: ``jnp.bfloat16`` for :func:`fedjax_lab.models.mixed_precision`; by default as the arrays are.
    """

    def stateless(params, model_state, batch, mask, key, train):
        return apply(params, *arguments(inputs, batch, params)), model_state

    return model(
        lambda key: (init(key), ()),
        stateless,
        loss=loss,
        metrics=metrics,
        num_classes=num_classes,
        compute_dtype=compute_dtype,
    )


def mode_arguments(
    call: Callable, train_argument: str | None, mask_argument: str | None
) -> Callable[[bool, jax.Array | None, int], dict[str, Any]]:
    """``(train, mask, batch size) -> keyword arguments`` that a network's ``__call__`` understands.

    Raises:
      ValueError: ``train_argument`` isn't an argument of ``call``.
    """
    known = inspect.signature(call).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    if train_argument is not None and train_argument not in known and not open_ended:
        near = checks.nearest(train_argument, known)
        raise ValueError(f"the module's __call__ takes no argument {train_argument!r}{near}")
    on = [n for n in TRAIN_ARGUMENTS if n in known]
    off = [n for n in EVAL_ARGUMENTS if n in known]
    if train_argument is not None and train_argument not in on + off:
        (off if train_argument in EVAL_ARGUMENTS else on).append(train_argument)

    def given(train: bool, mask: jax.Array | None, size: int) -> dict[str, Any]:
        keywords: dict[str, Any] = {**dict.fromkeys(on, train), **dict.fromkeys(off, not train)}
        if mask_argument is not None and mask_argument in known:
            keywords[mask_argument] = some_real(mask, size)
        return keywords

    return given


def some_real(mask: jax.Array | None, size: int) -> jax.Array:
    """The mask, or all ones where no row is real: statistics over nothing would be NaN.

    A batch without a real row is only ever computed to be thrown away, but a NaN would spoil the
    gradient of what stays.
    """
    if mask is None:
        return jnp.ones(size, bool)
    return mask | ~mask.any(keepdims=True)


def batch_size(tree: PyTree) -> int:
    return jax.tree.leaves(tree)[0].shape[0]


def _one_each(name: str, values: jax.Array, batch: PyTree) -> jax.Array:
    size = batch_size(batch)
    if jnp.shape(values) != (size,):
        raise ValueError(
            f"{name} must give one value for each example, shape {(size,)}; got shape "
            f"{jnp.shape(values)}. Don't average over the batch, but over what else an example has "
            "(sequence_cross_entropy does, over time)"
        )
    return values
