"""Rules of selective upload: LAG, CMFL, local accuracy, and how much an update changed."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from fedjax_lab import checks
from fedjax_lab.local import mean_over_client
from fedjax_lab.models.base import difference
from fedjax_lab.round import Transform
from fedjax_lab.transforms.selective import Rule, selective
from fedjax_lab.transforms.transfers import of

PyTree = Any


def lag_wk(
    xi: float | Sequence[float] = 0.1, *, memory: int = 10, instead: str = "stale", weighting: Any = "examples"
) -> Transform:
    """LAG-WK: a client sends if its update differs from the one it sent last by more than the model has been moving
    (Chen, Giannakis, Sun and Yin, "LAG: Lazily Aggregated Gradient for Communication-Efficient Distributed Learning",
    NeurIPS 2018, rule 15a and algorithm 1).

    Client k sends if ``(p_k |u_k - u_k'|)^2 >= 1/K^2 sum_d xi_d |w_(r+1-d) - w_(r-d)|^2``, with its update ``u`` now,
    the one it sent last ``u'``, the K clients' shares ``p`` and the last ``memory`` moves of the model: the paper's
    rule, whose ``alpha`` times a gradient of the sum of losses is here ``p_k u_k``, for one full-batch step a round.
    Kept per client: an upload. Travels: two numbers and a flag more down; up nothing, or the change of the update.

    Args:
      xi: the paper's ``xi_d``: a number for all, or one for each of ``memory``, the newest first; 0 sends always.
        The paper's experiments have 0.1.
      memory: the paper's D.
      instead: what the server uses of a client that doesn't send, ``"stale"`` (the paper's) or ``"nothing"``.
      weighting: of the inner round.

    Raises:
      ValueError: negative ``xi``, or a number of them that isn't ``memory``; and as :func:`selective` does.
    """
    moves = Moves(_weights(xi, memory))

    def decide(allowance, seen):
        return (seen.share * optax.tree.norm(difference(seen.out.upload, seen.last))) ** 2 >= allowance

    rule = Rule(decide, init=moves.init, renew=moves.renew, tells=moves.allowance, keeps=True, name="lag_wk()")
    return selective(rule, instead=instead, weighting=weighting)


def lag_ps(
    smoothness: Any,
    learning_rate: Any,
    xi: float | Sequence[float] = 1.0,
    *,
    memory: int = 10,
    instead: str = "stale",
    weighting: Any = "examples",
) -> Transform:
    """LAG-PS: the server asks a client only if the model is far from where the client last sent from (Chen et al. 2018,
    rule 15b and algorithm 2).

    Client k is asked if ``(p_k alpha L_k |w - w_k'|)^2 >= 1/K^2 sum_d xi_d |w_(r+1-d) - w_(r-d)|^2``, see
    :func:`lag_wk`; ``w_k'`` is the model that it last sent from. One that isn't asked is sent no model either. Kept per
    client: an upload with stale values, and a model, which the server would keep. Travels: a model and a flag down, or
    the flag alone; up nothing, or the change of the update.

    Args:
      smoothness: the gradients' Lipschitz constants ``L_k``: a number, one for each client, or an attribute's name.
      learning_rate: the paper's ``alpha``, the clients'; several local steps count as so much larger a one.
      xi, memory, instead, weighting: as for :func:`lag_wk`; the paper's experiments have ``xi = 1``.

    Raises:
      ValueError: as for :func:`lag_wk`; a smoothness or a learning rate that isn't positive.
    """
    if not isinstance(smoothness, str | Tracer) and not (np.isfinite(smoothness) & (np.asarray(smoothness) > 0)).all():
        raise ValueError(f"smoothness must be positive, the gradients' Lipschitz constants; got {smoothness!r}")
    checks.positive(learning_rate, "learning_rate")
    moves = Moves(_weights(xi, memory))

    def asks(allowance, seen):
        way = optax.tree.norm(difference(seen.params, seen.sent_from))
        return (seen.share * learning_rate * of(seen.client, smoothness) * way) ** 2 >= allowance

    rule = Rule(
        lambda known, seen: jnp.bool_(True), asks=asks, init=moves.init, renew=moves.renew, tells=moves.allowance,
        remembers=True, name="lag_ps()",
    )  # fmt: skip
    return selective(rule, instead=instead, weighting=weighting)


class Moves(NamedTuple):
    """The squared lengths of the model's last moves, the newest first, and what LAG makes of them."""

    xi: jax.Array

    def init(self, params: PyTree) -> jax.Array:
        return jnp.zeros(self.xi.shape, jnp.float32)

    def renew(self, memory: jax.Array, old: PyTree, new: PyTree) -> jax.Array:
        return jnp.concatenate([optax.tree.norm(difference(new, old), squared=True)[None], memory[:-1]])

    def allowance(self, memory: jax.Array) -> jax.Array:
        """``sum_d xi_d |w_(r+1-d) - w_(r-d)|^2``, in the scale of ``K^2 p_k^2``."""
        return jnp.sum(self.xi * memory)


def _weights(xi: Any, memory: int) -> jax.Array:
    checks.positive(memory, "memory", integer=True)
    # In NumPy unless it has no value yet: in a sweep over something else jax.numpy's constants have none either.
    values = jnp.asarray(xi, jnp.float32) if isinstance(xi, Tracer) else np.asarray(xi, np.float32)
    if values.ndim > 1 or (values.ndim == 1 and values.shape[0] != memory):
        raise ValueError(f"xi must be a number or memory={memory} of them; got shape {values.shape}")
    if isinstance(values, np.ndarray) and not (np.isfinite(values) & (values >= 0)).all():
        raise ValueError(f"xi must be at least 0, the threshold of each past move; got {checks.shown(xi)}")
    return jnp.broadcast_to(values, (memory,))


def cmfl(threshold: Any, *, instead: str = "nothing", weighting: Any = "examples") -> Transform:
    """CMFL: a client sends if enough of its update's signs agree with the last global update's (Luping, Wei and Bo,
    "CMFL: Mitigating Communication Overhead for Federated Learning", ICDCS 2019, equation 9 and algorithm 1).

    The share of parameters whose update has the sign of what the model last moved by is the update's relevance. Until
    the model has moved everybody sends. Travels: that move, a model more down (a client that takes part in every round
    could work it out).

    Args:
      threshold: the least share that is sent, the paper's ``v_t``, between 0 (always) and 1; or a function of the round
        number that gives it: the paper's falls as ``v_0 / sqrt(t)``. With a fixed one nobody may ever send again.
      instead, weighting: as for :func:`lag_wk`.

    Raises:
      ValueError: a threshold outside 0..1; and as :func:`selective` does.
    """
    if not callable(threshold):
        checks.probability(threshold, "threshold")

    def decide(move, seen):
        level: Any = threshold(seen.client.env.round) if callable(threshold) else threshold
        run = _trained(seen, "cmfl()")
        update = difference(run.variables.params, run.start.params)
        agree = jax.tree.map(lambda a, b: jnp.sum(jnp.sign(a) == jnp.sign(b)), update, move)
        count = sum(leaf.size for leaf in jax.tree.leaves(update))
        moved = sum(jnp.sum(leaf != 0) for leaf in jax.tree.leaves(move)) > 0
        return ~moved | (sum(jax.tree.leaves(agree)) / count >= level)

    def renew(memory, old, new):
        move = difference(new, old)
        moved = sum(jnp.sum(leaf != 0) for leaf in jax.tree.leaves(move)) > 0
        return jax.tree.map(lambda a, b: jnp.where(moved, a, b), move, memory)

    rule = Rule(decide, init=lambda params: difference(params, params), renew=renew, name="cmfl()")
    return selective(rule, instead=instead, weighting=weighting)


def local_accuracy(
    level: Any, *, metric: str = "accuracy", instead: str = "nothing", weighting: Any = "examples"
) -> Transform:
    """A client sends once the model that it trained is good enough on its own data.

    (The local accuracy level of Li, Sahu, Talwalkar and Smith, "Federated Learning", IEEE SPM 2020.) Costs a pass over
    the client's data.

    Args:
      level: the least mean of the metric that is sent, between 0 (always, for accuracies) and 1.
      metric: one of the model's, the better the higher.
      instead, weighting: as for :func:`lag_wk`.

    Raises:
      ValueError: a level outside 0..1; a metric that the model doesn't have, when the process is built.
    """
    checks.probability(level, "level")

    def decide(known, seen):
        variables, metrics = _trained(seen, "local_accuracy()").variables, seen.round.metrics

        def chosen(batch, mask):
            found = metrics(*variables, batch)
            if metric not in found:
                near = checks.nearest(metric, found) or f"; it has {sorted(found)}"
                raise ValueError(f"local_accuracy() looks at {metric!r}, which the model doesn't measure{near}")
            return {metric: found[metric]}

        return mean_over_client(chosen, seen.client)[metric] >= level

    return selective(Rule(decide, name="local_accuracy()"), instead=instead, weighting=weighting)


def changed_by(
    threshold: float | Callable[[Any], Any], *, instead: str = "stale", weighting: Any = "examples"
) -> Transform:
    """A client sends if its update differs from the one it sent last by more than so much of that one's length.

    Args:
      threshold: least ``|u - u'| / |u'|`` that is sent, at least 0 (always); or a function of the round number.
      instead, weighting: as for :func:`lag_wk`.

    Raises:
      ValueError: a negative threshold; and as :func:`selective` does.
    """
    if not callable(threshold):
        checks.not_negative(threshold, "threshold")

    def decide(known, seen):
        level = threshold(seen.client.env.round) if callable(threshold) else threshold
        change = optax.tree.norm(difference(seen.out.upload, seen.last))
        return change >= level * optax.tree.norm(seen.last)

    return selective(Rule(decide, keeps=True, name="changed_by()"), instead=instead, weighting=weighting)


def _trained(seen: Any, who: str):
    if seen.out.trained is None:
        raise ValueError(f"{who} needs a Round that reports what it trained (ClientOutput.trained)")
    return seen.out.trained
