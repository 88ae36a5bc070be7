"""Does an optimizer go downhill? An optax optimizer doesn't show its learning rate, but it can be asked."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

PATIENCE = 100  # steps that an optimizer may gather gradients, or warm up, before it moves


def goes_downhill(optimizer: optax.GradientTransformation, name: str) -> None:
    """Refuse an optimizer whose learning rate is zero, negative or not finite.

    A scalar parameter at 0 with gradient 1 must become negative within ``PATIENCE`` steps, and never
    positive before that. An optimizer that asks for particular parameters (masks, layers) or whose
    hyper-parameters are traced (a sweep's) can't be asked so, and passes.

    Raises:
      ValueError: it goes uphill, or nowhere.
    """
    gradient, param = jnp.float32(1), jnp.float32(0)
    with jax.ensure_compile_time_eval():
        try:
            state = optimizer.init(param)
            update, state = optimizer.update(gradient, state, param)
        except Exception:  # written for other parameters than a scalar: there is nothing to learn from it
            return
        for _ in range(PATIENCE):
            if isinstance(update, Tracer):
                return
            if float(update) != 0:
                break
            update, state = optimizer.update(gradient, state, param)
    value: Any = float(np.asarray(update))
    if not value < 0:
        what = (
            "moves nowhere" if value == 0 else f"moves a parameter of gradient 1 by {value:+g}, which is not downhill"
        )
        raise ValueError(f"{name} {what}: its learning rate must be positive and finite")
