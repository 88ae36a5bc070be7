"""Losses and metrics of a network's outputs, one value per example.

Each is ``(outputs, batch) -> float[batch]`` and reads the labels from ``batch["y"]``. Label 0 of a
sequence is padding, as in LEAF, TensorFlow Federated and FedJAX.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

PyTree = Any
PerExample = Callable[[PyTree, PyTree], jax.Array]

PAD = 0  # the label of a sequence's padding


def labels(batch: PyTree) -> jax.Array:
    """``batch["y"]``. Raises ValueError, naming the fields there are, if there is none."""
    if not isinstance(batch, Mapping) or "y" not in batch:
        raise ValueError(
            f'the loss reads labels from the field "y"; the data have {_fields(batch)}. '
            "Rename the field, or give a loss of your own: loss=lambda outputs, batch: ..."
        )
    return batch["y"]


def _fields(batch: PyTree) -> str:
    return f"the fields {sorted(batch)}" if isinstance(batch, Mapping) else "no named fields"


def _class_labels(outputs: jax.Array, batch: PyTree) -> jax.Array:
    y = labels(batch)
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(f'labels "y" must be integer class numbers; got dtype {y.dtype}')
    if y.shape != outputs.shape[:-1]:
        raise ValueError(
            f'labels "y" have shape {y.shape}, the model\'s outputs {outputs.shape}; '
            f"they need shape {outputs.shape[:-1]}, one class number for each row of scores"
        )
    return y


def _targets(outputs: jax.Array, batch: PyTree) -> jax.Array:
    y = labels(batch)
    if y.shape != outputs.shape:
        raise ValueError(f'targets "y" have shape {y.shape}, the model\'s outputs {outputs.shape}')
    return y.astype(outputs.dtype)


def _per_example(values: jax.Array) -> jax.Array:
    """The mean over all axes but the first."""
    return values.reshape(values.shape[0], -1).mean(1)


def _over_tokens(values: jax.Array, y: jax.Array) -> jax.Array:
    """The mean over each sequence's real tokens; 0 for a sequence of padding only."""
    real = y != PAD
    return jnp.where(real, values, 0).sum(-1) / jnp.maximum(real.sum(-1), 1)


FEW_CLASSES = 256  # up to here a comparison with every class is cheaper than a gather and its scatter


def _nats(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """Softmax cross-entropy of integer labels; NaN for a label that isn't a class."""
    classes = outputs.shape[-1]
    if classes > FEW_CLASSES:
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y)
    # The gradient of a gather is a scatter, a third of a small model's step on a CPU.
    own = lax.eq(y[..., None], lax.broadcasted_iota(y.dtype, (*y.shape, classes), y.ndim))
    score = jnp.sum(lax.select(own, outputs, lax.full_like(outputs, 0)), -1)
    nats = lax.sub(_log_sum_exp(outputs), score)
    return lax.select((y >= 0) & (y < classes), nats, lax.full_like(nats, jnp.nan))


def _log_sum_exp(x: jax.Array) -> jax.Array:
    """``jax.nn.logsumexp(x, -1)`` in 16 instead of 39 operations, its gradient's included: every start traces them."""
    largest = lax.reduce_max(lax.stop_gradient(x), (x.ndim - 1,))
    largest = lax.select(lax.is_finite(largest), largest, lax.full_like(largest, 0))
    total = jnp.sum(lax.exp(lax.sub(x, lax.broadcast_in_dim(largest, x.shape, range(x.ndim - 1)))), -1)
    return lax.add(lax.log(total), largest)


# ---- losses ----


def cross_entropy(outputs: jax.Array, batch: PyTree) -> jax.Array:
    """Softmax cross-entropy in nats, ``outputs: float[batch, classes]``, ``y: int[batch]``.

    Raises:
      ValueError: labels that aren't integers or aren't one for each example.
    """
    y = _class_labels(outputs, batch)
    return _nats(outputs, y)


def sequence_cross_entropy(outputs: jax.Array, batch: PyTree) -> jax.Array:
    """The mean cross-entropy of a sequence's tokens, padding left out.

    ``outputs: float[batch, time, vocabulary]``, ``y: int[batch, time]``, 0 where there is padding.
    A sequence of padding only has loss 0. (FedJAX divides by ``time`` instead, so that short
    sequences count less.)
    """
    y = _class_labels(outputs, batch)
    return _over_tokens(_nats(outputs, y), y)


def binary_cross_entropy(outputs: jax.Array, batch: PyTree) -> jax.Array:
    """Sigmoid cross-entropy, the mean over an example's labels (as in Keras, whose rates it keeps).

    ``outputs: float[batch, labels]``, ``y`` of the same shape, 1 where the label applies.
    """
    return _per_example(optax.sigmoid_binary_cross_entropy(outputs, _targets(outputs, batch)))


def squared_error(outputs: jax.Array, batch: PyTree) -> jax.Array:
    """``(outputs - y)**2``, the mean over an example's outputs; no factor of one half.

    ``outputs: float[batch, ...]`` and ``y`` of the same shape; ``[batch, 1]`` fits ``[batch]``.
    """
    if outputs.ndim == 2 and outputs.shape[1] == 1 and labels(batch).ndim == 1:
        outputs = outputs[:, 0]
    return _per_example(optax.squared_error(outputs, _targets(outputs, batch)))


# ---- metrics ----


def accuracy(outputs: jax.Array, batch: PyTree) -> jax.Array:
    """1 where the highest score is the label's, else 0."""
    return (outputs.argmax(-1) == _class_labels(outputs, batch)).astype(jnp.float32)


def sequence_accuracy(outputs: jax.Array, batch: PyTree) -> jax.Array:
    """The share of a sequence's real tokens that are predicted; 0 for one of padding only."""
    y = _class_labels(outputs, batch)
    return _over_tokens((outputs.argmax(-1) == y).astype(jnp.float32), y)


def recall_at(k: int) -> PerExample:
    """The metric: the share of an example's labels among the ``k`` highest scores.

    As for Stack Overflow's tags in Reddi et al. 2021 (k = 5). 0 for an example without labels.
    """

    def recall(outputs: jax.Array, batch: PyTree) -> jax.Array:
        y = _targets(outputs, batch)
        top = jax.lax.top_k(outputs, min(k, outputs.shape[-1]))[1]
        found = jnp.take_along_axis(y, top, axis=-1).sum(-1)
        return (found / jnp.maximum(y.sum(-1), 1)).astype(jnp.float32)

    return recall


def usual_metrics(loss: PerExample) -> dict[str, PerExample]:
    """What is measured beside a loss unless the user says otherwise."""
    beside: dict[Any, dict[str, PerExample]] = {
        cross_entropy: {"accuracy": accuracy},
        sequence_cross_entropy: {"accuracy": sequence_accuracy},
        binary_cross_entropy: {"recall_at_5": recall_at(5)},
    }
    return beside.get(loss, {})
