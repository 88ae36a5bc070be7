"""Models that a network on the server makes, a different one for each client: pFedHN."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from fedjax_lab import checks
from fedjax_lab.aggregators import divide
from fedjax_lab.descent import goes_downhill
from fedjax_lab.models.base import Variables, add
from fedjax_lab.nesting import nested
from fedjax_lab.round import Aggregator, Lens, Round, Transform, identity
from fedjax_lab.transforms import memories
from fedjax_lab.transforms.parameter_networks import Hypernetwork, as_network, fits, shaped

PyTree = Any


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
    made = as_network(network)
    _check(embedding_size, embedding_learning_rate, server_optimizer)

    def transform(round: Round) -> Round:
        model, view = _lenses(round)
        maker = _Maker(made, model)

        def init(key, data, params=None):
            inner = round.init(key, data, params)
            start = model.get(inner).params
            size = embedding_size or 1 + data.num_clients // 4
            own, drawn = jax.random.split(jax.random.fold_in(key, 0x4E7))
            embeddings = jax.random.normal(drawn, (data.num_clients, size))
            phi = made.init(own, embeddings[0], start)
            fits(jax.eval_shape(made.apply, phi, embeddings[0]), start)
            return HyperServer(inner, phi, embeddings, server_optimizer.init(phi))

        def broadcast(server, state, client, key):
            message = round.broadcast(server.inner, state, client, key)
            params = maker.params(server, server.phi, _embedding(server.embeddings, client))
            like = view.get(message)
            return view.set(message, like._replace(params=_without(like.params, params)))

        def client_update(message, state, client, key, tilt=identity):
            out = round.client_update(message, state, client, key, tilt=tilt)
            _check_upload(out.upload, view.get(message))
            return out

        def server_update(server, aggregate, key):
            variables = model.get(server.inner)
            deltas, states = _whole(aggregate.uploads, variables, len(aggregate.ids))
            rows = server.embeddings.at[aggregate.ids].get(mode="fill", fill_value=0)
            gradient, slopes = maker.pulled_back(server, rows, deltas, aggregate.weights)
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

        return nested(
            round,
            message=False,
            init=init,
            broadcast=broadcast,
            client_update=client_update,
            server_update=server_update,
            aggregate=_cohort(),
            model=Lens(lambda server: maker.mean_model(server), _unchangeable),
            traits=round.traits | {"personal", "many_models"},
        )

    return transform


class _Maker(NamedTuple):
    """A network, and the lens to the model whose parameters it makes.

    A Round holds functions of its methods, not the methods: JAX would hash these by what the tuple holds.
    """

    network: Hypernetwork
    model: Lens

    def params(self, server: HyperServer, phi: PyTree, embedding: jax.Array) -> PyTree:
        """The model's parameters for one client: h(v; phi)."""
        return shaped(self.network.apply(phi, embedding), self.model.get(server.inner).params)

    def mean_model(self, server: HyperServer) -> Variables:
        """What a client would be sent that nothing is known of."""
        params = self.params(server, server.phi, server.embeddings.mean(0))
        return self.model.get(server.inner)._replace(params=params)

    def pulled_back(self, server: HyperServer, rows: jax.Array, deltas: PyTree, weights: jax.Array) -> tuple:
        """The gradients of ``-<h(v_k; phi), delta_k>``: their mean by weight for phi, and each client's for its v_k."""
        make = jax.vmap(lambda phi, row: self.params(server, phi, row), in_axes=(None, 0))
        _, pull = jax.vjp(make, server.phi, rows)
        share = lambda d: (-d * weights.reshape(-1, *[1] * (d.ndim - 1))).astype(d.dtype)
        gradient, _ = pull(jax.tree.map(share, deltas))
        _, slopes = pull(jax.tree.map(jnp.negative, deltas))
        return gradient, slopes


def _embedding(embeddings: jax.Array, client: Any) -> jax.Array:
    """The client's embedding; the mean one if the server has none for it."""
    count = len(embeddings)
    known = (client.id >= 0) & (client.id < count)
    row = embeddings[jnp.clip(client.id, 0, count - 1)]
    return jnp.where(known, row, embeddings.mean(0))


def _cohort() -> Aggregator:
    """A cohort's uploads as they are, with whose they are and their shares of the weight."""

    def reduce(uploads, weights, ok, messages, env):
        ids = jnp.where(ok, env.ids, env.population)
        return Pulled(ids, divide(weights, jnp.sum(weights)), uploads)

    return Aggregator(lambda upload, weight, message, env: (upload, ()), lambda sums, env: sums[0], reduce)


def _without(like: PyTree, params: PyTree) -> PyTree:
    """The parameters that travel: ``None`` where ``like``, of the same structure, has ``None``."""
    return jax.tree.map(lambda a, p: None if a is None else p, like, params, is_leaf=lambda a: a is None)


def _whole(uploads: Variables, variables: Variables, cohort: int) -> Variables:
    """A cohort's changes, ``[cohort, ...]``; zeros for the private leaves, which didn't travel."""
    one = lambda u, p: jnp.zeros((cohort, *p.shape), p.dtype) if u is None else u
    return jax.tree.map(one, uploads, variables, is_leaf=lambda u: u is None)


def _unchangeable(server: HyperServer, variables: Variables) -> HyperServer:
    raise ValueError("a hypernetwork makes its clients' models: there is no one model to replace")


def _check(embedding_size: int | None, learning_rate: Any, optimizer: optax.GradientTransformation) -> None:
    """Refuse sizes, rates and optimizers that can't be."""
    if embedding_size is not None:
        checks.positive(embedding_size, "embedding_size", integer=True)
    checks.positive(learning_rate, "embedding_learning_rate")
    checks.optimizer(optimizer, "server_optimizer")
    goes_downhill(optimizer, "server_optimizer")


def _check_upload(upload: Any, sent: Variables) -> None:
    """Refuse an upload that isn't shaped as the model that was sent."""
    if jax.tree.structure(upload) != jax.tree.structure(sent):
        raise ValueError(
            "hypernetwork() learns from how a client's model changed, but this Round uploads something else "
            "too: build it on fedavg() and changes of the local objective"
        )


def _lenses(round: Round) -> tuple[Lens, Lens]:
    """The lenses ``model`` and ``view`` of a Round; one that doesn't train and send one whole model is refused."""
    model, view = round.model, round.view
    memories.of_one_model(round, "hypernetwork() makes each client's model anew")
    if model is None or view is None:
        raise ValueError("hypernetwork() makes the models that clients are sent, but this Round sends none")
    if "many_models" in round.traits:
        raise ValueError("hypernetwork() makes a model for each client, but this Round has several already")
    if "sub_models" in round.traits:
        raise ValueError(
            "hypernetwork() makes whole models, but this Round sends parts of one (federated dropout, width slices), "
            "which don't go together"
        )
    return model, view
