"""Meta-learning: train a model for what it becomes after a few steps on a client's own data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fedjax_lab import checks, shuffle
from fedjax_lab.client import ClientData, of_second_part
from fedjax_lab.gradients import client_gradient
from fedjax_lab.local import gradient_oracle
from fedjax_lab.models.base import Model, Variables, add, difference, reparametrized
from fedjax_lab.round import Oracle, Round, Tilt, Transform, chain_tilts, identity
from fedjax_lab.transforms.mixture import Components
from fedjax_lab.transforms.personal import received_model
from fedjax_lab.transforms.smoothness import twice_differentiable

PyTree = Any
Gradient = Callable[[PyTree], PyTree]
FORMS = ("exact", "hessian_free", "first_order")


def per_fedavg(
    alpha: Any,
    *,
    form: str = "exact",
    inner_steps: int = 1,
    support: float = 0.5,
    support_batch_size: int | None = None,
    delta: Any = 1e-3,
) -> Transform:
    """Train on ``F_k(w - alpha grad F_k(w))``, the loss after adaptation (Per-FedAvg, Fallah, Mokhtari and Ozdaglar,
    NeurIPS 2020, algorithm 1).

    Each client's data is split once into support and query. A local step adapts on the support, ``w_1 = w - alpha
    grad f_s(w)``, takes the gradient of a query batch at ``w_1``, and brings it back through the adaptation:
    ``(I - alpha H_s(w)) grad f_q(w_1)``. Each client would use the model it is sent, adapted in the same way on all its
    data. Kept per client: nothing. Travels: nothing more.

    Deviation: the Hessian is that of the data it adapted on, where the paper draws a third batch for it, so that the
    result is the gradient of a function.

    Args:
      alpha: step size of the adaptation.
      form: ``"exact"``: the Hessian's product by forward-mode differentiation; ``"hessian_free"``: by a difference
        of two gradients (the paper's HF); ``"first_order"``: left out (FO).
      inner_steps: adaptation steps, 1 in the paper.
      support: a client's share of examples for the adaptation; a client of one example has nothing left to train
        on, and counts for nothing.
      support_batch_size: examples of the support that a step adapts on, drawn anew for each; ``None`` is all.
      delta: of ``"hessian_free"``, the difference's width along the gradient.

    Raises:
      ValueError: another form, a share outside 0..1, values that aren't positive; a Round that sends no whole model;
        when the process is built, if no client has two examples, or for forms of second order if the loss depends on
        parameters only through integers, rounding or ``stop_gradient`` (:mod:`fedjax_lab.transforms.smoothness`).
    """
    checks.positive(alpha, "alpha")
    checks.positive(delta, "delta")
    checks.positive(inner_steps, "inner_steps", integer=True)
    _known(form, FORMS)

    def step(params: PyTree, gradient: Gradient) -> PyTree:
        return jax.tree.map(lambda w, g: (w - alpha * g).astype(w.dtype), params, gradient(params))

    def hessian_product(gradient: Gradient, params: PyTree, g: PyTree) -> PyTree:
        if form == "exact":
            return jax.jvp(gradient, (params,), (g,))[1]
        moved = lambda sign: jax.tree.map(lambda w, v: (w + sign * delta * v).astype(w.dtype), params, g)
        return jax.tree.map(lambda a, b: (a - b) / (2 * delta), gradient(moved(1)), gradient(moved(-1)))

    def tilt(gradient_of: Callable[[Oracle, PyTree, jax.Array], Gradient]) -> Tilt:
        def tilt(oracle):
            def tilted(params, inputs, key):
                gradient, visited = gradient_of(oracle, inputs[0], key), [params]
                for _ in range(inner_steps):
                    visited.append(step(visited[-1], gradient))
                grads, aux = oracle(visited[-1], inputs, key)
                if form != "first_order":
                    for point in reversed(visited[:-1]):
                        curved = hessian_product(gradient, point, grads)
                        grads = jax.tree.map(lambda g, h: (g - alpha * h).astype(g.dtype), grads, curved)
                return grads, aux

            return tilted

        return tilt

    def adapt(params, gradient):
        for _ in range(inner_steps):
            params = step(params, gradient)
        return params

    return _meta(tilt, adapt, support, support_batch_size, "per_fedavg()", form)


def meta_sgd(*, form: str = "exact", support: float = 0.5, support_batch_size: int | None = None) -> Transform:
    """Per-FedAvg that learns the adaptation's step size, one for each parameter (Meta-SGD, Li et al., 2017,
    algorithm 1; federated: Chen et al., "Federated Meta-Learning with Fast Convergence", 2018, algorithm 1).

    Over a Round whose model is :func:`with_rates`: parameters ``theta`` and rates ``a`` of their shapes, both trained
    by the gradient of ``f_q(theta - a * grad f_s(theta))``. Kept per client: nothing. Travels: twice the model each
    way.

    Args:
      form: ``"exact"`` or ``"first_order"``, which leaves the second derivatives out.
      support: a client's share of examples for the adaptation.
      support_batch_size: examples of the support that a step adapts on, drawn anew for each; ``None`` is all.

    Raises:
      ValueError: another form, a share outside 0..1; a model without rates; for the exact form as for
        :func:`per_fedavg`.
    """
    _known(form, ("exact", "first_order"))

    def parts(params):
        """Parameters, rates, and what puts the two together again: a model's, or those of a mixture's components."""
        several = isinstance(params, Components)
        inside = params.each if several else params
        if not isinstance(inside, dict) or set(inside) != {"params", "rates"}:
            made = "with_components(with_rates(model, rate), M)" if several else "with_rates(model, rate)"
            raise ValueError(f"meta_sgd() learns rates beside each model's parameters: write fl.transforms.{made}")
        pack = Components if several else identity
        return inside["params"], inside["rates"], lambda theta, rates: pack({"params": theta, "rates": rates})

    def step(params, gradient):
        theta, rates, whole = parts(params)
        grads = parts(gradient(params))[0]
        moved = jax.tree.map(lambda w, a, g: (w - a * g).astype(w.dtype), theta, rates, grads)
        return whole(moved, rates), grads

    def tilt(gradient_of):
        def tilt(oracle):
            def tilted(params, inputs, key):
                theta, rates, whole = parts(params)
                gradient = gradient_of(oracle, inputs[0], key)
                adapted, before = step(params, gradient)
                grads, aux = oracle(adapted, inputs, key)
                after = parts(grads)[0]
                own = after
                if form == "exact":
                    scaled = jax.tree.map(lambda a, g: a * g, rates, after)
                    of_theta = lambda theta: parts(gradient(whole(theta, rates)))[0]
                    curved = jax.jvp(of_theta, (theta,), (scaled,))[1]
                    own = jax.tree.map(lambda g, h: (g - h).astype(g.dtype), after, curved)
                slopes = jax.tree.map(lambda b, g: -b * g, before, after)
                return whole(own, slopes), aux

            return tilted

        return tilt

    return _meta(
        tilt, lambda params, gradient: step(params, gradient)[0], support, support_batch_size, "meta_sgd()", form
    )


def with_rates(model: Model, rate: Any) -> Model:
    """The model with a learning rate for each parameter beside it: params ``{"params": ..., "rates": ...}``.

    Args:
      model: any model.
      rate: what all rates begin with.
    """
    checks.model(model)
    checks.positive(rate, "rate")
    rates = lambda params: jax.tree.map(lambda w: jnp.full_like(w, rate), params)
    return reparametrized(
        model,
        lambda made, key: ({"params": made[0], "rates": rates(made[0])}, made[1]),
        lambda params: params["params"],
    )


def reptile(step_size: Any) -> Transform:
    """The server goes only a part of the way to the clients' models (Reptile, Nichol, Achiam and Schulman, "On
    First-Order Meta-Learning Algorithms", 2018, algorithm 2).

    ``w += step_size (w' - w)`` for the ``w'`` to which the inner round would go; k local steps of SGD make it Reptile.
    What each client would use is :func:`fine_tuning`'s: ``compose(round, reptile(0.5), fine_tuning())``. Kept per
    client: nothing. Travels: nothing more.

    Args:
      step_size: the paper's epsilon; 1 is the inner round.

    Raises:
      ValueError: a step size that isn't positive; a Round that has no model.
    """
    checks.positive(step_size, "step_size")

    def transform(round: Round) -> Round:
        model = round.model
        if model is None:
            raise ValueError("reptile() moves the server's model, but this Round has none")
        if isinstance(step_size, int | float) and step_size == 1:
            return round

        def server_update(server, aggregate, key):
            new, metrics = round.server_update(server, aggregate, key)
            before = model.get(server)
            way = jax.tree.map(lambda d: step_size * d, difference(model.get(new), before))
            return model.set(new, add(before, way)), metrics

        return round._replace(server_update=server_update)

    return transform


def _known(form: str, forms: tuple[str, ...]) -> None:
    if form not in forms:
        raise ValueError(f"form must be one of {forms}; got {checks.shown(form)}{checks.nearest(str(form), forms)}")


def _meta(make: Callable[..., Tilt], adapt, share: float, batch_size: int | None, who: str, form: str) -> Transform:
    """Local training on the query part, with a tilt that knows the support part; and the adapted model."""
    checks.share(share, "support")
    if batch_size is not None:
        checks.positive(batch_size, "support_batch_size", integer=True)

    def transform(round: Round) -> Round:
        sent, loss = received_model(round, who), round.loss
        if loss is None:
            raise ValueError(f"{who} changes local training, but this Round trains no model")

        def init(key, data, params=None):
            if not isinstance(data.sizes, Tracer) and np.asarray(data.sizes).max() < 2:
                raise ValueError(f"{who} splits each client's data in two, but no client has two examples")
            server = round.init(key, of_second_part(data, share), params)
            if form != "first_order" and round.model is not None:
                rows = jax.tree.map(lambda a: jax.ShapeDtypeStruct((3, *a.shape[1:]), a.dtype), data.arrays)
                twice_differentiable(loss, round.model.get(server), rows, who, forward=form == "exact")
            return server

        def client_update(message, state, client, key, tilt=identity):
            support, query = client.split(share)
            gradient_of = lambda oracle, model_state, key: support_gradient(
                oracle, support, model_state, key, batch_size
            )
            return round.client_update(message, state, query, key, tilt=chain_tilts(make(gradient_of), tilt))

        def personalize(message, state, client, key):
            start = sent(message, state, client, key)
            gradient = support_gradient(gradient_oracle(loss), client, start.model_state, key, None)
            return start._replace(params=adapt(start.params, gradient))

        return round._replace(
            init=init, client_update=client_update, personalize=personalize, traits=round.traits | {"personal"}
        )

    return transform


def support_gradient(
    oracle: Oracle, support: ClientData, model_state: PyTree, key: jax.Array, batch_size: int | None
) -> Gradient:
    """The gradient of the support's mean loss as a function of the parameters; of a random batch if it has a size."""
    key = jax.random.fold_in(key, 0x5A9)
    if batch_size is None:
        return lambda params: client_gradient(oracle, Variables(params, model_state), support, key)[0]
    slots = jnp.arange(batch_size)
    drawn = shuffle.permute(slots, jnp.maximum(support.size, 1), shuffle.seed_of(key))
    inputs = (model_state, support.take(drawn), slots < support.size)
    return lambda params: oracle(params, inputs, key)[0]
