"""Several models as one: their mean prediction, and a single model that learns to predict the same (distillation)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab import checks
from fedjax_lab.data import FederatedData
from fedjax_lab.local import ClientOptimizer, local_training
from fedjax_lab.models.base import Model, Variables, as_model, initial_variables

PyTree = Any
# (batch) -> probabilities float[batch, classes]
Teacher = Callable[[PyTree], jax.Array]


def log_probabilities(model: Model, variables: Variables, batch: PyTree, num_classes: int) -> jax.Array:
    """``log p(y | x)`` of a model whose loss is a cross-entropy: ``float32[batch, classes]``.

    The loss of each class as if it were the label; the network itself runs once. Labels aren't needed.
    """
    examples = jax.tree.leaves(batch)[0].shape[0]
    mask = jnp.ones(examples, bool)

    def of(c):
        return -model.loss(*variables, {**batch, "y": jnp.full(examples, c)}, mask, jax.random.key(0), False)[0]

    each = jax.vmap(of, out_axes=1)(jnp.arange(num_classes, dtype=jnp.int32))
    return jax.nn.log_softmax(each.astype(jnp.float32), axis=1)


def ensemble(model: Model, members: Variables, weights: Any = None) -> Model:
    """The model that predicts the mean of its members' probabilities (Guha, Talwalkar and Smith, "One-Shot Federated
    Learning", 2019, section 3).

    Args:
      model: the members', a classifier with a cross-entropy.
      members: their Variables stacked, leaves ``[members, ...]``; they are what ``init`` gives.
      weights: ``float[members]``, at least 0; by default all count the same.

    Returns:
      A Model of the metrics ``loss`` and ``accuracy``.

    Raises:
      ValueError: no members, members of unlike numbers, a model that isn't a classifier, weights that don't fit.
    """
    classes, count = _classes(model, "an ensemble"), count_of(members)
    if weights is not None:
        checks.weights(weights, "weights", count)
    table = jnp.ones(count) if weights is None else jnp.asarray(weights, jnp.float32)

    def log_mean(params, model_state, batch):
        each = jax.vmap(lambda p, s: log_probabilities(model, Variables(p, s), batch, classes))(params, model_state)
        shares = table / jnp.sum(table)
        return jax.nn.logsumexp(each, axis=0, b=shares[:, None, None])

    def loss(params, model_state, batch, mask, key, train):
        return _nats(log_mean(params, model_state, batch), batch["y"]), model_state

    def metrics(params, model_state, batch):
        found = log_mean(params, model_state, batch)
        right = (jnp.argmax(found, 1) == batch["y"]).astype(jnp.float32)
        return {"loss": _nats(found, batch["y"]), "accuracy": right}

    return Model(lambda key: (members.params, members.model_state), loss, metrics, num_classes=classes)


def teacher_of(model: Model, variables: Variables) -> Teacher:
    """``(batch) -> `` the probabilities of a classifier, an :func:`ensemble` among them."""
    classes = _classes(model, "a teacher")
    return lambda batch: jnp.exp(log_probabilities(model, variables, batch, classes))


def student(model: Model, teacher: Teacher) -> Model:
    """The model with another loss: the cross-entropy with a teacher's probabilities, on examples without labels.

    (Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, at temperature 1.) It trains as any
    model does, on one device or by any algorithm on clients' unlabelled data.
    """
    classes = _classes(model, "a student")

    def loss(params, model_state, batch, mask, key, train):
        batch = _labelled(batch)
        # Once as training does it, for what it makes of the model's state.
        labels = jnp.zeros_like(batch["y"])
        _, after = model.loss(params, model_state, {**batch, "y": labels}, mask, key, train)
        theirs = jax.lax.stop_gradient(teacher(batch))
        ours = log_probabilities(model, Variables(params, model_state), batch, classes)
        return -jnp.sum(theirs * ours, axis=1), after

    return as_model(model)._replace(loss=loss, num_classes=None, classes=None)


def distil(
    model: Model,
    teacher: Teacher,
    inputs: PyTree,
    optimizer: ClientOptimizer,
    *,
    start: Variables | None = None,
    seed: int = 0,
    **local_work: Any,
) -> Variables:
    """One model trained to predict what a teacher does on unlabelled inputs (Guha et al. 2019, section 3).

    Args:
      model: the student's.
      teacher: see :func:`teacher_of`.
      inputs: arrays ``[examples, ...]`` by name, without labels: public data, or :func:`normal_inputs`.
      optimizer: from optax.
      start: Variables to start from; by default the model's own initialisation.
      seed: of initialisation and batches.
      **local_work: ``epochs``, ``steps`` and ``batch_size`` of :func:`fedjax_lab.local_training`.

    Raises:
      ValueError: no inputs; a model that isn't a classifier.
    """
    if not jax.tree.leaves(inputs) or not all(np.shape(leaf)[:1] > (0,) for leaf in jax.tree.leaves(inputs)):
        raise ValueError("distillation needs inputs: arrays {name: [examples, ...]} of at least one example")
    pupil = student(model, teacher)
    data = FederatedData.from_clients({"inputs": _labelled(inputs)}).on_device()
    begin, run_key = jax.random.split(jax.random.key(seed))
    start = initial_variables(model, begin, data) if start is None else start
    local = local_training(pupil, optimizer, **local_work)
    return jax.jit(lambda start, data, key: local(start, data.view(jnp.int32(0)), key).variables)(start, data, run_key)


def normal_inputs(key: jax.Array, count: int, mean: PyTree, deviation: PyTree) -> PyTree:
    """Synthetic inputs: independent normal entries of given means and standard deviations.

    What clients need to publish for it are two aggregates, each shaped as one example (analytics can have them under
    secure aggregation and with noise).

    Args:
      key: PRNG key.
      count: of examples.
      mean, deviation: arrays by name, shaped as one example.
    """
    checks.positive(count, "count", integer=True)
    leaves, structure = jax.tree.flatten(mean)
    keys = jax.random.split(key, max(len(leaves), 1))
    draw = lambda k, m, s: jnp.asarray(m)[None] + jnp.asarray(s)[None] * jax.random.normal(k, (count, *jnp.shape(m)))
    drawn = [draw(k, m, s) for k, m, s in zip(keys, leaves, jax.tree.leaves(deviation), strict=False)]
    return jax.tree.unflatten(structure, drawn)


def count_of(members: PyTree) -> int:
    """How many models are stacked. Raises ValueError for none, or for leaves that disagree."""
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(members)}
    if len(counts) != 1 or counts == {()}:
        raise ValueError(f"members must be Variables with leaves [members, ...]; theirs begin with {sorted(counts)}")
    (count,) = counts.pop()
    if not count:
        raise ValueError("an ensemble of no members predicts nothing: give at least one")
    return count


def _labelled(batch: PyTree) -> PyTree:
    """The batch with labels in it, which nothing depends on, for losses that want some."""
    if not isinstance(batch, dict):
        raise ValueError(f'inputs must be named, such as {{"x": images}}; got {type(batch).__name__}')
    examples = jax.tree.leaves(batch)[0].shape[0]
    return batch if "y" in batch else {**batch, "y": np.zeros(examples, np.int32)}


def _nats(log_probability: jax.Array, labels: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(log_probability, labels[:, None], axis=1)[:, 0]


def _classes(model: Model, who: str) -> int:
    classes = as_model(model).num_classes
    if classes is None:
        raise ValueError(f"{who} needs a classifier: a model with num_classes, whose loss is a cross-entropy")
    return classes
