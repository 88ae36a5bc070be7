"""mixed_precision: clients compute in bfloat16, while whatever lasts or is added up stays float32."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab import checks
from fedjax_lab.models.base import Model, as_model
from fedjax_lab.models.casting import with_late_casts

PyTree = Any


def mixed_precision(model: Model, dtype: Any = jnp.bfloat16, *, keep: Sequence[str] = ("y",)) -> Model:
    """The same model, whose loss and metrics compute in ``dtype``.

    Parameters and the batch's floating-point fields are cast to ``dtype``. Per-example losses and metrics and the
    gradients come out in float32, and so do sums: over a batch, over time steps and occurrences of an embedding,
    over local steps, over clients. Parameters, optimizer states, uploads and the server's state keep their types;
    so does the model state (batch-norm statistics), which is not cast (Micikevicius et al., "Mixed Precision
    Training", ICLR 2018, section 3.1, without loss scaling, which bfloat16's range makes unnecessary).

    What a matrix product multiplies is narrow if all of its operands are: a module with float32 constants of its own,
    or with ``dtype=jnp.float32``, computes in float32 from there on. A weight's gradient over one batch is one
    product, added up in float32 by XLA and rounded once.

    Args:
      model: any :class:`Model`; everything but ``loss`` and ``metrics`` is kept.
      dtype: ``jnp.bfloat16``, for hardware that multiplies it faster (a CPU may well be slower); float16 loses
        gradients below 6e-8.
      keep: fields of the batch that are not cast: targets, of which a regression would lose digits.

    Raises:
      ValueError: a ``dtype`` that isn't a floating-point type; what is no Model.
    """
    kind = _floating(dtype)
    model = as_model(model)
    keep = (keep,) if isinstance(keep, str) else tuple(keep)

    def batch_in(batch):
        if not isinstance(batch, Mapping):
            return _cast(batch, kind)
        return {name: value if name in keep else _cast(value, kind) for name, value in batch.items()}

    def narrow(params):
        shape = lambda p: jax.ShapeDtypeStruct(p.shape, kind if _is_floating(p) else p.dtype)
        return jax.tree.map(shape, params)

    def loss(params, model_state, batch, mask, key, train):
        def inside(params, model_state, batch, mask, key):
            result = model.loss(params, model_state, batch, mask, key, train)
            return checks.pair(result, "a model's loss", "(losses: float[batch], model_state)")

        params = jax.tree.map(jnp.asarray, params)
        arguments = (model_state, batch_in(batch), mask, key)
        losses, new_state = with_late_casts(inside, params, narrow(params), *arguments)
        return widened(losses), typed_as(new_state, model_state)

    def metrics(params, model_state, batch):
        return widened(model.metrics(_cast(params, kind), model_state, batch_in(batch)))

    return model._replace(loss=loss, metrics=metrics)


def widened(tree: PyTree) -> PyTree:
    """The same with floating-point leaves in float32 at least."""
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)) if _is_floating(x) else x
    return jax.tree.map(lambda x: wide(jnp.asarray(x)), tree)


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    """The same with floating-point leaves in ``dtype``."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype) if _is_floating(x) else x, tree)


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def typed_as(new: PyTree, old: PyTree) -> PyTree:
    """``new`` in ``old``'s dtypes; another structure is left for the engine to refuse."""
    if jax.tree.structure(new) != jax.tree.structure(old):
        return new
    return jax.tree.map(lambda n, o: n.astype(jnp.result_type(o)) if _is_floating(o) else n, new, old)


def _floating(dtype: Any) -> Any:
    try:
        kind = None if dtype is None else jax.dtypes.canonicalize_dtype(dtype)  # NumPy's default for None is float64
    except (TypeError, ValueError):
        kind = None
    if kind is None or not jnp.issubdtype(kind, jnp.floating):
        near = checks.nearest(dtype, ("bfloat16", "float16", "float32")) if isinstance(dtype, str) else ""
        raise ValueError(f"dtype must be a floating-point type such as jnp.bfloat16; got {checks.shown(dtype)}{near}")
    return np.dtype(kind)
