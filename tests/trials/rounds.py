"""Trials of Round's interface: what later issues build for good, in its shortest form."""

import jax

import fedjax_lab as fl


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
