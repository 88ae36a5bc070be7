"""FedDANE (Li et al., "FedDANE: A Federated Newton-Type Method", Asilomar 2019, algorithm 2).

Lines 3 to 5 collect the mean gradient ``g_t`` of a cohort, lines 6 to 8 let another one minimise
``F_k(w) + <g_t - grad F_k(w_t), w> + mu/2 |w - w_t|^2`` and average: two communications, which are two rounds here,
:func:`fedjax_lab.transforms.gradient_rounds`. Kept per client: nothing. Travels: in even rounds a model down and a
gradient up; in odd rounds a model and the gradient down, a model up.

Deviations: clients are drawn as the sampler says and weigh p_k, where the paper draws them by p_k and takes plain
means; the local problem is solved by ``client_optimizer`` for as long as asked.
"""

from typing import Any

import jax

import fedjax_lab as fl
from algorithms.fedavg import fedavg


def feddane(model: fl.Model, client_optimizer: fl.ClientOptimizer, *, mu: Any, **local_work: Any) -> fl.Round:
    """FedAvg on local objectives whose gradient at the model is the global one, with a proximal term.

    Args:
      model: the model.
      client_optimizer: the solver of the local problem.
      mu: strength of the proximal term.
      **local_work: as for :func:`algorithms.fedavg.fedavg`, done in every other round.
    """
    fl.checks.not_negative(mu, "mu")

    def correct(received, gradient, own, client, key):
        difference = jax.tree.map(lambda g, o: g - o, gradient, own)
        return fl.chain_tilts(fl.shift(lambda params: difference), fl.proximal(mu, received.params))

    base = fedavg(model, client_optimizer, **fl.transforms.idle_in_even_rounds(local_work))
    made = fl.compose(base, fl.transforms.gradient_rounds(correct))
    return made._replace(local=fedavg(model, client_optimizer, **local_work).local)  # which idles in no round
