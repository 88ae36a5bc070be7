"""Trials of Round's interface: what later issues build for good, in its shortest form."""

import jax
import jax.numpy as jnp

import fedjax_lab as fl
from fedjax_lab.round import through


def scaffold(eta):
    """SCAFFOLD's control variates, option II (Karimireddy et al. 2020, algorithm 1), over any Round."""

    def transform(inner: fl.Round) -> fl.Round:
        first, put = lambda s: s[0], lambda s, part: (part, s[1])
        zeros = lambda server: jax.tree.map(jnp.zeros_like, inner.model.get(server).params)

        def init(key, data, params=None):
            server = inner.init(key, data, params)
            return server, zeros(server)

        def client_update(message, state, client, key, tilt=fl.identity):
            (received, c), (own, c_k) = message, state
            correction = jax.tree.map(lambda a, b: a - b, c, c_k)
            corrected = fl.chain_tilts(fl.shift(lambda params: correction), tilt)
            out = inner.client_update(received, own, client, key, tilt=corrected)
            run = out.trained
            moved = jax.tree.map(lambda x, y: x - y, run.start.params, run.variables.params)
            new = jax.tree.map(lambda d, m: m / (eta * jnp.maximum(run.steps, 1)) - d, correction, moved)
            new = jax.tree.map(lambda n, o: jnp.where(run.steps > 0, n, o), new, c_k)
            upload = (out.upload, jax.tree.map(lambda a, b: a - b, new, c_k))
            return out._replace(upload=upload, state=(out.state, new), bytes_up=None)

        def server_update(server, aggregate, key):
            state, metrics = inner.server_update(server[0], aggregate[0], key)
            return (state, fl.add(server[1], aggregate[1])), metrics

        return inner._replace(
            init=init,
            init_client=lambda server, client: (inner.init_client(server[0], client), zeros(server[0])),
            broadcast=lambda server, state, client, key: (
                inner.broadcast(server[0], state[0], client, key),
                server[1],
            ),
            client_update=client_update,
            aggregate=fl.aggregators.pair(
                fl.aggregators.within(inner.aggregate, first),
                fl.aggregators.per_population(fl.aggregators.uniform_mean()),
            ),
            server_update=server_update,
            personalize=lambda m, s, client, key: inner.personalize(m[0], s[0], client, key),
            model=through(first, put, inner.model),
            view=through(first, put, inner.view),
        )

    return transform


def ditto(lam):
    """Ditto's personal models (Li et al. 2021, algorithm 1), over any Round, which it leaves untouched."""

    def transform(inner: fl.Round) -> fl.Round:
        def client_update(message, state, client, key, tilt=fl.identity):
            own, personal = state
            out = inner.client_update(message, own, client, key, tilt=tilt)
            # The personal run has a key and a prox term of its own, and no outer tilt.
            center = inner.view.get(message).params
            run = inner.local(personal, client, jax.random.fold_in(key, 99), tilt=fl.proximal(lam, center))
            return out._replace(state=(out.state, run.variables))

        return inner._replace(
            init_client=lambda server, client: (inner.init_client(server, client), inner.model.get(server)),
            broadcast=lambda server, state, client, key: inner.broadcast(server, state[0], client, key),
            client_update=client_update,
            personalize=lambda message, state, client, key: state[1],
            traits=inner.traits | {"personal"},
        )

    return transform


def maml(alpha, support):
    """Exact Per-FedAvg (Fallah et al. 2020, eq. 5) as a tilt: the gradient through one adaptation step.

    ``(I - alpha H_support(w)) grad_query(w - alpha grad_support(w))``; the Hessian's product is the oracle's
    own directional derivative. ``support(batch_size) -> bool[batch_size]`` divides a batch.
    """

    def tilt(oracle):
        def tilted(params, inputs, key):
            model_state, batch, mask = inputs
            first = support(mask.shape[0])
            inner = lambda p: oracle(p, (model_state, batch, mask & first), key)[0]
            adapted = jax.tree.map(lambda w, g: w - alpha * g, params, inner(params))
            grads, aux = oracle(adapted, (model_state, batch, mask & ~first), key)
            curvature = jax.jvp(inner, (params,), (grads,))[1]
            return jax.tree.map(lambda g, h: g - alpha * h, grads, curvature), aux

        return tilted

    return fl.transforms.tilted(lambda received, client: tilt)
