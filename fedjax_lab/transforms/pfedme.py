"""pFedMe: training on Moreau envelopes."""

from typing import Any

import jax

from fedjax_lab import checks
from fedjax_lab.gradients import client_gradient
from fedjax_lab.local import gradient_oracle
from fedjax_lab.models.base import Variables
from fedjax_lab.round import Round, Tilt, Transform
from fedjax_lab.transforms.personal import received_model
from fedjax_lab.transforms.tilting import tilted

PyTree = Any


def pfedme(lam: Any, *, inner_learning_rate: Any, inner_steps: int = 5) -> Transform:
    """Train on ``min_theta F_k(theta) + lam/2 |theta - w|^2`` instead of ``F_k(w)`` (pFedMe, Dinh et al., NeurIPS 2020,
    algorithm 1).

    The gradient of a client's Moreau envelope is ``lam (w - theta(w))``, where ``theta(w)`` is its personal model.
    Each local step (line 7) approximates ``theta`` by K gradient steps on its mini-batch, from ``w``; the paper's R
    local rounds are the inner round's ``steps``, its eta the client optimizer's rate, its beta a
    ``server_optimizer=optax.sgd(beta)``. Kept per client: nothing. Travels: nothing more.

    Deviation: the personal model that is evaluated is ``theta`` of the model sent, by K steps on all the client's
    data, where the authors' code keeps the ``theta`` of the last mini-batch.

    Args:
      lam: the paper's lambda, how closely ``theta`` stays to ``w``.
      inner_learning_rate: of the steps to ``theta``; times ``lam`` plus the curvature it must stay below 2.
      inner_steps: the paper's K.

    Raises:
      ValueError: a ``lam``, learning rate or number of steps that isn't positive; a Round that sends no model.
    """
    for value, name in ((lam, "lam"), (inner_learning_rate, "inner_learning_rate")):
        checks.positive(value, name)
    checks.positive(inner_steps, "inner_steps", integer=True)

    def transform(round: Round) -> Round:
        sent, loss = received_model(round, "pfedme()"), round.loss
        if loss is None:
            raise ValueError("pfedme() changes local training, but this Round trains no model")

        def personalize(message, state, client, key):
            start = sent(message, state, client, key)
            oracle = gradient_oracle(loss)
            gradient = lambda theta: client_gradient(oracle, Variables(theta, start.model_state), client, key)[0]
            return start._replace(params=prox(gradient, start.params, lam, inner_learning_rate, inner_steps))

        envelope = moreau(lam, inner_learning_rate, inner_steps)
        trained = tilted(lambda received, client: envelope)(round)
        return trained._replace(personalize=personalize, traits=round.traits | {"personal"})

    return transform


def moreau(lam: Any, inner_learning_rate: Any, inner_steps: int) -> Tilt:
    """The tilt from a loss to its Moreau envelope: ``lam (w - theta(w))`` for its gradient."""

    def tilt(oracle):
        def tilted(params, inputs, key):
            _, aux = oracle(params, inputs, key)
            theta = prox(lambda p: oracle(p, inputs, key)[0], params, lam, inner_learning_rate, inner_steps)
            return jax.tree.map(lambda w, t: (lam * (w - t)).astype(w.dtype), params, theta), aux

        return tilted

    return tilt


def prox(gradient, center: PyTree, lam: Any, learning_rate: Any, steps: int) -> PyTree:
    """``steps`` gradient steps on ``f(theta) + lam/2 |theta - center|^2``, from the centre."""

    def step(_, theta):
        pull = lambda t, g, c: (t - learning_rate * (g + lam * (t - c))).astype(t.dtype)
        return jax.tree.map(pull, theta, gradient(theta), center)

    theta = step(0, center)
    return theta if steps == 1 else jax.lax.fori_loop(1, steps, step, theta)
