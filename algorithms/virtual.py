"""VIRTUAL (Corinzia, Beuret and Buhmann, "Variational Federated Multi-Task Learning", 2019, algorithm 1).

The server's parameters are joined to every client's data in a star-shaped Bayesian network. Their posterior is kept as
a product: prior times one site for each client, all of them mean-field Gaussians. A client divides its own site out of
the posterior it is sent (the cavity), fits a Gaussian to cavity times likelihood by variational inference on its own
data, and takes what that adds to the cavity for its new site, damped; the server multiplies the posterior by what the
sites changed by. Clients may have parameters of their own, whose posterior never leaves them; those that more than
one client needs are the server's. Kept per client: its site, two models. Travels: the posterior down, the change of
the site up, two models each way.

With a conjugate Gaussian likelihood whose precision is diagonal, the posterior is exact once every client has taken
part with ``damping=1``, whatever the cohorts (to the accuracy of the local training, which is noiseless in full
batches, see :func:`fedjax_lab.variational.elbo`). Many clients with overlapping data may overshoot when they all
change at once; ``damping`` of one over the cohort's size never does.

What keeps Gaussians proper: a site's precision is never negative (:func:`fedjax_lab.variational.between`), so that
every cavity is at least as certain as the prior. Links that lose something may break this; the precision is then held
at the prior's, by client and server, and the server reports the share ``improper`` of precisions that were not
positive.

Deviations: the prior's mean is the model's initialisation (zero for linear models), so that a network's symmetry is
broken alike for all. The paper's networks have connections from shared to private layers; here any leaves may be
private.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

import fedjax_lab as fl
from fedjax_lab import variational as vi
from fedjax_lab.transforms.private import fill, keep, merge, strip


class Posterior(NamedTuple):
    """The server's state, and the message: ``variables`` hold the mean, ``precision`` is shaped as the parameters."""

    variables: fl.Variables
    precision: Any


class Client(NamedTuple):
    """A client's ``site``, and the mean of the ``prior`` of its private leaves (Variables with ``None`` elsewhere)."""

    site: vi.Site
    prior: Any


class Change(NamedTuple):
    """What a site changed by, its shift as seen from the mean that was sent; and the model state's change."""

    site: vi.Site
    model_state: Any


def virtual(
    model: fl.Model,
    client_optimizer: fl.ClientOptimizer,
    *,
    prior_scale: Any,
    damping: Any = 1.0,
    samples: int = 1,
    kl_weight: Any = 1.0,
    private: Callable[[str], bool] | None = None,
    predictions: int = 16,
    **local_work: Any,
) -> fl.Round:
    """A posterior over shared parameters, refined by the clients' sites.

    Evaluation of personal models averages predictions over the posterior and reports their uncertainty
    (:func:`fedjax_lab.variational.bayesian`); that of the shared model uses the posterior's mean.

    Args:
      model: whose loss is an example's negative log-likelihood (a squared error needs the factor 1/2).
      client_optimizer: of means and log-scales; Adam copes with their unequal curvature.
      prior_scale: standard deviation of the prior around the model's initialisation.
      damping: the share of the new site that is taken, above 0 and at most 1.
      samples: draws of the parameters in a local step.
      kl_weight: weight of the divergence from the cavity; 1 is Bayes' rule.
      private: a predicate of the leaves that are each client's own, such as
        ``fl.transforms.leaves("params/Dense_1/*")``; ``None``: all are shared.
      predictions: draws over which an evaluation averages.
      **local_work: ``epochs``, ``steps``, ``batch_size`` and ``static`` of :func:`fedjax_lab.local_training`.

    Raises:
      ValueError: a prior_scale, kl_weight or number of draws that isn't positive, a damping outside (0, 1],
        parameters that aren't floating-point numbers; when the process is built, a predicate that names nothing,
        everything, or the model's state.
    """
    _check(prior_scale, damping, samples, kl_weight, predictions)
    if private is not None:
        fl.checks.predicate(private, "private")
    model = vi.bayesian(model, predictions)
    local = fl.local_training(model, client_optimizer, **local_work)
    if model.init_from is None:
        vi.floating(jax.eval_shape(model.init, jax.random.key(0))[0])
    certain = 1.0 / (prior_scale * prior_scale)
    star = _Star(certain, private)

    def init(key, data, params=None):
        variables = fl.initial_variables(model, key, data, params)
        vi.floating(variables.params)
        if private is not None:
            _splits(private, variables)
        return Posterior(variables, vi.belief(variables.params, certain).precision)

    def client_update(message, state, client, key, tilt=fl.identity):
        variables, precision = star.received(message, state)
        posterior = vi.Belief(variables.params, precision)
        cavity = vi.without(posterior, state.site, certain)
        objective = vi.elbo(vi.gaussian(cavity), client.size, samples=samples, kl_weight=kl_weight)
        start = variables._replace(params=vi.gaussian(posterior))
        run = local(start, client, key, fl.chain_tilts(tilt, objective))
        fitted, rate = run.variables.params, jnp.where(run.steps > 0, damping, 0.0)
        change = jax.tree.map(lambda new, old: rate * (new - old), vi.between(fitted, cavity), state.site)
        upload = Change(_seen_from(variables.params, change), fl.difference(run.variables[1], variables.model_state))
        plain = fl.Trained(variables, vi.at_mean(run.variables), run.steps, run.loss)
        return fl.ClientOutput(
            upload=star.travelling(variables, upload),
            weight=jnp.where(client.size > 0, 1.0, 0.0),
            state=state._replace(site=jax.tree.map(jnp.add, state.site, change)),
            metrics={"loss": run.loss, "clipped": vi.clipped_share(fitted, cavity)},
            trained=plain,
        )

    return fl.Round(
        init=init,
        init_client=lambda server, client: star.first(server),
        broadcast=lambda server, state, client, key: star.travelling(server.variables, server),
        client_update=client_update,
        aggregate=product_of_sites(),
        server_update=lambda server, aggregate, key: star.multiplied(server, aggregate),
        personalize=lambda message, state, client, key: star.personal(message, state),
        local=local,
        loss=model.loss,
        metrics=model.metrics,
        model=fl.Lens(lambda s: s.variables, lambda s, v: s._replace(variables=v)),
        view=fl.Lens(lambda m: m.variables, lambda m, v: m._replace(variables=v)),
        traits=frozenset({"personal"} | ({"partial", "split"} if private is not None else set())),
    )


