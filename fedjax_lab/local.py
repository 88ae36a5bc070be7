"""Local training: the client's own loop, with any optax optimizer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_lab import checks
from fedjax_lab.client import ClientData
from fedjax_lab.descent import begins_downhill, goes_downhill
from fedjax_lab.loops import client_loop
from fedjax_lab.models.base import Model, Variables
from fedjax_lab.ordering import large_ones_last
from fedjax_lab.round import LocalTraining, Oracle, Tilt, Trained, identity

PyTree = Any
# An optimizer, or a function of the round number (a learning-rate schedule over rounds).
ClientOptimizer = optax.GradientTransformation | Callable[[Any], optax.GradientTransformation]
# An amount of local work, or a function (client, key) -> amount (stragglers do less).
Work = int | Callable[[ClientData, jax.Array], jax.Array]


def optimizer_of_round(optimizer: ClientOptimizer, round_number: Any) -> optax.GradientTransformation:
    """The optimizer itself, or the one that a schedule over rounds gives for ``round_number``."""
    if isinstance(optimizer, optax.GradientTransformation):
        return optimizer
    chosen = optimizer(round_number)
    if not isinstance(chosen, optax.GradientTransformation):
        raise ValueError(f"the client optimizer of a round must be an optax optimizer; got {checks.shown(chosen)}")
    return chosen


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of ``values`` where ``mask`` holds, 0 if nowhere; ``[n], [n] -> []``."""
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(jnp.sum(mask), 1)


def gradient_oracle(loss: Callable) -> Oracle:
    """The oracle of a model's mean training loss over a batch."""

    def mean_loss(params, inputs, key):
        model_state, batch, mask = inputs
        result = loss(params, model_state, batch, mask, key, True)
        losses, model_state = checks.pair(result, "a model's loss", "(losses: float[batch], model_state)")
        checks.per_example(losses, mask, "loss")
        return masked_mean(losses, mask), model_state

    def oracle(params, inputs, key):
        (value, model_state), grads = jax.value_and_grad(mean_loss, has_aux=True)(params, inputs, key)
        return grads, (value, model_state)

    return oracle


def _in_pieces(oracle: Oracle, client: ClientData, static: bool) -> Oracle:
    """The oracle of the client's whole data, read in pieces of ``client.tile`` examples.

    The batch it is given is ignored. For losses that are each example's own: with batch normalisation pieces would
    not be what the whole is.
    """

    def whole(params, inputs, key):
        def add(carry, batch, mask, positions, key):
            grads, loss, model_state, t = carry
            g, (value, model_state) = oracle(params, (model_state, batch, mask), jax.random.fold_in(piece_key, t))
            share = jnp.sum(mask) / jnp.maximum(client.size, 1)
            grads = jax.tree.map(lambda a, b: a + share.astype(b.dtype) * b, grads, g)
            return grads, loss + (share * value).astype(loss.dtype), model_state, t + 1

        piece_key = key
        zeros = jax.tree.map(jnp.zeros_like, params)
        start = (zeros, jnp.float32(0), inputs[0], jnp.int32(0))
        grads, loss, model_state, _ = client.fold(add, start, static=static)
        return grads, (loss, model_state)

    return whole


