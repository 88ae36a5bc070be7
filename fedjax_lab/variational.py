"""Mean-field Gaussians over a model's parameters: cavities and sites, the variational objective, averaged predictions.

What algorithms for Bayesian models share (:mod:`algorithms.virtual`, :mod:`algorithms.pfedbayes`). Every parameter has
a mean and a precision of its own. A model's loss is read as the negative log-likelihood of an example.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.models.base import Model, Variables, as_model
from fedjax_lab.round import Tilt

PyTree = Any


class Gaussian(NamedTuple):
    """``mean`` and ``log_scale`` (of the standard deviation), each shaped as the parameters."""

    mean: PyTree
    log_scale: PyTree


class Site(NamedTuple):
    """A factor ``exp(shift x - precision x^2 / 2)``, or a change of one; each shaped as the parameters."""

    shift: PyTree
    precision: PyTree


class Belief(NamedTuple):
    """A Gaussian by ``mean`` and ``precision``, which sites are multiplied to and divided from."""

    mean: PyTree
    precision: PyTree


def floating(params: PyTree) -> None:
    """Refuse parameters that aren't real floating-point numbers: no Gaussian lies over them.

    Raises:
      ValueError: naming the leaf.
    """
    for name, leaf in checks.named_leaves(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"params leaf {name} is {leaf.dtype}, and a Gaussian needs floating-point parameters: what isn't "
                "trained belongs into the model's state"
            )


def wide(leaf: jax.Array) -> jax.Array:
    """Precisions are float32 at least, whatever the parameters are."""
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def belief(mean: PyTree, precision: Any) -> Belief:
    """A Gaussian with the same precision everywhere."""
    return Belief(mean, jax.tree.map(lambda m: jnp.full_like(wide(m), precision), mean))


def gaussian(belief: Belief) -> Gaussian:
    """The same by the logarithm of its scale, which can take any value and so be trained."""
    return Gaussian(belief.mean, jax.tree.map(lambda p: -0.5 * jnp.log(p), belief.precision))


def no_site(params: PyTree) -> Site:
    """The factor that is one everywhere."""
    zeros = jax.tree.map(lambda p: jnp.zeros_like(wide(p)), params)
    return Site(zeros, zeros)


def times(belief: Belief, site: Site, least: Any) -> Belief:
    """The product with a site; its precision is held at ``least`` from below.

    The mean moves by ``(shift - precision mean) / new precision``: where the precision is held, too, the outcome is a
    proper Gaussian that lies on the side to which the site pulls.
    """

    def one(m, p, s, q):
        new = jnp.maximum(p + q, least)
        return (m + (s - q * m) / new).astype(m.dtype), new

    return _belief_of(jax.tree.map(one, belief.mean, belief.precision, site.shift, site.precision), belief)


def without(belief: Belief, site: Site, least: Any) -> Belief:
    """The cavity: the product divided by a site, its precision held at ``least`` from below."""
    return times(belief, jax.tree.map(jnp.negative, site), least)


def between(posterior: Gaussian, cavity: Belief) -> Site:
    """The site that makes ``posterior`` of ``cavity``.

    Where the posterior is less certain than the cavity (which training noise can bring about, or a likelihood that
    isn't log-concave), the site's precision is zero instead of negative, and its shift is the one that brings the
    mean to the posterior's. Products of such sites are proper whatever else they are multiplied with.
    """

    def one(m, log_scale, c, p):
        gained = jnp.maximum(jnp.exp(-2 * log_scale) - p, 0)
        return gained * m + p * (m - c), gained

    pairs = jax.tree.map(one, posterior.mean, posterior.log_scale, cavity.mean, cavity.precision)
    return Site(*_unzip(pairs, posterior.mean))


def clipped_share(posterior: Gaussian, cavity: Belief) -> jax.Array:
    """The share of parameters whose site :func:`between` gives no precision, ``float32[]``."""
    less = jax.tree.map(lambda s, p: jnp.sum(jnp.exp(-2 * s) < p), posterior.log_scale, cavity.precision)
    return jnp.float32(sum(jax.tree.leaves(less))) / sum(p.size for p in jax.tree.leaves(cavity.precision))


def elbo(prior: Gaussian, size: Any, *, samples: int = 1, kl_weight: Any = 1.0) -> Tilt:
    """The tilt from a model's loss to the variational objective of a :class:`Gaussian` over its parameters.

    That is ``E_q[mean loss] + kl_weight KL(q || prior) / size``, the negative evidence lower bound per example. Its
    gradient is estimated at ``theta = mean + scale noise`` (Kingma and Welling, ICLR 2014), that of the divergence at
    the same ``theta`` and without the terms of mean zero (Roeder, Wu and Duvenaud, "Sticking the Landing", NIPS 2017):
    where q is the exact posterior, it is zero for every draw, so that full-batch training ends there exactly.

    Args:
      prior: what q is drawn to, such as a cavity.
      size: the number of examples, ``[]``.
      samples: draws of ``theta`` in a step.
      kl_weight: 1 is Bayes' rule; less is a colder posterior, of the likelihood to the power ``1 / kl_weight``.
    """

    def tilt(oracle):
        def tilted(params: Gaussian, inputs, key):
            pull = kl_weight / jnp.maximum(jnp.asarray(size, jnp.float32), 1)

            def draw(i, carry):
                total, loss, model_state = carry
                noise = _noise(jax.random.fold_in(key, 2 * i), params.mean)
                theta = jax.tree.map(_shifted, params.mean, params.log_scale, noise)
                grads, (value, model_state) = oracle(
                    theta, (model_state, *inputs[1:]), jax.random.fold_in(key, 2 * i + 1)
                )
                path = lambda g, t, c, r, s, n: wide(g) + pull * ((t - c) * jnp.exp(-2 * r) - n * jnp.exp(-s))
                slope = jax.tree.map(path, grads, theta, prior.mean, prior.log_scale, params.log_scale, noise)
                of_scale = jax.tree.map(lambda u, s, n: u * jnp.exp(s) * n, slope, params.log_scale, noise)
                total = jax.tree.map(lambda a, b: a + b / samples, total, Gaussian(slope, of_scale))
                return total, loss + (value / samples).astype(loss.dtype), model_state

            zeros = jax.tree.map(lambda p: jnp.zeros_like(wide(p)), params)
            carry = (zeros, jnp.float32(0), inputs[0])
            carry = draw(0, carry) if samples == 1 else jax.lax.fori_loop(0, samples, draw, carry)
            grads, loss, model_state = carry
            return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), (loss, model_state)

        return tilted

    return tilt


def divergence(q: Gaussian, p: Gaussian) -> jax.Array:
    """``KL(q || p)``, ``float32[]``."""

    def one(m, r, c, s):
        return jnp.sum(s - r + (jnp.exp(2 * r) + (m - c) ** 2) / 2 * jnp.exp(-2 * s) - 0.5)

    return jnp.sum(jnp.stack(jax.tree.leaves(jax.tree.map(one, q.mean, q.log_scale, p.mean, p.log_scale))))


# ---- predictions ----


def bayesian(model: Model, samples: int) -> Model:
    """The model, which also takes a :class:`Gaussian` for its parameters.

    The loss of a Gaussian is that of its mean, so that transforms may train one as any other parameters. Its metrics
    are of predictions averaged over ``samples`` draws, always the same ones:

    - ``loss``, the negative logarithm of the mean likelihood;
    - for a classifier of single labels ``accuracy`` of the mean probabilities, their ``entropy`` (predictive
      uncertainty) and ``mutual_information``, the part of it that comes from not knowing the parameters;
    - the mean over the draws of every other metric.
    """
    model = as_model(model)

    def loss(params, model_state, batch, mask, key, train):
        params = params.mean if isinstance(params, Gaussian) else params
        return model.loss(params, model_state, batch, mask, key, train)

    def metrics(params, model_state, batch):
        if not isinstance(params, Gaussian):
            return model.metrics(params, model_state, batch)
        return _averaged(model, params, model_state, batch, samples)

    return model._replace(loss=loss, metrics=metrics)


def _averaged(model: Model, q: Gaussian, model_state: PyTree, batch: PyTree, samples: int) -> dict[str, jax.Array]:
    labels = checks.label_leaf(batch) if model.num_classes else None
    key = jax.random.key(0)

    def log_likelihood(theta, batch):
        mask = jnp.ones(jax.tree.leaves(batch)[0].shape[0], bool)
        return -model.loss(theta, model_state, batch, mask, key, False)[0]

    def one(i):
        theta = jax.tree.map(_shifted, q.mean, q.log_scale, _noise(jax.random.fold_in(key, i), q.mean))
        found = {"plain": model.metrics(theta, model_state, batch), "own": log_likelihood(theta, batch)}
        if labels is not None:
            every = jnp.arange(model.num_classes, dtype=labels.dtype)
            relabelled = lambda c: log_likelihood(theta, {**batch, "y": jnp.full(labels.shape, c, labels.dtype)})
            found["classes"] = jax.vmap(relabelled)(every)  # [classes, batch]; the network itself runs once
        return found

    drawn = jax.lax.map(one, jnp.arange(samples))
    out = {name: jnp.mean(values, axis=0) for name, values in drawn["plain"].items()}
    out["loss"] = jnp.log(samples) - jax.nn.logsumexp(drawn["own"], axis=0)
    if labels is not None:
        each = jax.nn.softmax(drawn["classes"], axis=1)
        mean = jnp.mean(each, axis=0)
        entropy = lambda p, axis: -jnp.sum(jax.scipy.special.xlogy(p, p), axis=axis)
        out["accuracy"] = (jnp.argmax(mean, axis=0) == labels).astype(jnp.float32)
        out["entropy"] = entropy(mean, 0)
        out["mutual_information"] = out["entropy"] - jnp.mean(entropy(each, 1), axis=0)
    return out


# ---- small parts ----


def at_mean(variables: Variables) -> Variables:
    """Variables over a :class:`Gaussian` as those of the plain model."""
    return variables._replace(params=variables.params.mean)


def _shifted(mean, log_scale, noise):
    return (mean + jnp.exp(log_scale) * noise).astype(mean.dtype)


def _noise(key: jax.Array, like: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    draws = [
        jax.random.normal(jax.random.fold_in(key, i), leaf.shape, wide(leaf).dtype) for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, draws)


def _unzip(pairs: PyTree, like: PyTree) -> tuple[PyTree, PyTree]:
    structure = jax.tree.structure(like)
    found = structure.flatten_up_to(pairs)
    return structure.unflatten([a for a, _ in found]), structure.unflatten([b for _, b in found])


def _belief_of(pairs: PyTree, like: Belief) -> Belief:
    return Belief(*_unzip(pairs, like.mean))
