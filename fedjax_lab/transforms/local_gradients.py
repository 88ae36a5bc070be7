"""Local-gradient aggregation: clients send the mean gradient of their local steps, not how far they came."""

from typing import Any

import jax

from fedjax_lab import checks
from fedjax_lab.gradients import forget_recorded
from fedjax_lab.round import Round, Transform, identity, travelling
from fedjax_lab.transforms.control_variates import mean_gradient


def local_gradients(learning_rate: Any = None) -> Transform:
    """Send the mean gradient along the local steps, for the server's optimizer to follow.

    An approximation of the gradient at the model that was sent, exact for one step; unlike a model's update it doesn't
    grow with the number of steps or the clients' learning rate, so that clients with unequal work count alike. What the
    server makes of it is its optimizer's affair: ``fedavg(..., server_optimizer=optax.sgd(eta))`` makes a gradient step
    of rate ``eta``. Kept per client, travels: nothing more.

    Args:
      learning_rate: the clients', if they make plain gradient steps; the gradients follow from how far they came then.
        Without it the client optimizer must be :func:`fedjax_lab.recording`, which adds them up.

    Raises:
      ValueError: a learning rate that isn't positive; a Round whose upload isn't a model's, when the process is built.
    """
    if learning_rate is not None:
        checks.positive(learning_rate, "learning_rate")

    def transform(round: Round) -> Round:
        if round.view is None:
            raise ValueError("local_gradients() sends what local training followed, but this Round trains no model")
        if {"encoded", "partial", "many_models"} & round.traits:
            raise ValueError("local_gradients() comes before transforms that split, multiply or encode: put it first")

        def client_update(message, state, client, key, tilt=identity):
            out = round.client_update(message, state, client, key, tilt=tilt)
            run = out.trained
            if run is None or jax.tree.structure(out.upload) != jax.tree.structure(run.variables):
                raise ValueError(
                    "local_gradients() replaces the update of a model, and this Round sends something else"
                )
            mean = mean_gradient(run, learning_rate)
            down = jax.tree.map(lambda g, u: -g.astype(u.dtype), mean, out.upload.params)
            upload = travelling(out.upload._replace(params=down), out.parts)
            return out._replace(upload=upload, state=forget_recorded(out.state))

        return round._replace(client_update=client_update)

    return transform
