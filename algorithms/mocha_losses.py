"""The convex losses of MOCHA, with what stochastic dual coordinate ascent needs of them and of the data.

Shalev-Shwartz and Zhang, "Stochastic Dual Coordinate Ascent Methods for Regularized Loss Minimization", JMLR 2013,
section 6; signs as in Smith et al. 2017, equation 3, where a loss enters the dual as ``conjugate(-alpha)``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.scipy.special import entr

import fedjax_lab as fl

Array = jax.Array


class DualLoss(NamedTuple):
    """A convex loss of a score ``u`` and a target ``y``. All arrays have the same shape.

    Attributes:
      loss: ``(u, y) -> l(u, y)``.
      conjugate: ``(alpha, y) -> l*(-alpha)``, for an ``alpha`` where it is finite, as ``step`` gives it.
      step: ``(alpha, y, u, q)``, the ``a`` that minimises ``l*(-a) + a u + q/2 (a - alpha)^2``.
      signs: whether targets are the classes -1 and 1.
    """

    loss: Callable[[Array, Array], Array]
    conjugate: Callable[[Array, Array], Array]
    step: Callable[[Array, Array, Array, Array], Array]
    signs: bool


def excess(dual: DualLoss, alpha: Array, y: Array, u: Array) -> Array:
    """``l(u) + l*(-alpha) + alpha u``: at least 0, and 0 where alpha belongs to u (Fenchel and Young)."""
    return jnp.maximum(dual.loss(u, y) + dual.conjugate(alpha, y) + alpha * u, 0)


def squared() -> DualLoss:
    """``(u - y)^2 / 2``."""
    return DualLoss(
        loss=lambda u, y: 0.5 * (u - y) ** 2,
        conjugate=lambda alpha, y: 0.5 * alpha**2 - alpha * y,
        step=lambda alpha, y, u, q: (y - u + q * alpha) / (1 + q),
        signs=False,
    )


def hinge() -> DualLoss:
    """``max(0, 1 - y u)``; ``alpha y`` lies in 0..1."""

    def step(alpha, y, u, q):
        # An example of zeros (q = 0) goes to its bound.
        return y * jnp.clip(alpha * y + (1 - y * u) / jnp.maximum(q, 1e-30), 0, 1)

    return DualLoss(lambda u, y: jnp.maximum(1 - y * u, 0), lambda alpha, y: -alpha * y, step, True)


def logistic() -> DualLoss:
    """``log(1 + exp(-y u))``; ``alpha y`` lies in 0..1."""

    def conjugate(alpha, y):
        b = jnp.clip(alpha * y, 0, 1)
        return -entr(b) - entr(1 - b)

    return DualLoss(lambda u, y: jax.nn.softplus(-y * u), conjugate, _logistic_step, True)


def _logistic_step(alpha, y, u, q):
    """The root of ``z + y u + q (sigmoid(z) - alpha y)`` in the logit ``z`` of ``a y``.

    It increases in z by at least 1, and its root lies between ``-c - q`` and ``-c``. Ten bisections leave a
    thousandth of that, from where Newton's method doubles the digits.
    """
    c = y * u - q * alpha * y
    low, high = -c - q, -c
    for _ in range(10):
        z = 0.5 * (low + high)
        above = z + c + q * jax.nn.sigmoid(z) > 0
        low, high = jnp.where(above, low, z), jnp.where(above, z, high)
    z = 0.5 * (low + high)
    for _ in range(4):
        b = jax.nn.sigmoid(z)
        z = jnp.clip(z - (z + c + q * b) / (1 + q * b * (1 - b)), low, high)
    return y * jax.nn.sigmoid(z)


LOSSES = {"hinge": hinge, "logistic": logistic, "squared": squared}


def named(loss: str) -> DualLoss:
    """A loss by its name. Raises ValueError with the nearest one."""
    if not isinstance(loss, str) or loss not in LOSSES:
        near = fl.checks.nearest(str(loss), LOSSES)
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {loss!r}{near}")
    return LOSSES[loss]()


def linear_model(dual: DualLoss, bias: bool) -> tuple[Callable, Callable]:
    """Per-example losses and metrics of a linear model, as a :class:`fedjax_lab.Model` has them."""

    def losses(params, model_state, batch, mask, key, train):
        x, y = examples(batch, bias)
        return dual.loss(x @ params["w"], y), model_state

    def metrics(params, model_state, batch):
        x, y = examples(batch, bias)
        u = x @ params["w"]
        more = {"accuracy": (jnp.where(u > 0, 1, -1) == y).astype(jnp.float32)} if dual.signs else {}
        return {"loss": dual.loss(u, y), **more}

    return losses, metrics


def examples(batch: Any, bias: bool) -> tuple[jax.Array, jax.Array]:
    """Features ``float32[n, features]`` and targets ``float32[n]``."""
    x, y = jnp.asarray(batch["x"]), jnp.asarray(batch["y"]).astype(jnp.float32)
    x = x.reshape(x.shape[0], -1).astype(jnp.float32)
    return (jnp.concatenate([x, jnp.ones((len(x), 1), jnp.float32)], 1) if bias else x), y


def features(data: Any, dual: DualLoss, bias: bool) -> int:
    """How many features the data have. Raises ValueError for data that aren't features and targets."""
    arrays = data.arrays
    if not isinstance(arrays, dict) or not {"x", "y"} <= set(arrays):
        fields = sorted(arrays) if isinstance(arrays, dict) else "none with names"
        raise ValueError(f'mocha() reads features "x" and targets "y"; the data have the fields {fields}')
    x, y = arrays["x"], arrays["y"]
    if y.ndim != 1:
        raise ValueError(f'mocha() needs one target for each example, "y" of shape [examples]; got {list(y.shape)}')
    if dual.signs and not isinstance(y, Tracer):
        targets = np.asarray(y)[data.rows_of()]
        wrong = np.flatnonzero(~np.isin(targets, (-1, 1)))
        if len(wrong):
            ends = np.cumsum(data.sizes)
            k = int(np.searchsorted(ends, wrong[0], side="right"))
            row = int(wrong[0] - ends[k] + np.asarray(data.sizes)[k])
            raise ValueError(
                f"the hinge and logistic losses need targets -1 and 1; client {data.ids[k]!r} has {targets[wrong[0]]} "
                f'(field "y", row {row}). Of classes 0 and 1, give 2 * y - 1'
            )
    return int(np.prod(x.shape[1:], dtype=np.int64)) + bool(bias)
