"""MOCHA (Smith et al., "Federated Multi-Task Learning", NIPS 2017, algorithm 1).

``min_W,Omega sum_t sum_i l(x_ti'w_t, y_ti) + R(W, Omega)``: a linear model for each client, coupled by a regularizer.
With Omega fixed, the dual is solved by stochastic dual coordinate ascent on the clients: client t goes on with the
dual variables alpha_t of its examples (line 6, the data-local subproblem of equation 4) and sends the change of
``v_t = X_t alpha_t`` (line 7), however far it came: little work and dropped nodes slow it down and change nothing else
(theorem 1). The server keeps v and ``W = V M`` (line 9), and learns Omega between rounds (lines 10 and 11). The
regularizers are in :mod:`algorithms.mocha_couplings`.

Kept per client: alpha, a number for each example (of the largest client: states have one shape). Kept on the server:
v, W and Omega, a row for each client. Travels: the client's own w_t and a number down; a vector of that length and
two numbers up.

Deviations: coordinates are taken in random order without repeats, instead of drawn; sigma' is the smallest safe one of
equation 5 for all clients, computed, instead of the bound of lemma 9.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fedjax_lab as fl
from algorithms import mocha_couplings
from algorithms.mocha_couplings import Coupling
from algorithms.mocha_losses import DualLoss, examples, excess, features, linear_model, named


class MochaState(NamedTuple):
    """The server's state.

    Attributes:
      v: ``float32[tasks, features]``, the rows ``X_t alpha_t``.
      w: ``float32[tasks, features]``, the tasks' models.
      omega: ``float32[tasks, tasks]``, the relationship matrix.
      covariance: ``float32[tasks, tasks]``, the M of the coupling.
      sigma: ``float32[]``, the paper's sigma'.
      round: ``int32[]``, rounds done.
      members: ``float32[]``, how many clients have examples.
      slots: ``float32[largest client, 0]``, nothing but the length of the clients' alpha.
    """

    v: jax.Array
    w: jax.Array
    omega: jax.Array
    covariance: jax.Array
    sigma: jax.Array
    round: jax.Array
    members: jax.Array
    slots: jax.Array


class MochaMessage(NamedTuple):
    """The client's own model ``w: float32[features]`` and ``curvature: float32[]``, sigma' M_tt."""

    w: jax.Array
    curvature: jax.Array


class MochaUpload(NamedTuple):
    """The change of the client's v, its share of the duality gap before it worked, and how well it worked."""

    delta_v: jax.Array
    gap: jax.Array
    theta: jax.Array


class Solved(NamedTuple):
    """Sums over a client's examples, ``float32[]`` each.

    Attributes:
      loss: of the model received.
      gap: of the client's share of the duality gap, at what it had and was sent.
      left: of the subproblem's own duality gap, after the work.
      gained: what the work gained in the subproblem, but for its quadratic term.
    """

    loss: jax.Array
    gap: jax.Array
    left: jax.Array
    gained: jax.Array


