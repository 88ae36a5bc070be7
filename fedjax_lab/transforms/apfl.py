"""APFL: each client mixes a model of its own with the global one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.models.base import Variables
from fedjax_lab.nesting import first_message
from fedjax_lab.round import Round, Tilt, Transform, identity
from fedjax_lab.transforms import memories
from fedjax_lab.transforms.personal import own_training, received_model

PyTree = Any


class MixedState(NamedTuple):
    """The client's ``own`` Variables, its mixing weight ``alpha: float32[]``, and the inner state."""

    own: Variables
    alpha: jax.Array
    inner: Any


class Mixing(NamedTuple):
    """What the personal run trains: ``own`` parameters and ``alpha``."""

    own: PyTree
    alpha: jax.Array


def apfl(alpha: Any = 0.5, *, learn_alpha: bool = False) -> Transform:
    """Each client uses ``alpha v + (1 - alpha) w`` of its own ``v`` and the global ``w`` (APFL, Deng et al., 2020,
    algorithm 1).

    In every round that it takes part in, a client trains its copy of ``w`` as the inner round does, and then ``v`` by
    the gradient of the mixture's loss; ``alpha`` by its own (equation 10) if it is learned, held between 0 and 1. The
    global model is the inner round's, bit for bit. Kept per client: ``v``, a model, and ``alpha``. Travels: nothing
    more.

    Deviation: while ``v`` trains, ``w`` is the client's copy after its local steps, where in the paper both move at
    once; the run uses the inner round's local training, with its own PRNG key and none of the other tilts.

    Args:
      alpha: between 0 (the global model) and 1 (a local one); where it begins if it is learned.
      learn_alpha: whether each client learns its own, at the client optimizer's learning rate.

    Raises:
      ValueError: an ``alpha`` outside 0..1; a Round that sends no model or doesn't say what it trained.
    """
    checks.probability(alpha, "alpha")

    def transform(round: Round) -> Round:
        memories.of_units(round, "apfl()")
        sent = received_model(round, "apfl()")
        local = own_training(round, None, {}, "apfl()")

        def init_client(server, client):
            inner = round.init_client(server, client)
            message = first_message(round, server, inner, client)
            own = sent(message, inner, client, jax.random.key(0))
            return MixedState(own, jnp.asarray(alpha, jnp.float32), inner)

        def client_update(message, state, client, key, tilt=identity):
            out = round.client_update(message, state.inner, client, key, tilt=tilt)
            if out.trained is None:
                raise ValueError("apfl() needs a Round that reports what it trained (ClientOutput.trained)")
            copy = out.trained.variables.params
            start = Variables(Mixing(state.own.params, state.alpha), state.own.model_state)
            run = local(start, client, jax.random.fold_in(key, 0xAF1), mixture(copy, learn_alpha))
            own, weight = run.variables.params
            return out._replace(state=MixedState(Variables(own, run.variables.model_state), clipped(weight), out.state))

        def personalize(message, state, client, key):
            return blend(state.alpha, state.own, sent(message, state.inner, client, key))

        return round._replace(
            init_client=init_client,
            broadcast=lambda server, state, client, key: round.broadcast(server, state.inner, client, key),
            client_update=client_update,
            personalize=personalize,
            traits=round.traits | {"personal"},
        )

    return transform


def mixture(copy: PyTree, learn_alpha: bool) -> Tilt:
    """The tilt from a loss of parameters to the same loss of :class:`Mixing` with a fixed ``copy``."""

    def tilt(oracle):
        def tilted(mixing, inputs, key):
            weight = clipped(mixing.alpha)
            grads, aux = oracle(blend(weight, mixing.own, copy), inputs, key)
            own = jax.tree.map(lambda g: (weight * g).astype(g.dtype), grads)
            slope = jax.tree.map(lambda v, w, g: jnp.vdot((v - w).astype(jnp.float32), g), mixing.own, copy, grads)
            slope = sum(jax.tree.leaves(slope)) if learn_alpha else jnp.zeros_like(mixing.alpha)
            return Mixing(own, jnp.asarray(slope, mixing.alpha.dtype)), aux

        return tilted

    return tilt


def clipped(weight: jax.Array) -> jax.Array:
    return jnp.clip(weight, 0, 1)


def blend(weight: jax.Array, own: PyTree, other: PyTree) -> PyTree:
    """``weight own + (1 - weight) other``, in ``other``'s dtypes; counters are ``other``'s."""

    def one(a, b):
        mixed = weight * a + (1 - weight) * b
        return mixed.astype(b.dtype) if jnp.issubdtype(b.dtype, jnp.inexact) else b

    return jax.tree.map(one, own, other)
