"""Models that a network on the server makes, a different one for each client: pFedHN."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import optax

from fedjax_lab import checks
from fedjax_lab.aggregators import divide
from fedjax_lab.descent import goes_downhill
from fedjax_lab.models.base import Variables, add
from fedjax_lab.nesting import nested
from fedjax_lab.round import Aggregator, Lens, Round, Transform, identity
from fedjax_lab.transforms import memories

PyTree = Any


class Hypernetwork(NamedTuple):
    """A function from a client's embedding to its parameters.

    Attributes:
      init: ``(key, embedding: float32[size], params) -> phi``, its own parameters; ``params`` are those that the model
        would start from.
      apply: ``(phi, embedding) -> params``, of the model's structure, or all of them in one vector in the order of
        ``jax.tree.leaves``.
    """

    init: Callable[[jax.Array, jax.Array, PyTree], PyTree]
    apply: Callable[[PyTree, jax.Array], Any]


class HyperServer(NamedTuple):
    """The server's state.

    Attributes:
      inner: the inner server's state, of which the model state (batch-norm statistics) is in use.
      phi: the hypernetwork's parameters.
      embeddings: ``float32[clients, size]``.
      opt_state: of the optimizer of ``phi``.
    """

    inner: Any
    phi: PyTree
    embeddings: jax.Array
    opt_state: PyTree


class Pulled(NamedTuple):
    """A cohort's uploads as the server needs them: ``[cohort, ...]``, with whose they are and how much they weigh."""

    ids: jax.Array
    weights: jax.Array
    uploads: PyTree


