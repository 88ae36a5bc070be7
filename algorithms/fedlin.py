"""FedLin (Mitra et al., "Linear Convergence in Federated Learning: Tackling Client Heterogeneity and Sparse
Gradients", NeurIPS 2021, algorithm 1).

Each local step follows ``grad F_k(w) - grad F_k(w_t) + g_t``, where ``g_t`` is the mean gradient at ``w_t``, with the
step size divided by the client's number of steps ``tau_k``. Collecting ``g_t`` and training are two
communications, which are two rounds here, :func:`fedjax_lab.transforms.gradient_rounds`. Kept per client: nothing.
Travels: in even rounds a model down and a gradient up; in odd rounds a model and the gradient down, a model up.

Deviations: means weigh p_k (the paper's are uniform); the paper's sparsified gradients with error feedback are a
wire around the uploads and not part of this file.
"""

from typing import Any

import jax
import jax.numpy as jnp

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def fedlin(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    epochs: fl.Work | None = None,
    steps: fl.Work | None = None,
    batch_size: int | None = 10,
    **options: Any,
) -> fl.Round:
    """FedAvg whose local steps know the global gradient, with a step size by each client's work.

    Args:
      model: the model.
      client_optimizer: SGD of the paper's rate ``eta bar``, of which client k takes ``1/tau_k`` (its gradients are
        divided by ``tau_k``: for other optimizers than SGD that isn't the same).
      epochs: as for :func:`algorithms.fedavg.fedavg`, done in every other round.
      steps: local steps instead of epochs.
      batch_size: examples a step; ``None`` is all of the client's.
      **options: ``weighting``, ``server_optimizer`` and ``keep_optimizer_state`` of the same.
    """
    given = {"epochs": epochs, "steps": steps, "batch_size": batch_size}
    work = fl.transforms.idle_in_even_rounds({name: amount for name, amount in given.items() if amount is not None})
    base = fedavg(model, client_optimizer, **{"batch_size": batch_size} | work, **options)

    def local_steps(client, key):
        if steps is not None:
            return work["steps"](client, jax.random.fold_in(key, 1))
        batches = 1 if batch_size is None else -(-client.size // batch_size)
        return work["epochs"](client, jax.random.fold_in(key, 1)) * batches

    def correct(received, gradient, own, client, key):
        difference = jax.tree.map(lambda g, o: g - o, gradient, own)
        share = 1 / jnp.maximum(local_steps(client, key), 1)

        def slow(oracle):
            def slowed(params, inputs, key):
                grads, aux = oracle(params, inputs, key)
                return jax.tree.map(lambda g: share.astype(g.dtype) * g, grads), aux

            return slowed

        return fl.chain_tilts(fl.shift(lambda params: difference), slow)

    made = fl.compose(base, fl.transforms.gradient_rounds(correct))
    alone = fedavg(model, client_optimizer, epochs=epochs, steps=steps, batch_size=batch_size, **options)
    return made._replace(local=alone.local)  # which idles in no round
