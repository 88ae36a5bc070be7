"""pFedBayes (Zhang, Li, Li, Guo and Shao, "Personalized Federated Learning via Variational Bayesian Inference", ICML
2022, algorithm 1).

Every client has a mean-field Gaussian ``q`` of its own over all parameters, drawn to the server's Gaussian ``w``: it
minimises ``E_q[-log likelihood] + zeta KL(q || w)`` over q and, in a copy of it, over w, whose means and log-scales the
server averages. Kept per client: q, two models. Travels: w, two models each way.

Deviations: q and the client's copy of w move at once, by the same optimizer and number of steps, where the authors'
code makes several steps of q for one of w; a new client's q begins at w.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fedjax_lab as fl
from fedjax_lab import variational as vi


class Global(NamedTuple):
    """The server's state, and the message: ``variables`` hold the mean of w, ``log_scale`` the rest of it."""

    variables: fl.Variables
    log_scale: Any


class Both(NamedTuple):
    """What a client trains: its ``own`` Gaussian and its copy of the ``shared`` one."""

    own: vi.Gaussian
    shared: vi.Gaussian


def pfedbayes(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    zeta: Any,
    initial_scale: Any = 0.05,
    beta: Any = 1.0,
    samples: int = 1,
    predictions: int = 16,
    weighting: Any = "examples",
    **local_work: Any,
) -> fl.Round:
    """Personal posteriors under a shared one, which is their prior.

    Evaluation of personal models averages predictions over q (:func:`fedjax_lab.variational.bayesian`).

    Args:
      model: whose loss is an example's negative log-likelihood.
      client_optimizer: of means and log-scales, q's and w's.
      zeta: the paper's, weight of the divergence from w.
      initial_scale: standard deviation that all Gaussians begin with, around the model's initialisation. Plain gradient
        steps need ``learning_rate zeta / (examples initial_scale^2)`` below 2; Adam doesn't.
      beta: the paper's, how far the server moves towards the mean of the clients' w.
      samples: draws of the parameters in a local step.
      predictions: draws over which an evaluation averages.
      weighting: of the mean; ``"uniform"`` is the paper's.
      **local_work: ``epochs``, ``steps``, ``batch_size`` and ``static`` of :func:`fedjax_lab.local_training`.

    Raises:
      ValueError: a zeta, initial_scale, beta or number of draws that isn't positive, parameters that aren't
        floating-point numbers.
    """
    for value, name in ((zeta, "zeta"), (initial_scale, "initial_scale"), (beta, "beta")):
        fl.checks.positive(value, name)
    for count, name in ((samples, "samples"), (predictions, "predictions")):
        fl.checks.positive(count, name, integer=True)
    fl.checks.weighting(weighting)
    model = vi.bayesian(model, predictions)
    local = fl.local_training(model, client_optimizer, **local_work)
    if model.init_from is None:
        vi.floating(jax.eval_shape(model.init, jax.random.key(0))[0])

    def init(key, data, params=None):
        variables = fl.initial_variables(model, key, data, params)
        vi.floating(variables.params)
        fill = lambda p: jnp.full_like(vi.wide(p), jnp.log(initial_scale))
        return Global(variables, jax.tree.map(fill, variables.params))

    def shared_of(message: Global) -> vi.Gaussian:
        return vi.Gaussian(message.variables.params, message.log_scale)

    def client_update(message, state, client, key, tilt=fl.identity):
        start = message.variables._replace(params=Both(state, shared_of(message)))
        run = local(start, client, key, fl.chain_tilts(tilt, both(client.size, zeta, samples)))
        own, shared = run.variables.params
        after = Global(run.variables._replace(params=shared.mean), shared.log_scale)
        return fl.ClientOutput(
            upload=fl.difference(after, message),
            weight=fl.client_weight(weighting, client),
            state=own,
            metrics={"loss": run.loss},
            trained=fl.Trained(message.variables, after.variables, run.steps, run.loss),
        )

    def server_update(server, update, key):
        params = jax.tree.map(lambda u: beta * u, (update.variables.params, update.log_scale))
        moved = Global(update.variables._replace(params=params[0]), params[1])
        return fl.add(server, moved), {}

    return fl.Round(
        init=init,
        init_client=lambda server, client: shared_of(server),
        client_update=client_update,
        aggregate=fl.aggregators.mean(),
        server_update=server_update,
        personalize=lambda message, state, client, key: message.variables._replace(params=state),
        local=local,
        loss=model.loss,
        metrics=model.metrics,
        model=fl.Lens(lambda s: s.variables, lambda s, v: s._replace(variables=v)),
        view=fl.Lens(lambda m: m.variables, lambda m, v: m._replace(variables=v)),
        traits=frozenset({"personal"}),
    )


def both(size: Any, zeta: Any, samples: int) -> fl.Tilt:
    """The tilt from a model's loss to the paper's objective F_i of :class:`Both`, per example."""

    def tilt(oracle):
        def tilted(params: Both, inputs, key):
            fit = vi.elbo(params.shared, size, samples=samples, kl_weight=zeta)(oracle)
            own, aux = fit(params.own, inputs, key)
            pull = zeta / jnp.maximum(jnp.asarray(size, jnp.float32), 1)
            shared = jax.grad(lambda w: pull * vi.divergence(params.own, w))(params.shared)
            return Both(own, shared), aux

        return tilted

    return tilt
