"""Mime (Karimireddy et al., "Breaking the Centralized Barrier for Cross-Device Federated Learning", NeurIPS 2021,
algorithm 1).

As :mod:`algorithms.mime_lite`, and each local gradient ``grad f_k(y; z)`` is corrected to
``grad f_k(y; z) - grad f_k(x; z) + c``, where ``z`` is the mini-batch, ``x`` the model received and ``c`` the mean of
the cohort's full gradients at it. ``c`` has to be collected before: two communications, which are two rounds here,
:func:`fedjax_lab.transforms.gradient_rounds`; ``fl.repeated(sampler)`` gives both the same cohort, as in the paper.
Kept per client: nothing. Travels: in even rounds a model down and a gradient up; in odd rounds a model, ``s`` and
``c`` down, a model up.

Deviations: those of :mod:`algorithms.mime_lite`.
"""

from typing import Any

import jax
import optax

import fedjax_lab as fl
from algorithms.mime_lite import advanced, with_statistics
from fedjax_lab.round import Sometimes
from fedjax_lab.transforms.gradient_rounds import select


def mime(model: fl.Model, base_optimizer: optax.GradientTransformation, **local_work: Any) -> fl.Round:
    """MimeLite whose local gradients are corrected towards the cohort's, by its full gradient.

    Args:
      model: the model.
      base_optimizer: from optax; its learning rate is the local steps'.
      **local_work: as for :func:`algorithms.fedavg.fedavg`, done in every other round.
    """
    base = with_statistics(model, base_optimizer, fl.transforms.idle_in_even_rounds(local_work))
    round = fl.compose(base, fl.transforms.gradient_rounds(corrected, own=False))

    def broadcast(server, state, client, key):
        message = round.broadcast(server, state, client, key)
        s = Sometimes(message.inner.s, message.gradient.there)  # nobody steps in even rounds
        return message._replace(inner=message.inner._replace(s=s))

    def server_update(server, aggregate, key):
        new, metrics = round.server_update(server, aggregate, key)
        s = select(aggregate[-1], advanced(base_optimizer, server.inner, server.gradient), server.inner.s)
        return new._replace(inner=new.inner._replace(s=s)), metrics

    alone = with_statistics(model, base_optimizer, local_work)  # which idles in no round
    return round._replace(broadcast=broadcast, server_update=server_update, local=alone.local)


def corrected(received: fl.Variables, c: Any, own: Any, client: fl.ClientData, key: jax.Array) -> fl.Tilt:
    """The tilt that takes the same batch's gradient at ``received`` away and adds ``c``."""

    def tilt(oracle):
        def shifted(params, inputs, key):
            grads, aux = oracle(params, inputs, key)
            before, _ = oracle(received.params, inputs, key)
            return jax.tree.map(lambda g, b, m: g - b + m.astype(g.dtype), grads, before, c), aux

        return shifted

    return tilt