def mocha(
    *,
    loss: str = "hinge",
    coupling: Coupling | None = None,
    epochs: fl.Work | None = None,
    steps: fl.Work | None = None,
    omega_every: int = 1,
    sigma_prime: Any = None,
    bias: bool = False,
) -> fl.Round:
    """A linear model for each client, coupled by a relationship matrix that is learned with them.

    The data have features ``"x"`` and targets ``"y": [examples]``. There is no model and no optimizer to choose: the
    dual is solved coordinate by coordinate, exactly in the limit. Metrics: ``loss``, the mean over clients;
    ``duality_gap`` at the round's start, summed over all clients (if some are absent, scaled up from the others);
    ``thetas: float32[clients]``, an upper bound of the paper's theta for each (0: it solved its subproblem, 1: it did
    nothing, as those who don't take part), taken from the subproblem's duality gap; ``theta``, its mean over those
    who took part.

    Args:
      loss: ``"hinge"``, ``"logistic"`` (targets -1 and 1) or ``"squared"`` (half the square), summed over examples.
      coupling: of :mod:`algorithms.mocha_couplings`; by default ``mean_regularized(1.0, 1.0)``.
      epochs: passes over a client's examples each round, its budget: 1 by default; or ``(client, key) -> epochs``.
      steps: single coordinates instead.
      omega_every: after how many rounds the relationship matrix is learned anew.
      sigma_prime: the paper's sigma' instead of the smallest safe one.
      bias: add a feature that is always 1; its weight is regularized like the others.

    Raises:
      ValueError: an unknown loss, work that isn't positive, what is no coupling; when a Process is built: data
        without fields ``x`` and ``y``, targets other than -1 and 1 for hinge and logistic loss, a coupling of another
        number of clients, initial parameters (the dual begins at W = 0); when it is traced: a transform that changes
        gradients.
    """
    dual = named(loss)
    coupling = _coupling(coupling)
    work, unit = _work(epochs, steps)
    fl.checks.positive(omega_every, "omega_every", integer=True)
    if sigma_prime is not None:
        fl.checks.positive(sigma_prime, "sigma_prime")
    relations = _Relations(coupling, sigma_prime, omega_every)

    def init(key, data, params=None):
        if params is not None:
            raise ValueError("mocha() takes no initial parameters: its dual variables, and so its models, begin at 0")
        rows = jnp.zeros((data.num_clients, features(data, dual, bias)), jnp.float32)
        relation = relations.measured(coupling.start(data.num_clients))
        return MochaState(rows, rows, *relation, jnp.int32(0), *_members(data))

    def client_update(message, state, client, key, tilt=fl.identity):
        if tilt is not fl.identity:
            raise ValueError("mocha() solves its dual coordinate by coordinate: there is no gradient to change")
        # Not in init, which an evaluation on other clients' data runs too.
        if getattr(client, "population", None) is not None:
            coupling.check(client.population)
        amount = work(client, jax.random.fold_in(key, 1)) if callable(work) else work
        new, delta_v = _ascend(dual, bias, message, state, client, key, {unit: amount})
        sums = _examined(dual, bias, message, state, new, delta_v, client)
        theta = _theta(sums, message, delta_v)
        return fl.ClientOutput(
            upload=MochaUpload(delta_v, sums.gap, theta),
            weight=fl.client_weight("uniform", client),
            state=new,
            metrics={"loss": sums.loss / jnp.maximum(client.size, 1), "theta": theta},
        )

    def server_update(server, aggregate, key):
        ids, uploads, gap = aggregate
        v = server.v.at[ids].add(uploads.delta_v, mode="drop")
        thetas = jnp.ones(len(v), jnp.float32).at[ids].set(uploads.theta, mode="drop")
        w, relation = relations.learned(server, v)
        new = MochaState(v, w, *relation, server.round + 1, server.members, server.slots)
        return new, {"duality_gap": server.members * gap, "thetas": thetas}

    losses, metrics = linear_model(dual, bias)
    own = lambda w: fl.Variables({"w": w})
    return fl.Round(
        init=init,
        init_client=lambda server, client: jnp.zeros(len(server.slots), jnp.float32),
        broadcast=lambda server, state, client, key: _message(server, client),
        client_update=client_update,
        aggregate=_uploads_by_client(),
        server_update=server_update,
        personalize=lambda message, state, client, key: own(message.w),
        loss=losses,
        metrics=metrics,
        model=fl.Lens(lambda server: own(server.w.mean(0)), _unchangeable),
        view=fl.Lens(lambda message: own(message.w), lambda message, variables: message._replace(w=variables[0]["w"])),
        traits=frozenset({"many_models", "personal"}),
    )


def _coupling(given: Coupling | None) -> Coupling:
    if given is None:
        return mocha_couplings.mean_regularized(1.0, 1.0)
    if not isinstance(given, Coupling):
        raise ValueError(
            f"coupling must come from algorithms.mocha_couplings, such as trace_norm(0.1); got "
            f"{fl.checks.shown(given)}. For a matrix of your own: fixed(omega)"
        )
    return given


def _work(epochs: fl.Work | None, steps: fl.Work | None) -> tuple[fl.Work, str]:
    """A round's work and the unit that it is counted in. Raises ValueError for both, or what isn't positive."""
    if epochs is not None and steps is not None:
        raise ValueError("give epochs= or steps=, not both")
    work, unit = (steps, "steps") if steps is not None else (1 if epochs is None else epochs, "epochs")
    fl.checks.positive(work, unit, integer=True)
    return work, unit


def _members(data: Any) -> tuple[jax.Array, jax.Array]:
    """How many clients have examples, and the slots of the largest one."""
    slots = jnp.zeros((max(data.max_size, 1), 0), jnp.float32)
    return jnp.sum(jnp.asarray(data.sizes) > 0).astype(jnp.float32), slots


