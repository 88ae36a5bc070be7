"""Linear models and multi-layer perceptrons. Inputs of any shape are flattened."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from fedjax_lab import checks
from fedjax_lab.models import losses
from fedjax_lab.models.base import Model
from fedjax_lab.models.flax_adapter import from_shape


class Dense(nn.Module):
    """Hidden layers of ``hidden`` units each, then ``outputs`` scores."""

    outputs: int
    hidden: Sequence[int] = ()
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    bias: bool = True
    zeros: bool = False  # start at zero, which only a convex model can leave

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for i, units in enumerate(self.hidden):
            x = self.activation(nn.Dense(units, name=f"hidden_{i}")(x))
        start: dict[str, Any] = {"kernel_init": nn.initializers.zeros} if self.zeros else {}
        return nn.Dense(self.outputs, use_bias=self.bias, name="output", **start)(x)


def logistic_regression(num_classes: int, input_shape: Sequence[int] | None = None, *, bias: bool = True) -> Model:
    """Multinomial logistic regression: softmax of a linear map, convex.

    The model of FedProx's synthetic and MNIST experiments (Li et al. 2020), of pFedMe's MCLR and,
    without bias, of power-of-choice (Cho et al. 2020). It starts at zero; FedProx's code starts at
    a Glorot draw instead, and defines an L2 penalty of 0.001 that it never adds to the loss.
    Parameters: ``(features + 1) * num_classes``; 7,850 for MNIST, 610 for 60 features.

    Args:
      num_classes: labels are ``0..num_classes-1``.
      input_shape: one example's shape; ``None`` takes it from the data.
      bias: whether the linear map has an offset.
    """
    module = Dense(_count(num_classes), bias=bias, zeros=True)
    return from_shape(module, input_shape, None, num_classes=num_classes)


def linear_regression(outputs: int = 1, input_shape: Sequence[int] | None = None, *, bias: bool = True) -> Model:
    """Least squares, started at zero: loss ``(w x + b - y)**2`` without a factor of one half.

    ``y: float[batch]`` for one output, else ``float[batch, outputs]``.
    """
    module = Dense(_count(outputs, "outputs"), bias=bias, zeros=True)
    return from_shape(module, input_shape, None, loss=losses.squared_error)


def tag_regression(num_tags: int = 500, input_shape: Sequence[int] | None = None) -> Model:
    """One logistic regression for each tag: Stack Overflow's tag prediction (Reddi et al. 2021).

    ``x: float[batch, words]`` counts or frequencies, ``y: [batch, num_tags]`` zeros and ones.
    Metric ``recall_at_5``. Parameters: 5,000,500 for 10,000 words and 500 tags. It starts at zero.
    """
    module = Dense(_count(num_tags, "num_tags"), zeros=True)
    return from_shape(module, input_shape, (10_000,), loss=losses.binary_cross_entropy)


def mlp(
    num_classes: int,
    hidden: Sequence[int] = (64,),
    input_shape: Sequence[int] | None = None,
    *,
    activation: Callable[[jax.Array], jax.Array] = nn.relu,
) -> Model:
    """A multi-layer perceptron, by default with one hidden layer of 64 ReLU units.

    IFCA's network for rotated MNIST (Ghosh et al. 2020) is ``mlp(10, hidden=(200,))``.
    Parameters by default: ``(features + 1) * 64 + 65 * num_classes``; 4,810 for 8x8 digits.

    Args:
      num_classes: labels are ``0..num_classes-1``.
      hidden: the units of each hidden layer.
      input_shape: one example's shape; ``None`` takes it from the data.
      activation: of the hidden layers.
    """
    if isinstance(hidden, int | float):
        raise ValueError(f"hidden must list the units of each layer, for instance ({hidden},); got {hidden}")
    for units in hidden:
        checks.positive(units, "hidden", integer=True, unit=" of units in each layer")
    module = Dense(_count(num_classes), tuple(hidden), activation)
    return from_shape(module, input_shape, None, num_classes=num_classes)


def two_nn(num_classes: int = 10, input_shape: Sequence[int] | None = None) -> Model:
    """The 2NN of FedAvg: two hidden layers of 200 ReLU units (McMahan et al. 2017, section 3).

    Parameters: 199,210 for MNIST's 784 pixels and 10 classes. ``init`` assumes those 784 unless
    ``input_shape`` says otherwise; with data, their shape counts.
    """
    module = Dense(_count(num_classes), (200, 200))
    return from_shape(module, input_shape, (28, 28, 1), num_classes=num_classes)


def _count(number: int, name: str = "num_classes") -> int:
    checks.positive(number, name, integer=True)
    return number
