"""Predictions mixed with those of a client's own nearest neighbours: kNN-Per. Nothing is trained for it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab import checks, shuffle
from fedjax_lab.client import ClientData
from fedjax_lab.models.base import Variables
from fedjax_lab.round import Round, Transform
from fedjax_lab.transforms.personal import received_model

PyTree = Any
Features = Callable[[Variables, PyTree], jax.Array]
LEAST = -87.0  # a logarithm that float32 still has: what a probability of 0 counts as in the loss


class Neighbours(NamedTuple):
    """The parameters of a client that looks its examples up.

    Attributes:
      params: the model's own.
      keys: ``float32[slots, features]``, representations of the client's examples, its datastore.
      labels: ``int[slots]``, theirs.
      filled: ``bool[slots]``, slots that hold an example.
      lam: ``float32[]``, the neighbours' weight.
    """

    params: PyTree
    keys: jax.Array
    labels: jax.Array
    filled: jax.Array
    lam: jax.Array


def nearest_neighbours(
    features: Features,
    *,
    num_classes: int,
    lam: Any = 0.5,
    k: int = 10,
    scale: Any = 1.0,
    capacity: int | None = None,
) -> Transform:
    """Each client would mix what the model says of an example with what its most similar own examples are (kNN-Per,
    Marfoq et al., "Personalized Federated Learning through Local Memorization", ICML 2022, algorithm 1).

    ``lam p_knn(y | x) + (1 - lam) p(y | x)`` (equation 9), where p_knn lets the k nearest of the client's training
    examples vote for their labels with weights ``exp(-d / scale)`` of the Euclidean distance between
    representations (equation 8). Training is the inner round's, bit for bit. Kept per client: nothing but its data;
    the representations are computed when the model is used. Travels: nothing more.

    The client's own model is Variables with :class:`Neighbours` for parameters, and the Round's metrics take these as
    well as plain ones: ``loss``, minus the logarithm of the mixture's probability, and ``accuracy``. A client without
    examples uses the model alone. The model's probabilities come from its loss, which must be a cross-entropy of
    ``batch["y"]``. A transform that trains what clients would use comes before this one.

    Args:
      features: ``(Variables, batch["x"]) -> float[batch, features]``, the representation, such as the activations of
        the last hidden layer.
      num_classes: labels are ``0..num_classes-1``.
      lam: weight of the neighbours, between 0 and 1; 0 is the model alone. Or several, of which each client takes the
        one with which its own examples are predicted best (the least loss, the first of equals), each by the others.
        The paper takes validation examples for that; the model, which may have been trained with these, is trusted a
        little too much.
      k: neighbours that vote; where a client has fewer examples, all of them.
      scale: of the distances; the authors' code has one, the paper's is 1.
      capacity: keep at most so many of a client's examples, drawn at random; ``None``: all. A datastore has a slot
        for each example of the largest client.

    Raises:
      ValueError: a ``lam`` outside 0..1, or none; a ``k``, scale, capacity or number of classes that isn't positive; a
        Round that sends no model or has no metrics; when traced, representations that aren't a vector for each example.
    """
    weights = _weights(lam)
    checks.positive(scale, "scale")
    for value, name in ((k, "k"), (num_classes, "num_classes"), (1 if capacity is None else capacity, "capacity")):
        checks.positive(value, name, integer=True)
    if not callable(features):
        raise ValueError(f"features must be a function (variables, x) -> [batch, n]; got {checks.shown(features)}")

    def transform(round: Round) -> Round:
        sent, loss, plain = received_model(round, "nearest_neighbours()"), round.loss, round.metrics
        if loss is None or plain is None:
            raise ValueError("nearest_neighbours() mixes a model's predictions, but this Round has no loss and metrics")

        def personalize(message, state, client, key):
            own = sent(message, state, client, key)
            batch, filled = _kept(client, capacity, jax.random.fold_in(key, 0x4E4))
            keys = _represented(features, own, batch["x"])
            store = Neighbours(own.params, keys, batch["y"], filled, jnp.float32(weights[0]))
            if len(weights) > 1:
                by_others = (*_votes(store, keys, num_classes, k, scale, itself=True), model_says(own, batch))
                losses = lambda lam: jnp.where(filled, _loss(_mixed(lam, *by_others), batch["y"]), 0)
                sums = jax.vmap(lambda lam: jnp.sum(losses(lam)))(jnp.asarray(weights))
                store = store._replace(lam=jnp.asarray(weights)[jnp.argmin(sums)])
            return own._replace(params=store)

        def model_says(own, batch):
            return _log_probabilities(loss, own, batch, num_classes)

        def metrics(params, model_state, batch):
            if not isinstance(params, Neighbours):
                return plain(params, model_state, batch)
            own = Variables(params.params, model_state)
            votes, there = _votes(params, _represented(features, own, batch["x"]), num_classes, k, scale)
            mixed = _mixed(params.lam, votes, there, model_says(own, batch))
            hit = jnp.argmax(mixed, axis=1) == batch["y"]
            return {"loss": _loss(mixed, batch["y"]), "accuracy": hit.astype(jnp.float32)}

        def losses(params, *rest):
            return loss(params.params if isinstance(params, Neighbours) else params, *rest)

        return round._replace(personalize=personalize, metrics=metrics, loss=losses, traits=round.traits | {"personal"})

    return transform


def _weights(lam: Any) -> np.ndarray | list:
    """The neighbours' weights to choose among; raises ValueError for those that can't be."""
    several = list(lam) if isinstance(lam, list | tuple | np.ndarray | jax.Array) and np.ndim(lam) else [lam]
    if not several:
        raise ValueError("lam must be the neighbours' weight, or some to choose among; got none")
    for each in several:
        checks.probability(each, "lam")
    return several if len(several) == 1 else np.asarray(several, np.float32)


def _mixed(lam: Any, votes: jax.Array, there: jax.Array, model: jax.Array) -> jax.Array:
    """The logarithm of equation 9; of the model alone where there is no neighbour."""
    weight = lam * there
    return jnp.logaddexp(jnp.log(weight) + jnp.log(votes), jnp.log(1 - weight) + model)


def _loss(mixed: jax.Array, labels: jax.Array) -> jax.Array:
    return -jnp.maximum(jnp.take_along_axis(mixed, labels[:, None], axis=1)[:, 0], LEAST)


def _kept(client: ClientData, capacity: int | None, key: jax.Array) -> tuple[PyTree, jax.Array]:
    """The examples in a client's datastore, leaves ``[slots, ...]``, and which slots hold one."""
    slots = jnp.arange(max(min(capacity or client.max_size, client.max_size), 1))
    filled = slots < client.size
    if capacity is not None and capacity < client.max_size:
        slots = shuffle.permute(slots, client.size, shuffle.seed_of(key))
    batch = client.take(slots)
    if not isinstance(batch, dict) or checks.label_leaf(batch) is None or "x" not in batch:
        raise ValueError('nearest_neighbours() needs data with inputs "x" and integer labels "y", one for each example')
    return batch, filled