class _Relations(NamedTuple):
    """The ``coupling``, learned anew after ``every`` rounds, and the ``sigma_prime`` that was given, if any."""

    coupling: Coupling
    sigma_prime: Any
    every: int

    def measured(self, omega: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Omega with its M and sigma'."""
        covariance = jnp.asarray(self.coupling.covariance(omega), jnp.float32)
        sigma = mocha_couplings.safe_sigma(covariance) if self.sigma_prime is None else self.sigma_prime
        return jnp.asarray(omega, jnp.float32), covariance, jnp.asarray(sigma, jnp.float32)

    def learned(self, server: MochaState, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        """Lines 9 to 11: the models, and Omega, M and sigma', learned from them if it is time."""
        w = _models(server.covariance, v)
        relation = (server.omega, server.covariance, server.sigma)
        if self.coupling.learn is None:
            return w, relation
        learn, now = self.coupling.learn, (server.round + 1) % self.every == 0
        relation = jax.lax.cond(now, lambda: self.measured(learn(w)), lambda: relation)
        return _models(relation[1], v), relation


def _message(server: MochaState, client: Any) -> MochaMessage:
    """The client's own model; the tasks' mean for a client that isn't known."""
    tasks = len(server.w)
    k = jnp.clip(client.id, 0, tasks - 1)
    known = (client.id >= 0) & (client.id < tasks)
    return MochaMessage(jnp.where(known, server.w[k], server.w.mean(0)), server.sigma * server.covariance[k, k])


def _ascend(dual: DualLoss, bias: bool, message, alpha, client, key, work) -> tuple[jax.Array, jax.Array]:
    """Coordinate ascent on the subproblem: the new alpha, and the change of v."""

    def step(carry, batch, mask, positions, key):
        alpha, delta_v = carry
        (x,), (y,) = examples(batch, bias)
        at, score = positions[0], x @ (message.w + message.curvature * delta_v)
        new = jnp.where(mask[0], dual.step(alpha[at], y, score, message.curvature * (x @ x)), alpha[at])
        return alpha.at[at].set(new), delta_v + (new - alpha[at]) * x

    return client.fold(step, (alpha, jnp.zeros_like(message.w)), batch_size=1, key=key, **work)


def _examined(dual: DualLoss, bias: bool, message, alpha, new, delta_v, client) -> Solved:
    """One pass over the client, before and after its work."""
    primal = message.w + message.curvature * delta_v  # the model that the subproblem's dual variables stand for

    def add(sums, batch, mask, positions, key):
        x, y = examples(batch, bias)
        old, now, u = alpha[positions], new[positions], x @ message.w
        before, left = excess(dual, old, y, u), excess(dual, now, y, x @ primal)
        gained = dual.conjugate(old, y) - dual.conjugate(now, y) + (old - now) * u
        each = Solved(dual.loss(u, y), before, left, gained)
        return jax.tree.map(lambda total, values: total + jnp.sum(jnp.where(mask, values, 0)), sums, each)

    return client.fold(add, Solved(*[jnp.float32(0)] * 4))


def _theta(sums: Solved, message: MochaMessage, delta_v: jax.Array) -> jax.Array:
    """An upper bound of the paper's theta, from the subproblem's duality gap."""
    gained = jnp.maximum(sums.gained - 0.5 * message.curvature * jnp.sum(delta_v**2), 0)
    return jnp.where(sums.left > 0, sums.left / (sums.left + gained), 0)


def _uploads_by_client() -> fl.Aggregator:
    """Whose the uploads are, the uploads as they are, and the mean of the survivors' gaps."""

    def reduce(uploads, weights, ok, messages, env):
        gap = jnp.sum(uploads.gap) / jnp.maximum(jnp.sum(ok), 1)
        return jnp.where(ok, env.ids, env.population), uploads, gap

    return fl.Aggregator(lambda upload, weight, message, env: (upload, ()), lambda sums, env: sums[0], reduce)


def _models(covariance: jax.Array, v: jax.Array) -> jax.Array:
    """``W = V M``, as rows."""
    return jnp.matmul(covariance, v, precision="highest")


def _unchangeable(server, variables):
    raise ValueError("mocha()'s models follow from its dual variables and can't be replaced")