def hypernetwork(
    network: Hypernetwork | nn.Module | None = None,
    *,
    embedding_size: int | None = None,
    server_optimizer: optax.GradientTransformation = optax.sgd(0.01),
    embedding_learning_rate: Any = 0.01,
) -> Transform:
    """The server makes each client's parameters from an embedding of the client, by a network that it trains (pFedHN,
    Shamsian et al., "Personalized Federated Learning using Hypernetworks", ICML 2021, algorithm 1).

    Client k is sent ``theta_k = h(v_k; phi)``, trains it by the inner round and uploads the change ``delta_k``. The
    server pulls it back: ``phi`` follows the mean, by weight, of ``-(d theta_k / d phi)' delta_k``, and each ``v_k``
    its own ``-(d theta_k / d v_k)' delta_k``: the gradients of ``-<h(v_k; phi), delta_k>``. (In the paper a round has
    one client.)
    What a client would use is what it is sent. Kept on the server: ``phi``, and for each client an embedding.
    Kept per client: nothing. Travels: a model each way, however large the network is.

    The server must know whose an update is: secure sums are refused, and a cohort's updates are in memory at once.
    A client that the server has no embedding for is sent the model of the mean embedding;
    :func:`fedjax_lab.cold_start` finds it an embedding of its own, with the network frozen. Over ``private(head)``, a
    personal classifier on a body that the network makes, it is the paper's pFedHN-PC.

    Args:
      network: a :class:`Hypernetwork` of plain functions, or a Flax module that is called with an embedding and gives
        parameters or one vector of them all; by default :func:`perceptron`.
      embedding_size: numbers in an embedding; by default 1 + clients / 4, as in the authors' code. They begin standard
        normal.
      server_optimizer: of ``phi``, the paper's alpha.
      embedding_learning_rate: of the embeddings, by gradient descent.

    Raises:
      ValueError: what is no network, a size or rate that isn't positive; a Round that trains no model or has several,
        or uploads anything but how its model changed; when the process is built, a network that doesn't give the
        model's parameters.
    """
    made = _network(network)
    if embedding_size is not None:
        checks.positive(embedding_size, "embedding_size", integer=True)
    checks.positive(embedding_learning_rate, "embedding_learning_rate")
    checks.optimizer(server_optimizer, "server_optimizer")
    goes_downhill(server_optimizer, "server_optimizer")

    def transform(round: Round) -> Round:
        _check_round(round)
        model, view = round.model, round.view

        def init(key, data, params=None):
            inner = round.init(key, data, params)
            start = model.get(inner).params
            size = embedding_size or 1 + data.num_clients // 4
            own, drawn = jax.random.split(jax.random.fold_in(key, 0x4E7))
            embeddings = jax.random.normal(drawn, (data.num_clients, size))
            phi = made.init(own, embeddings[0], start)
            _fits(jax.eval_shape(made.apply, phi, embeddings[0]), start)
            return HyperServer(inner, phi, embeddings, server_optimizer.init(phi))

        def of(server: HyperServer, phi: PyTree, embedding: jax.Array) -> PyTree:
            return _shaped(made.apply(phi, embedding), model.get(server.inner).params)

        def broadcast(server, state, client, key):
            message = round.broadcast(server.inner, state, client, key)
            count = len(server.embeddings)
            known = (client.id >= 0) & (client.id < count)
            row = server.embeddings[jnp.clip(client.id, 0, count - 1)]
            params = of(server, server.phi, jnp.where(known, row, server.embeddings.mean(0)))
            like = view.get(message)
            return view.set(message, like._replace(params=_without(like.params, params)))

        def client_update(message, state, client, key, tilt=identity):
            out = round.client_update(message, state, client, key, tilt=tilt)
            if jax.tree.structure(out.upload) != jax.tree.structure(view.get(message)):
                raise ValueError(
                    "hypernetwork() learns from how a client's model changed, but this Round uploads something else "
                    "too: build it on fedavg() and changes of the local objective"
                )
            return out

        def reduce(uploads, weights, ok, messages, env):
            ids = jnp.where(ok, env.ids, env.population)
            return Pulled(ids, divide(weights, jnp.sum(weights)), uploads)

        def server_update(server, aggregate, key):
            variables = model.get(server.inner)
            deltas, states = _whole(aggregate.uploads, variables, len(aggregate.ids))
            rows = server.embeddings.at[aggregate.ids].get(mode="fill", fill_value=0)
            make = jax.vmap(lambda phi, row: of(server, phi, row), in_axes=(None, 0))
            _, pull = jax.vjp(make, server.phi, rows)
            share = lambda d: (-d * aggregate.weights.reshape(-1, *[1] * (d.ndim - 1))).astype(d.dtype)
            gradient, _ = pull(jax.tree.map(share, deltas))
            _, slopes = pull(jax.tree.map(jnp.negative, deltas))
            updates, opt_state = server_optimizer.update(gradient, server.opt_state, server.phi)
            moved = rows - embedding_learning_rate * slopes
            mean = lambda u: jnp.tensordot(aggregate.weights, u.astype(jnp.float32), 1)
            model_state = add(variables.model_state, jax.tree.map(mean, states))
            return HyperServer(
                model.set(server.inner, variables._replace(model_state=model_state)),
                optax.apply_updates(server.phi, updates),
                server.embeddings.at[aggregate.ids].set(moved, mode="drop"),
                opt_state,
            ), {}

        def mean_model(server):
            """What a client would be sent that nothing is known of."""
            params = of(server, server.phi, server.embeddings.mean(0))
            return model.get(server.inner)._replace(params=params)

        return nested(
            round,
            message=False,
            init=init,
            broadcast=broadcast,
            client_update=client_update,
            server_update=server_update,
            aggregate=Aggregator(lambda upload, weight, message, env: (upload, ()), lambda sums, env: sums[0], reduce),
            model=Lens(mean_model, _unchangeable),
            traits=round.traits | {"personal", "many_models"},
        )

    return transform


