"""MimeLite (Karimireddy et al., "Breaking the Centralized Barrier for Cross-Device Federated Learning", NeurIPS 2021,
algorithm 1, without its correction).

The server keeps the statistics ``s`` of a centralised optimizer (momentum, Adam's moments); clients apply that
optimizer's step ``U`` in every local step but never touch ``s``; after the round the server updates it by ``V``
with the mean of the clients' full gradients at the model they received. Kept per client: nothing. Travels: a model
and ``s`` down; a model and a gradient up.

Deviations: any optax optimizer is the base optimizer, so momentum is optax's ``s = beta s + g`` with step
``g + beta s`` (the paper weighs ``g`` by 1 - beta: ``optax.ema(beta, debias=False)`` before the scaling), and Adam
corrects its bias by the number of server rounds. Means weigh p_k; the paper's are uniform.
"""

from typing import Any, NamedTuple

import jax
import optax

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab.round import unmarked


class MimeServer(NamedTuple):
    """FedAvg's state ``inner``, and the base optimizer's state ``s``."""

    inner: Any
    s: Any


class MimeMessage(NamedTuple):
    """FedAvg's message, and the base optimizer's state ``s``."""

    inner: fl.Variables
    s: Any


def mime_lite(model: fl.Model, base_optimizer: optax.GradientTransformation, **local_work: Any) -> fl.Round:
    """FedAvg whose clients step as a centralised optimizer would, with the server's momenta.

    Args:
      model: the model.
      base_optimizer: from optax; its learning rate is the local steps'.
      **local_work: as for :func:`algorithms.fedavg.fedavg`.
    """
    base = with_statistics(model, base_optimizer, local_work)

    def client_update(message, state, client, key, tilt=fl.identity):
        out = base.client_update(message, state, client, key, tilt)
        oracle, once = tilt(fl.gradient_oracle(model.loss)), jax.random.fold_in(key, 0x313)
        gradient, _ = fl.client_gradient(oracle, message.inner, client, once)
        return out._replace(upload=(out.upload, gradient), bytes_up=None)

    def server_update(server, aggregate, key):
        update, gradient = aggregate
        new, metrics = base.server_update(server, update, key)
        return new._replace(s=advanced(base_optimizer, server, gradient)), metrics

    return base._replace(
        client_update=client_update,
        aggregate=fl.aggregators.pair(base.aggregate, fl.aggregators.mean()),
        server_update=server_update,
    )


def with_statistics(model: fl.Model, base_optimizer: optax.GradientTransformation, local_work: dict) -> fl.Round:
    """FedAvg whose clients use ``s``, sent by the server, as their optimizer's state, and leave it as it is."""
    fl.checks.optimizer(base_optimizer, "base_optimizer")
    fl.goes_downhill(base_optimizer, "base_optimizer")
    fl.checks.absent(local_work, "keep_optimizer_state", "the optimizer's state is the server's")
    rule = optax.with_extra_args_support(base_optimizer)

    def update(updates, state, params=None, **extra):
        return rule.update(updates, state, params, **extra)[0], state

    frozen = optax.GradientTransformationExtraArgs(rule.init, update)
    base = fedavg(model, frozen, **{**local_work, "keep_optimizer_state": True})

    def init(key, data, params=None):
        inner = base.init(key, data, params)
        return MimeServer(inner, base_optimizer.init(inner.variables.params))

    def client_update(message, state, client, key, tilt=fl.identity):
        return base.client_update(message.inner, unmarked(message.s), client, key, tilt)._replace(state=())

    def server_update(server, update, key):
        inner, metrics = base.server_update(server.inner, update, key)
        return server._replace(inner=inner), metrics

    return fl.nested(
        base,
        init=init,
        init_client=lambda server, client: (),
        broadcast=lambda server, state, client, key: MimeMessage(server.inner.variables, server.s),
        client_update=client_update,
        server_update=server_update,
    )


def advanced(optimizer: optax.GradientTransformation, server: MimeServer, gradient: Any) -> Any:
    """The paper's ``V``: the base optimizer's statistics after one more gradient."""
    params = server.inner.variables.params
    gradient = jax.tree.map(lambda g, p: g.astype(p.dtype), gradient, params)
    return optimizer.update(gradient, server.s, params)[1]
