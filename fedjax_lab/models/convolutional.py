"""The convolutional networks of the federated-learning papers, for images of any size.

Images are ``[batch, height, width, channels]``; a missing channel axis is added, and rows of a
square number of pixels (as LEAF stores FEMNIST) are folded.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.models.base import Model
from fedjax_lab.models.flax_adapter import from_shape

MNIST_SHAPE = (28, 28, 1)


def as_images(x: jax.Array) -> jax.Array:
    """``x`` as ``[batch, height, width, channels]``. Raises ValueError for what can't be images."""
    if x.ndim == 2 and math.isqrt(x.shape[1]) ** 2 == x.shape[1]:
        side = math.isqrt(x.shape[1])
        return x.reshape(-1, side, side, 1)
    if x.ndim == 3:
        return x[..., None]
    if x.ndim != 4:
        raise ValueError(
            "a convolutional model needs images [height, width, channels], [height, width] or a "
            f"square number of pixels; an example's x has shape {x.shape[1:]}"
        )
    return x


def max_pool(x: jax.Array) -> jax.Array:
    """The maxima of 2x2 windows; an odd last row or column is left out.

    As a reshape, whose gradient is cheaper on a CPU than that of a windowed reduction. Positive
    ties share the gradient, where the windowed one gives it to the first.
    """
    n, h, w, c = x.shape
    if h < 2 or w < 2:
        raise ValueError(
            f"the images are too small for this model: {h} x {w} pixels are left where 2 x 2 are pooled "
            "(fedavg_cnn takes images of 4 x 4 and more, emnist_cnn of 6 x 6)"
        )
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return _block_max(x.reshape(n, h // 2, 2, w // 2, 2, c))


@jax.custom_jvp
def _block_max(blocks: jax.Array) -> jax.Array:
    """``[n, h, w, c]`` of ``[n, h, 2, w, 2, c]``.

    Its gradient is ``jnp.max``'s, in steps of which XLA:CPU makes kernels that read each number once: it fuses a
    count of ties by ``jnp.sum`` with the layer above. W2's rounds take .92 of the time.
    """
    return blocks.max((2, 4))


@_block_max.defjvp
def _block_max_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (blocks,), (moves,) = primals, tangents
    largest = _block_max(blocks)
    ties = sum((blocks[:, :, i, :, j] == largest).astype(blocks.dtype) for i in range(2) for j in range(2))
    moved = jnp.where(blocks == largest[:, :, None, :, None], moves, 0)
    return largest, jnp.sum(moved, (2, 4)) / ties


class FedAvgCNN(nn.Module):
    """conv 5x5x32, pool, conv 5x5x64, pool, dense 512, scores; ReLU after each but the last."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = as_images(x)
        x = max_pool(nn.relu(nn.Conv(32, (5, 5), name="conv_0")(x)))
        x = max_pool(nn.relu(nn.Conv(64, (5, 5), name="conv_1")(x)))
        x = nn.relu(nn.Dense(512, name="dense")(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.num_classes, name="output")(x)


class EmnistCNN(nn.Module):
    """conv 3x3x32, conv 3x3x64, pool, dropout, dense 128, dropout, scores; no padding."""

    num_classes: int
    dropout: tuple[float, float]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = as_images(x)
        x = nn.relu(nn.Conv(32, (3, 3), padding="VALID", name="conv_0")(x))
        x = max_pool(nn.relu(nn.Conv(64, (3, 3), padding="VALID", name="conv_1")(x)))
        x = nn.Dropout(self.dropout[0], deterministic=not train)(x)
        x = nn.relu(nn.Dense(128, name="dense")(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(self.dropout[1], deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="output")(x)


def fedavg_cnn(num_classes: int = 10, input_shape: Sequence[int] | None = None) -> Model:
    """The MNIST CNN of FedAvg (McMahan et al. 2017, section 3).

    Two 5x5 convolutions with 32 and 64 channels, each with 2x2 max pooling, a dense layer of 512
    units, softmax; padding keeps the image's size. Parameters: 1,663,370 for 28x28x1 and 10
    classes. ``init`` assumes 28x28x1 unless ``input_shape`` says otherwise; with data, their shape
    counts.
    """
    checks.positive(num_classes, "num_classes", integer=True)
    return from_shape(FedAvgCNN(num_classes), input_shape, MNIST_SHAPE, num_classes=num_classes)


def emnist_cnn(
    num_classes: int = 62,
    input_shape: Sequence[int] | None = None,
    *,
    dropout: tuple[float, float] = (0.25, 0.5),
) -> Model:
    """The EMNIST CNN of Reddi et al. 2021 ("Adaptive Federated Optimization"), also FedJAX's.

    Two 3x3 convolutions without padding, 32 and 64 channels, 2x2 max pooling, a dense layer of 128
    units, softmax. Parameters: 1,206,590 for 28x28x1 and 62 classes. ``init`` assumes 28x28x1
    unless ``input_shape`` says otherwise; with data, their shape counts (at least 6x6).

    Args:
      num_classes: 62 for letters and digits, 10 for digits only.
      input_shape: one example's shape; ``None`` takes it from the data.
      dropout: rates after the pooling and after the dense layer; ``(0, 0)`` turns dropout off.
    """
    checks.positive(num_classes, "num_classes", integer=True)
    if len(dropout) != 2 or not all(0 <= rate < 1 for rate in dropout):
        raise ValueError(f"dropout needs two rates of at least 0 and below 1; got {dropout}")
    module = EmnistCNN(num_classes, (dropout[0], dropout[1]))
    return from_shape(module, input_shape, MNIST_SHAPE, num_classes=num_classes)