def perceptron(hidden: Sequence[int] = (100,), head_scale: Any = 0.1) -> Hypernetwork:
    """Layers of ReLU units, and from the last a linear map to the model's parameters.

    The map's offset begins at the parameters that the model would start from, so that all clients begin near
    these.

    Args:
      hidden: the units of each layer; none at all is a linear network.
      head_scale: of the last map at the start: by so much, about, the clients' parameters differ to begin with,
        in units of one over the square root of its inputs.
    """
    for units in hidden:
        checks.positive(units, "hidden", integer=True, unit=" of units in each layer")
    checks.positive(head_scale, "head_scale")

    def init(key, embedding, params):
        flat, _ = jax.flatten_util.ravel_pytree(params)
        widths = (*embedding.shape, *hidden, flat.size)
        scales = (*[math.sqrt(2.0)] * len(hidden), head_scale)
        keys = jax.random.split(key, len(widths) - 1)
        layers = []
        for k, low, high, scale in zip(keys, widths[:-1], widths[1:], scales, strict=True):
            layers.append(
                {"kernel": scale / math.sqrt(low) * jax.random.normal(k, (low, high)), "bias": jnp.zeros(high)}
            )
        layers[-1]["bias"] = flat.astype(jnp.float32)
        return layers

    def apply(phi, embedding):
        x = embedding
        for layer in phi[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x @ phi[-1]["kernel"] + phi[-1]["bias"]

    return Hypernetwork(init, apply)


def _network(given: Any) -> Hypernetwork:
    if given is None:
        return perceptron()
    if isinstance(given, Hypernetwork):
        return given
    if isinstance(given, nn.Module):
        return Hypernetwork(
            lambda key, embedding, params: nn.meta.unbox(given.init(key, embedding)),
            lambda phi, embedding: given.apply(phi, embedding),
        )
    raise ValueError(
        f"network must be a Flax module or fl.transforms.Hypernetwork(init, apply); got {checks.shown(given)}"
    )


def _shaped(made: Any, params: PyTree) -> PyTree:
    """What a network made, in the structure and types of ``params``."""
    if not _in_one(made, params):
        return jax.tree.map(lambda m, p: m.astype(p.dtype), made, params)
    leaves, structure = jax.tree.flatten(params)
    ends, parts = 0, []
    for leaf in leaves:
        parts.append(made[ends : ends + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
        ends += leaf.size
    return jax.tree.unflatten(structure, parts)


def _in_one(made: Any, params: PyTree) -> bool:
    """Whether a network gave one vector of all parameters."""
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    return getattr(made, "shape", None) == (total,) and jax.tree.structure(made) == jax.tree.structure(0)


def _fits(made: Any, params: PyTree) -> None:
    """Refuse a network that doesn't give the model's parameters."""
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    if _in_one(made, params) or shapes(made) == shapes(params):
        return
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    wanted = {name: leaf.shape for name, leaf in checks.named_leaves(params)}
    got = {name: leaf.shape for name, leaf in checks.named_leaves(made)}
    raise ValueError(f"the hypernetwork gives {got}, but the model has {wanted}, or one vector of {total} numbers")


def _without(like: PyTree, params: PyTree) -> PyTree:
    """The parameters that travel: ``None`` where ``like``, of the same structure, has ``None``."""
    return jax.tree.map(lambda a, p: None if a is None else p, like, params, is_leaf=lambda a: a is None)


def _whole(uploads: Variables, variables: Variables, cohort: int) -> Variables:
    """A cohort's changes, ``[cohort, ...]``; zeros for the private leaves, which didn't travel."""
    one = lambda u, p: jnp.zeros((cohort, *p.shape), p.dtype) if u is None else u
    return jax.tree.map(one, uploads, variables, is_leaf=lambda u: u is None)


def _unchangeable(server: HyperServer, variables: Variables) -> HyperServer:
    raise ValueError("a hypernetwork makes its clients' models: there is no one model to replace")


def _check_round(round: Round) -> None:
    memories.of_one_model(round, "hypernetwork() makes each client's model anew")
    if round.model is None or round.view is None:
        raise ValueError("hypernetwork() makes the models that clients are sent, but this Round sends none")
    if "many_models" in round.traits:
        raise ValueError("hypernetwork() makes a model for each client, but this Round has several already")
    if "sub_models" in round.traits:
        raise ValueError(
            "hypernetwork() makes whole models, but this Round sends parts of one (federated dropout, width slices), "
            "which don't go together"
        )
