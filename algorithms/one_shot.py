"""One-shot federated learning (Guha, Talwalkar and Smith, "One-Shot Federated Learning", 2019, sections 2 and 3).

Every client trains a model to the end by itself, once; the server keeps some of them as an ensemble. What it predicts
with is :func:`ensemble_of` the state, or one model that learned to predict the same on unlabelled or synthetic inputs
(:func:`fedjax_lab.ensembles.distil`). Further rounds, "few-shot", go on from the members' mean. Kept per client:
nothing. Travels: a model down; up a model and its score, if it is good enough to be sent at all.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fedjax_lab as fl

SELECTIONS = ("validation", "data", "random")
_EMPTY = -1.0  # the score of a place that no model has taken


class OneShotState(NamedTuple):
    """The members' mean ``variables``; the ``members``, leaves ``[members, ...]``, their scores and weights.

    A place that no model has taken yet has the weight 0.
    """

    variables: fl.Variables
    members: fl.Variables
    scores: jax.Array
    weights: jax.Array


class Candidate(NamedTuple):
    """A client's model, and by what it is chosen."""

    variables: fl.Variables
    score: jax.Array


def one_shot(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    members: int,
    selection: str = "validation",
    baseline: Any = 0.0,
    validation: float = 0.2,
    metric: str = "accuracy",
    weighting: Any = "uniform",
    **local_work: Any,
) -> fl.Round:
    """Clients train alone; the best of their models become an ensemble on the server.

    Args:
      model: the model.
      client_optimizer: the local optimizer.
      members: how many models the server keeps, the paper's k; memory on the server is that of a cohort's models.
      selection: which ones: the best on a part of the client's data that it doesn't train on (``"validation"``, the
        paper's cross-validation selection), those of the clients with most data (``"data"``), or random ones.
      baseline: the least score, or number of examples, with which a client sends its model at all.
      validation: the share of a client's data that is kept out for its score.
      metric: the model's metric that is the score, the better the higher, at least 0.
      weighting: the members' weights in their mean and in the ensemble.
      **local_work: ``epochs``, ``steps``, ``batch_size`` and ``static`` of :func:`fedjax_lab.local_training`.

    Raises:
      ValueError: no members, another selection, a share outside 0..1, a negative baseline; a metric that the model
        doesn't have, when the process is built.
    """
    fl.checks.positive(members, "members", integer=True)
    if selection not in SELECTIONS:
        near = fl.checks.nearest(str(selection), SELECTIONS)
        raise ValueError(f"selection must be one of {SELECTIONS}{near}; got {fl.checks.shown(selection)}")
    fl.checks.shares(validation)
    fl.checks.not_negative(baseline, "baseline")
    fl.checks.weighting(weighting)
    local = fl.local_training(model, client_optimizer, **local_work)

    def init(key, data, params=None):
        variables = fl.initial_variables(model, key, data, params)
        places = jax.tree.map(lambda x: jnp.stack([x] * members), variables)
        return OneShotState(variables, places, jnp.full(members, _EMPTY), jnp.zeros(members))

    def score(variables, held_out, client, key):
        if selection == "data":
            return client.size
        if selection == "random":
            return jax.random.uniform(key)
        return _mean_metric(model, metric, variables, held_out)

    def client_update(message, state, client, key, tilt=fl.identity):
        rest, held_out = client.split(1 - validation) if selection == "validation" else (client, client)
        trained = local(message, rest, key, tilt)
        found = jnp.asarray(score(trained.variables, held_out, client, jax.random.fold_in(key, 0x5C0)), jnp.float32)
        return fl.ClientOutput(
            upload=Candidate(trained.variables, found),
            weight=fl.client_weight(weighting, client),
            sent=found >= baseline,
            metrics={"loss": trained.loss, "score": found},
            trained=trained,
        )

    def server_update(server, candidates, key):
        chosen = _best(server, candidates)
        return chosen._replace(variables=mean_of(chosen)), {"members": jnp.sum(chosen.weights > 0)}

    return fl.Round(
        init=init,
        broadcast=lambda server, state, client, key: server.variables,
        client_update=client_update,
        aggregate=_candidates(),
        server_update=server_update,
        personalize=lambda message, state, client, key: message,
        local=local,
        loss=model.loss,
        metrics=model.metrics,
        model=fl.Lens(lambda s: s.variables, lambda s, v: s._replace(variables=v)),
        view=fl.Lens(lambda m: m, lambda m, v: v),
        traits=frozenset({"members"}),
    )


def _mean_metric(model: fl.Model, metric: str, variables: fl.Variables, client: Any) -> jax.Array:
    """The mean of a metric over a client's examples. Raises ValueError if the model doesn't have it."""

    def measured(batch, mask):
        found = model.metrics(variables.params, variables.model_state, batch)
        if metric not in found:
            near = fl.checks.nearest(metric, found) or f"; it has {sorted(found)}"
            raise ValueError(f"one_shot() chooses by {metric!r}, which the model doesn't measure{near}")
        return {metric: found[metric]}

    return fl.mean_over_client(measured, client)[metric]


def _candidates() -> fl.Aggregator:
    """A cohort's models, scores and weights, ``[cohort, ...]``; who sent nothing has those of an empty place."""

    def reduce(uploads, weights, ok, messages, env):
        return uploads.variables, jnp.where(ok, uploads.score, _EMPTY), jnp.where(ok, weights, 0)

    return fl.Aggregator(lambda u, w, m, env: (u, w), lambda sums, env: sums, reduce)


def _best(server: OneShotState, candidates: tuple) -> OneShotState:
    """The state with the best models of its members and the candidates as members."""
    both = jax.tree.map(lambda *x: jnp.concatenate(x), tuple(server[1:]), tuple(candidates))
    best = jax.lax.top_k(both[1], len(server.scores))[1]
    return OneShotState(server.variables, *jax.tree.map(lambda x: x[best], both))


def mean_of(state: OneShotState) -> fl.Variables:
    """The members' weighted mean: what one round of FedAvg with so much local work would give of them."""
    shares = state.weights / jnp.where(jnp.sum(state.weights) > 0, jnp.sum(state.weights), 1)

    def one(x, like):
        mean = jnp.tensordot(shares, x.astype(jnp.promote_types(x.dtype, jnp.float32)), axes=1)
        return (mean if jnp.issubdtype(like.dtype, jnp.inexact) else jnp.round(mean)).astype(like.dtype)

    return jax.tree.map(one, state.members, state.variables)


def ensemble_of(model: fl.Model, state: OneShotState) -> fl.Model:
    """The members of a finished run as one model, see :func:`fedjax_lab.ensembles.ensemble`.

    Raises:
      ValueError: nobody's model was good enough to be sent.
    """
    taken = np.flatnonzero(np.asarray(state.weights) > 0)
    if not len(taken):
        raise ValueError("the ensemble has no members: no client's model reached the baseline")
    members = jax.tree.map(lambda x: x[taken], state.members)
    return fl.ensembles.ensemble(model, members, state.weights[taken])