def _represented(features: Features, variables: Variables, x: PyTree) -> jax.Array:
    found = features(variables, x)
    examples = jax.tree.leaves(x)[0].shape[0]
    if jnp.ndim(found) != 2 or found.shape[0] != examples:
        raise ValueError(
            f"features(variables, x) must give a vector for each of {examples} examples; got shape {jnp.shape(found)}"
        )
    return found.astype(jnp.float32)


def _votes(
    store: Neighbours, queries: jax.Array, num_classes: int, k: int, scale: Any, itself: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The neighbours' probabilities ``[batch, classes]``, and ``[batch, 1]``: 1, or 0 if there is no neighbour.

    ``itself``: the queries are the store's own keys, each of which has no vote on itself.
    """
    product = jnp.matmul(queries, store.keys.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.sum(queries**2, 1)[:, None] + jnp.sum(store.keys**2, 1)[None] - 2 * product
    may_vote = store.filled[None] & ~(itself & jnp.eye(len(queries), len(store.keys), dtype=bool))
    distances = jnp.where(may_vote, jnp.sqrt(jnp.maximum(squares, 0)), jnp.inf)
    nearest, places = jax.lax.top_k(-distances, min(k, store.keys.shape[0]))
    # Only ratios of weights count: far neighbours, too, must not all vanish.
    top = jnp.where(jnp.isfinite(nearest[:, :1]), nearest[:, :1], 0)
    weights = jnp.exp((nearest - top) / scale)
    kinds = jax.nn.one_hot(store.labels[places], num_classes)
    votes = jnp.einsum("bk,bkc->bc", weights, kinds, precision=jax.lax.Precision.HIGHEST)
    total = jnp.sum(weights, 1, keepdims=True)
    return votes / jnp.where(total > 0, total, 1), jnp.any(may_vote, 1, keepdims=True).astype(jnp.float32)


def _log_probabilities(loss: Callable, variables: Variables, batch: PyTree, num_classes: int) -> jax.Array:
    """``log p(y | x)`` of a model whose loss is a cross-entropy, ``float32[batch, classes]``."""
    labels = batch["y"]
    mask = jnp.ones(labels.shape, bool)

    def of(c):
        relabelled = {**batch, "y": jnp.full_like(labels, c)}
        return -loss(*variables, relabelled, mask, None, False)[0]

    each = jax.vmap(of, out_axes=1)(jnp.arange(num_classes, dtype=labels.dtype))  # the network itself runs once
    return jax.nn.log_softmax(each.astype(jnp.float32), axis=1)