class _Star(NamedTuple):
    """The star-shaped network: the prior's precision ``certain``, and which leaves are ``private``, if any.

    A Round holds functions of its methods, not the methods: JAX would hash these by ``certain``, which may be traced.
    """

    certain: Any
    private: Callable[[str], bool] | None

    def first(self, server: Posterior) -> Client:
        """A client that never took part."""
        prior = () if self.private is None else keep(self.private, server.variables)
        return Client(vi.no_site(server.variables.params), prior)

    def travelling(self, variables: fl.Variables, whole: Any) -> Any:
        """A message or an upload without what is private."""
        return whole if self.private is None else strip(self.private, variables, whole)

    def received(self, message: Posterior, state: Client) -> Posterior:
        """A proper posterior with the client's own part, which is its prior times its site."""
        proper = lambda precision: jax.tree.map(lambda p: jnp.maximum(p, self.certain), precision)
        if self.private is None:
            return message._replace(precision=proper(message.precision))
        whole = fill(state.prior, message)
        prior = merge(state.prior, whole.variables).params
        own = vi.times(vi.belief(prior, self.certain), state.site, self.certain)
        part = lambda tree: keep(self.private, fl.Variables(tree))
        mean = merge(part(own.mean), fl.Variables(whole.variables.params)).params
        precision = merge(part(own.precision), fl.Variables(proper(whole.precision))).params
        return Posterior(whole.variables._replace(params=mean), precision)

    def personal(self, message: Posterior, state: Client) -> fl.Variables:
        """The posterior that a client would use, as a Gaussian over the parameters."""
        whole = self.received(message, state)
        return whole.variables._replace(params=vi.gaussian(vi.Belief(whole.variables.params, whole.precision)))

    def multiplied(self, server: Posterior, change: Change) -> tuple[Posterior, dict[str, jax.Array]]:
        """The posterior times what the sites changed by, and the share of precisions that weren't positive then."""
        if self.private is not None:
            change = fill(keep(self.private, server.variables), change)
        site, mean = change.site, server.variables.params
        pairs = zip(*map(jax.tree.leaves, (server.precision, site[1])), strict=True)
        improper = [jnp.sum(p + q <= 0) for p, q in pairs]
        new = vi.times(vi.Belief(mean, server.precision), vi.Site(*site), self.certain)
        model_state = fl.add(server.variables.model_state, change.model_state)
        count = sum(leaf.size for leaf in jax.tree.leaves(mean))
        metrics = {"improper": jnp.float32(sum(improper)) / count}
        return Posterior(fl.Variables(new.mean, model_state), new.precision), metrics


def _seen_from(mean: Any, change: vi.Site) -> vi.Site:
    """A site's change with its shift as seen from a mean, instead of zero."""
    shift = jax.tree.map(lambda s, q, m: s - q * m, change.shift, change.precision, mean)
    return vi.Site(shift, change.precision)


def product_of_sites() -> fl.Aggregator:
    """The sum of all survivors' changes, and the mean change of the model state.

    An upload's shift is as seen from the mean that its client was sent; here it becomes one seen from zero, since
    messages may be of different rounds. Both parts lose little in a lossy link only while they are apart.
    """

    def lift(upload: Change, weight, message: Posterior, env):
        mean = message.variables.params
        shift = jax.tree.map(lambda s, q, m: s + q * m, upload.site.shift, upload.site.precision, mean)
        lifted = Change(vi.Site(shift, upload.site.precision), upload.model_state)
        return jax.tree.map(lambda u: vi.wide(u) * weight, lifted), weight

    def finish(sums, env):
        mean = fl.aggregators.divide(*sums)
        return mean._replace(site=jax.tree.map(lambda s: s * env.survivors, mean.site))

    return fl.Aggregator(lift, finish)


def _splits(private: Callable[[str], bool], variables: fl.Variables) -> None:
    """Refuse a predicate that doesn't split the parameters."""
    chosen = {name: private(name) for name, _ in fl.checks.named_leaves(variables)}
    state = [name for name, yes in chosen.items() if yes and name.startswith("model_state/")]
    if state:
        raise ValueError(
            f"private names {state[0]}, which is no parameter: keep statistics with "
            "fl.compose(virtual(...), fl.transforms.private(fl.transforms.statistics))"
        )
    of_params = [yes for name, yes in chosen.items() if name.startswith("params")]
    if all(of_params) or not any(of_params):
        what = "everything" if all(of_params) else "nothing"
        raise ValueError(f"the predicate makes {what} private of {list(chosen)}")


def _check(prior_scale: Any, damping: Any, samples: int, kl_weight: Any, predictions: int) -> None:
    for value, name in ((prior_scale, "prior_scale"), (kl_weight, "kl_weight")):
        fl.checks.positive(value, name)
    for count, name in ((samples, "samples"), (predictions, "predictions")):
        fl.checks.positive(count, name, integer=True)
    fl.checks.positive(damping, "damping")
    if not isinstance(damping, Tracer) and damping > 1:
        raise ValueError(f"damping must be above 0 and at most 1; got {damping!r}")