def local_training(
    model: Model,
    optimizer: ClientOptimizer,
    *,
    epochs: Work | None = None,
    steps: Work | None = None,
    batch_size: int | None = 10,
    static: bool = False,
) -> LocalTraining:
    """The local part of FedAvg and its kin: mini-batch training from given variables.

    Args:
      model: whose loss is minimised.
      optimizer: from optax; or a function of the round number that gives one, for schedules over rounds.
      epochs: passes over the client's examples (1 if ``steps`` isn't given either).
      steps: a number of steps instead, the same for every client.
      batch_size: examples a step; ``None``: all of the client's (one step is one epoch), read a few at a time and
        summed, unless the model has a state (batch normalisation): then as one batch as large as the population's
        largest client.
      static: run a number of steps known when compiled, which ``jax.grad`` through the run needs: every client
        computes as many as the largest one asks for, and those beyond its own change nothing.

    Returns:
      :class:`fedjax_lab.round.LocalTraining`.

    Raises:
      ValueError: work, batch size or learning rate that isn't positive, or both ``epochs`` and ``steps``; work that
        is no Python integer with ``static=True``; what is no model or no optimizer. The learning rates of a schedule
        over rounds are not checked.
    """
    checks.model(model)
    checks.client_optimizer(optimizer)
    if isinstance(optimizer, optax.GradientTransformation):
        goes_downhill(optimizer, "client_optimizer")
    else:
        begins_downhill(optimizer, "client_optimizer")
    if epochs is not None and steps is not None:
        raise ValueError("give epochs= or steps=, not both")
    work, unit = (steps, "steps") if steps is not None else (1 if epochs is None else epochs, "epochs")
    checks.positive(work, unit, integer=True)
    if static and not isinstance(work, int):
        raise ValueError(
            f"static=True needs {unit} as a Python integer, the same for every client; got {checks.shown(work)}. "
            "Without it, forward mode (jax.jvp, jax.jacfwd) goes through any amount of work"
        )
    if batch_size is not None:
        checks.positive(batch_size, "batch_size", integer=True, unit=" (or None for full batches)")
    oracle = gradient_oracle(model.loss)

    def local(
        start: Variables,
        client: ClientData,
        key: jax.Array,
        tilt: Tilt = identity,
        opt_state: PyTree = None,
    ) -> Trained:
        rule = optax.with_extra_args_support(
            optimizer_of_round(optimizer, client.env.round if callable(optimizer) else 0)
        )
        amount = work(client, jax.random.fold_in(key, 1)) if callable(work) else work
        if jnp.shape(amount) or not jnp.issubdtype(jnp.result_type(amount), jnp.integer):
            raise ValueError(f"the function given as {unit} must give one integer; it gives {checks.shown(amount)}")
        stateful = bool(jax.tree.leaves(start.model_state))
        pieces = batch_size is None and client.max_size > client.tile and not stateful
        objective = tilt(_in_pieces(oracle, client, static) if pieces else oracle)

        def step(carry, batch, mask, positions, step_key):
            variables, opt_state, loss, seen = carry
            inputs = (variables.model_state, batch, mask)
            grads, (value, model_state) = objective(variables.params, inputs, step_key)
            updates, opt_state = rule.update(large_ones_last(grads), opt_state, variables.params, value=value)
            params = optax.apply_updates(variables.params, updates)
            count = client.size if pieces else jnp.sum(mask, dtype=jnp.int32)
            return Variables(params, model_state), opt_state, loss + (value * count).astype(loss.dtype), seen + count

        opt_state = rule.init(start.params) if opt_state is None else opt_state
        carry = (start, opt_state, jnp.float32(0), jnp.int32(0))
        if batch_size is None:
            trips = jnp.where(client.size > 0, amount, 0)
            carry = _full_batch_loop(step, carry, client, trips, amount, key, static, pieces)
            made = trips
        else:
            carry = client.fold(step, carry, batch_size=batch_size, key=key, static=static, **{unit: amount})
            batches = -(-client.size // batch_size)
            made = amount * batches if unit == "epochs" else jnp.where(client.size > 0, amount, 0)
        variables, opt_state, loss, seen = carry
        return Trained(start, variables, jnp.asarray(made, jnp.int32), loss / jnp.maximum(seen, 1), opt_state)

    return local


def _full_batch_loop(step, carry, client, trips, amount, key, static, pieces):
    """``trips`` steps on all of the client's examples."""
    positions = jnp.arange(1 if pieces else max(client.max_size, 1))
    batch, mask = client.take(positions), positions < client.size

    def body(t, carry):
        return step(carry, batch, mask, positions, jax.random.fold_in(key, t))

    if not static:
        return client_loop(client, trips, body, carry)  # tilts may read the client's examples too

    def masked(carry, t):
        return jax.tree.map(lambda a, b: jnp.where(t < trips, a, b), body(t, carry), carry), None

    return jax.lax.scan(masked, carry, jnp.arange(amount))[0]


def mean_over_client(function: Callable[[PyTree, jax.Array], dict[str, jax.Array]], client: ClientData) -> dict:
    """Means over a client's examples of ``function(batch, mask) -> {name: float[batch]}``; 0 if empty."""
    shapes = jax.eval_shape(function, *_first(client))
    if not isinstance(shapes, dict):
        raise ValueError(f"a model's metrics must be a dict {{name: float[batch]}}; got {checks.shown(shapes)}")
    zeros = {name: jnp.zeros((), jnp.float32) for name in shapes}

    def add(sums, batch, mask, positions, key):
        values = function(batch, mask)
        for name in sums:
            checks.per_example(values[name], mask, name)
        return {n: sums[n] + jnp.sum(jnp.where(mask, values[n].astype(jnp.float32), 0)) for n in sums}

    sums = client.fold(add, zeros)
    return {name: value / jnp.maximum(client.size, 1) for name, value in sums.items()}


def _first(client: ClientData):
    positions = jnp.arange(client.tile)
    return client.take(positions), positions < client.size


def mean_loss(loss: Callable, variables: Variables, client: ClientData, key: jax.Array) -> jax.Array:
    """A client's mean loss with dropout off, ``float32[]``; 0 for an empty client."""

    def losses(batch, mask):
        return {"loss": loss(variables.params, variables.model_state, batch, mask, key, False)[0]}

    return mean_over_client(losses, client)["loss"]


def client_weight(weighting: Any, client: ClientData) -> jax.Array:
    """The client's ``p_k``, up to a common factor; 0 for a client without examples.

    Args:
      weighting: ``"examples"``, ``"uniform"``, or an array ``float[population]`` of the ``p_k``.
      client: whose weight it is.

    Raises:
      ValueError: while a Process is built, for another word, or an array of another length or of numbers that
        can't be weights.
    """
    checks.weighting(weighting, getattr(client, "population", None))
    if isinstance(weighting, str):
        weight = client.size if weighting == "examples" else 1
    else:
        table = jnp.asarray(weighting, jnp.float32)
        weight = table[jnp.clip(client.id, 0, table.shape[0] - 1)]
    return jnp.where(client.size > 0, weight, 0).astype(jnp.float32)


def partial_work(epochs: int, fraction: Any) -> Work:
    """Local epochs of clients of which some straggle and do only part of the work.

    Every round each client straggles with probability ``fraction``, and then runs ``1..epochs-1`` epochs,
    uniformly (FedProx, Li et al. 2020, section 5.2). Which ones is public (it depends on the round's key and
    the client), so that :func:`fedjax_lab.drop_stragglers` drops the same ones.

    Args:
      epochs: of clients that don't straggle; at least 2.
      fraction: probability of straggling, between 0 and 1.
    """
    checks.positive(epochs, "epochs", integer=True)
    if epochs < 2:
        raise ValueError("partial_work needs at least 2 epochs: a straggler runs 1 to epochs - 1 of them")
    checks.probability(fraction, "fraction")

    def work(client: ClientData, key: jax.Array) -> jax.Array:
        part = jax.random.randint(key, (), 1, epochs)
        return jnp.where(straggles(client.env.key, client.id, fraction), part, epochs)

    return work


def straggles(public_key: jax.Array, client_id: jax.Array, fraction: Any) -> jax.Array:
    """Whether a client straggles in the round of this public key, ``bool[]``."""
    key = jax.random.fold_in(jax.random.fold_in(public_key, 0x57A6), client_id)
    return jax.random.uniform(key) < fraction
