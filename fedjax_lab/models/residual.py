"""Residual networks with a choice of normalisation, which matters when clients differ."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from fedjax_lab import checks
from fedjax_lab.models.base import Model
from fedjax_lab.models.convolutional import as_images
from fedjax_lab.models.flax_adapter import from_shape

# (x: [batch, height, width, channels], mask: bool[batch], train) -> x, called inside a Linen module
Norm = Callable[[jax.Array, jax.Array, bool], jax.Array]


def batch_norm(momentum: float = 0.9, epsilon: float = 1e-5) -> Norm:
    """Batch normalisation over the real examples of a batch; its statistics are model state.

    ``momentum`` is what the running statistics keep in each step.
    """

    def normalise(x, mask, train):
        norm = nn.BatchNorm(use_running_average=not train, momentum=momentum, epsilon=epsilon)
        return norm(x, mask=mask.reshape(-1, *(1,) * (x.ndim - 1)))

    return normalise


def group_norm(groups: int = 8, epsilon: float = 1e-5) -> Norm:
    """Group normalisation (Wu & He 2018), which has no state and doesn't mix examples.

    Hsieh et al. 2020 ("The Non-IID Data Quagmire") found that under label skew it recovers much of
    the accuracy that batch normalisation loses. Reddi et al. 2021 use 32 groups (64 to 512
    channels).
    """
    checks.positive(groups, "groups", integer=True)

    def normalise(x, mask, train):
        if x.shape[-1] % groups:
            raise ValueError(f"group_norm({groups}) needs a multiple of {groups} channels; got {x.shape[-1]}")
        return nn.GroupNorm(groups, epsilon=epsilon)(x)

    return normalise


class ResNet(nn.Module):
    """Stages of basic blocks; each but the first halves the image and doubles the channels."""

    num_classes: int
    blocks: Sequence[int]
    width: int
    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array) -> jax.Array:
        x = self._conv(as_images(x), self.width)
        x = nn.relu(self.norm(x, mask, train))
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                x = self._block(x, self.width * 2**stage, stride, mask, train)
        return nn.Dense(self.num_classes, name="output")(x.mean((1, 2)))

    def _conv(self, x, channels, size=3, stride=1):
        start = nn.initializers.he_normal()
        return nn.Conv(channels, (size, size), strides=stride, use_bias=False, kernel_init=start)(x)

    def _block(self, x, channels, stride, mask, train):
        y = nn.relu(self.norm(self._conv(x, channels, stride=stride), mask, train))
        y = self.norm(self._conv(y, channels), mask, train)
        if x.shape != y.shape:
            x = self.norm(self._conv(x, channels, size=1, stride=stride), mask, train)
        return nn.relu(x + y)


def resnet(
    num_classes: int = 10,
    input_shape: Sequence[int] | None = None,
    *,
    blocks: Sequence[int] = (1, 1, 1),
    width: int = 16,
    norm: Norm | None = None,
) -> Model:
    """A residual network for small images (He et al. 2016, section 4.2): no pooling at the start.

    By default ResNet-8 with group normalisation, 78,042 parameters for 32x32x3 and 10 classes.
    ``blocks=(3, 3, 3)`` is ResNet-20 (272,474; the paper says 0.27 million). ``blocks=(2, 2, 2, 2),
    width=64, norm=group_norm(32)`` is a ResNet-18 (11,173,962) as federated learning uses it since
    Reddi et al. 2021, whose own has the stem for large images. Shortcuts that change shape are 1x1
    convolutions. ``init`` assumes 32x32x3 unless ``input_shape`` says otherwise; with data, their
    shape counts.

    Args:
      num_classes: labels are ``0..num_classes-1``.
      input_shape: one example's shape; ``None`` takes it from the data.
      blocks: basic blocks (two convolutions each) of every stage.
      width: channels of the first stage; they double from stage to stage.
      norm: ``batch_norm()``, ``group_norm(8)`` (the default) or any function of that kind.
    """
    norm = group_norm() if norm is None else norm
    if not callable(norm):
        raise ValueError(f"norm must be a function, batch_norm() or group_norm(8); got {norm!r}")
    for name, value in (
        ("num_classes", num_classes),
        ("width", width),
        *(("blocks", b) for b in blocks),
    ):
        checks.positive(value, name, integer=True)
    module = ResNet(num_classes, tuple(blocks), width, norm)
    return from_shape(module, input_shape, (32, 32, 3), num_classes=num_classes)
