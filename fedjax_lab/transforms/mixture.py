"""Mixtures of models with weights of each client's own, trained by expectation and maximisation: FedEM."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.client import ClientData
from fedjax_lab.models.base import Model, Variables, as_model
from fedjax_lab.round import Round, Tilt, Transform, chain_tilts, identity
from fedjax_lab.transforms import stacked

PyTree = Any


class Components(NamedTuple):
    """Parameters, or model states, of a mixture's components; leaves ``[components, ...]``."""

    each: PyTree


class Weighted(NamedTuple):
    """A mixture's model state with a client's own weights, which never travels.

    Attributes:
      weights: ``float32[components]``, summing to 1.
      held: the Variables whose losses give the responsibilities, where these are held (local training), or ``()``.
      states: :class:`Components`.
    """

    weights: jax.Array
    held: Any
    states: Components


class MixtureState(NamedTuple):
    """The client's own ``weights: float32[components]``, and the inner state."""

    weights: jax.Array
    inner: Any


def with_components(model: Model, components: int, *, spread: Any = 0.0) -> Model:
    """The mixture of several copies of a model: params ``Components(leaves [components, ...])``.

    Its loss is that of the mixture, ``-log sum_m pi_m exp(-loss_m)``; the components' losses are taken for negative
    log likelihoods, up to a constant (a squared error for one of variance 1/2). The weights ``pi`` are equal, or a
    client's own where a client's model is used (:func:`mixture`). For a classifier, whose labels ``y`` are one a
    row, ``accuracy`` is that of the mixed probabilities; all other metrics are the components' means by weight. A start
    of one's own is ``process.init(key, fl.transforms.Components(params))`` with leaves ``[components, ...]``.

    Args:
      model: of one component. The first begins as ``model.init`` does with the same key, the others with their own.
      components: how many.
      spread: standard deviation of normal noise added to each component's start. Components that start alike, as
        linear ones at zero do, stay alike without it.

    Raises:
      ValueError: no component, a negative ``spread``, what is no model.
    """
    model = as_model(model)
    checks.positive(components, "components", integer=True)
    checks.not_negative(spread, "spread")
    components = int(components)

    def several(make):
        def init(key, *batch):
            keys = stacked.keys_of(key, components)
            made = [make(k, *batch) for k in keys]
            params = [stacked.spread_out(p, spread, k) for (p, _), k in zip(made, keys, strict=True)]
            return Components(stacked.stack(params)), Components(stacked.stack([state for _, state in made]))

        return init

    def loss(params, model_state, batch, mask, key, train):
        weights, held, states = _parts(model_state, components)
        losses, new = _losses(model, params, states, batch, mask, key, train)
        if isinstance(held, Variables):
            fixed, _ = _losses(model, held.params, held.model_state, batch, mask, key, False)
            share = jax.lax.stop_gradient(responsibilities(weights, fixed))
            value = jnp.sum(share * losses, 0)
        else:
            value = -jax.nn.logsumexp(_log(weights)[:, None] - losses, axis=0)
        whole = model_state._replace(states=new) if isinstance(model_state, Weighted) else new
        return value, whole

    def metrics(params, model_state, batch):
        weights, _, states = _parts(model_state, components)
        each = jax.vmap(lambda p, s: model.metrics(p, s, batch))(params.each, states.each)
        found = {name: jnp.tensordot(weights, values.astype(jnp.float32), 1) for name, values in each.items()}
        found["loss"] = loss(params, Weighted(weights, (), states), batch, _all(batch), jax.random.key(0), False)[0]
        labels = batch.get("y") if isinstance(batch, dict) else None
        if model.num_classes is not None and "accuracy" in found and labels is not None and labels.ndim == 1:
            best = _most_likely(model, params, Weighted(weights, (), states), batch, components)
            found["accuracy"] = (best == labels).astype(jnp.float32)
        return found

    def classes(params, model_state, batch):
        first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree.each)
        return model.classes(first(params), first(model_state), batch)

    return model._replace(
        init=several(model.init),
        loss=loss,
        metrics=metrics,
        init_from=None if model.init_from is None else several(model.init_from),
        classes=None if model.classes is None else classes,
    )


def mixture(*, personalize_steps: int = 1) -> Transform:
    """Train the components of a mixture, each client weighing them its own way (FedEM, Marfoq, Neglia, Bellet, Kameni
    and Vidal, "Federated Multi-Task Learning under a Mixture of Distributions", NeurIPS 2021, algorithm 1).

    Over a Round whose model is :func:`with_components`. At the components it receives, a client takes the
    responsibilities ``q_m`` of each of its examples (E step), and their means for its new weights (M step); then it
    does what the inner round does, on ``sum_m q_m loss_m`` with the responsibilities held. Each client would use the
    mixture with its own weights, renewed at the components it is sent; one that never took part begins with equal
    ones. Kept per client: its weights, a number for each component. Travels: all components each way, and no weights.

    Deviations: held responsibilities are computed anew for each batch, by a pass of the received components over
    it, rather than stored. An optimizer that looks at all parameters at once (clipping by a global norm)
    sees all components.

    Args:
      personalize_steps: passes over a client's data in which its weights are renewed for use, each an E and an M
        step with the components held; 0 uses those of its last round.

    Raises:
      ValueError: a Round without a model or a loss; when the process is built, one whose model has no components.
    """
    checks.not_negative(personalize_steps, "personalize_steps", integer=True)

    def transform(round: Round) -> Round:
        model, view, loss = round.model, round.view, round.loss
        if model is None or view is None or loss is None or round.personalize is None:
            raise ValueError("mixture() trains a mixture's components, but this Round trains no model")
        if {"partial", "many_models"} & round.traits:
            raise ValueError("mixture() comes before transforms that split or multiply the model: put it first")

        def init_client(server, client):
            number = _count(model.get(server))
            return MixtureState(jnp.full(number, 1 / number, jnp.float32), round.init_client(server, client))

        def client_update(message, state, client, key, tilt=identity):
            received = view.get(message)
            new = renewed(loss, received, state.weights, client, key)
            own = chain_tilts(_holding(received, state.weights), tilt)
            out = round.client_update(message, state.inner, client, key, tilt=own)
            return out._replace(state=MixtureState(new, out.state))

        def personalize(message, state, client, key):
            variables, weights = round.personalize(message, state.inner, client, key), state.weights
            for _ in range(personalize_steps):
                weights = renewed(loss, variables, weights, client, key)
            return variables._replace(model_state=Weighted(weights, (), variables.model_state))

        return round._replace(
            init_client=init_client,
            broadcast=lambda server, state, client, key: round.broadcast(server, state.inner, client, key),
            client_update=client_update,
            personalize=personalize,
            traits=round.traits | {"personal", "partial"},
        )

    return transform


def responsibilities(weights: jax.Array, losses: jax.Array) -> jax.Array:
    """``q[m, i]``, in proportion to ``weights[m] exp(-losses[m, i])``; each example's sum to 1."""
    return jax.nn.softmax(_log(weights)[:, None] - losses, axis=0)


def renewed(loss: Any, variables: Variables, weights: jax.Array, client: ClientData, key: jax.Array) -> jax.Array:
    """An E and an M step for a client's weights: the means of its examples' responsibilities, ``float32[components]``.

    ``loss`` is the mixture's: the gradient of ``-log sum_m pi_m exp(-loss_m)`` in ``log pi`` is ``-q``. A client
    without examples keeps its weights.
    """

    def of_batch(logs, batch, mask):
        state = Weighted(jnp.exp(logs), (), variables.model_state)
        return jnp.sum(jnp.where(mask, loss(variables.params, state, batch, mask, key, False)[0], 0))

    def add(total, batch, mask, positions, _):
        return total - jax.grad(of_batch)(_log(weights), batch, mask)

    total = client.fold(add, jnp.zeros_like(weights))
    return jnp.where(client.size > 0, total / jnp.maximum(jnp.sum(total), jnp.finfo(jnp.float32).tiny), weights)


def _holding(received: Variables, weights: jax.Array) -> Tilt:
    """The tilt to the M step's objective: the responsibilities are those at ``received``."""

    def tilt(oracle):
        def tilted(params, inputs, key):
            model_state, batch, mask = inputs
            grads, (value, state) = oracle(params, (Weighted(weights, received, model_state), batch, mask), key)
            return grads, (value, state.states)

        return tilted

    return tilt


def _count(variables: Variables) -> int:
    if not isinstance(variables.params, Components):
        rates = isinstance(variables.params, dict) and set(variables.params) == {"params", "rates"}
        made = "with_components(with_rates(model, rate), M)" if rates else "with_components(model, M)"
        raise ValueError(
            f"mixture() weighs components, around everything else of the model: write fl.transforms.{made}"
        )
    return jax.tree.leaves(variables.params)[0].shape[0]


def _parts(model_state: PyTree, count: int) -> tuple[jax.Array, Any, Components]:
    if isinstance(model_state, Weighted):
        return model_state
    return jnp.full(count, 1 / count, jnp.float32), (), model_state


def _losses(model: Model, params, states, batch, mask, key, train):
    """Each component's losses ``[components, batch]``, and the new states."""
    one = lambda p, s: model.loss(p, s, batch, mask, key, train)
    losses, new = jax.vmap(one)(params.each, states.each)
    return losses, Components(new)


def _log(weights: jax.Array) -> jax.Array:
    """A weight that has become 0 stays so; its logarithm must not be infinite, or 0 times it is not a number."""
    return jnp.log(jnp.maximum(weights, jnp.finfo(jnp.float32).tiny))


def _all(batch: PyTree) -> jax.Array:
    return jnp.ones(jax.tree.leaves(batch)[0].shape[0], bool)


def _most_likely(model: Model, params, state: Weighted, batch, components: int) -> jax.Array:
    """The label with the largest probability under the mixture; the network's outputs are computed once."""

    def nats(label):
        guess = batch | {"y": jnp.full_like(batch["y"], label)}
        losses, _ = _losses(model, params, state.states, guess, _all(batch), jax.random.key(0), False)
        return -jax.nn.logsumexp(_log(state.weights)[:, None] - losses, axis=0)

    return jnp.argmin(jax.vmap(nats)(jnp.arange(model.num_classes)), axis=0)
