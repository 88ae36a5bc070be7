"""pFedMe as its authors' code has it: theta goes on from one mini-batch to the next.

:func:`fedjax_lab.transforms.pfedme` begins each search for theta at the client's w, as if it were the first one. In the
authors' code theta begins at w once a round, and then where the last mini-batch left it. With few steps at a large
rate the two differ: 0.09 times lambda = 15 is more than 1, so that theta swings from one side of w to the other, and
after an odd number of steps it ends on the far side if it began at w, and there every other time if it went on.

Their personal models are the clients' w after the round's local steps: the list that their code keeps for theta holds
the very parameters that it then sets to w.
"""

from typing import Any, NamedTuple

import jax

import fedjax_lab as fl


class Pair(NamedTuple):
    """What a client trains: its copy ``w`` of the global parameters, and ``theta``."""

    w: Any
    theta: Any


def continued(
    lam: float, *, inner_learning_rate: float, inner_steps: int, learning_rate: float, pull: fl.Tilt = fl.identity
) -> fl.Transform:
    """pFedMe over FedAvg with ``optax.sgd(learning_rate)``, with personal models as the authors evaluate them.

    Args:
      lam, inner_learning_rate, inner_steps: as of :func:`fedjax_lab.transforms.pfedme`.
      learning_rate: the client optimizer's, by which theta's moves are divided so that it makes them whole.
      pull: a tilt of theta's gradient.
    """

    def pairs(oracle):
        def tilted(pair: Pair, inputs, key):
            _, aux = oracle(pair.w, inputs, key)

            def step(_, theta):
                grads = oracle(theta, inputs, key)[0]
                move = lambda t, g, w: t - inner_learning_rate * (g + lam * (t - w))
                return jax.tree.map(move, theta, grads, pair.w)

            theta = jax.lax.fori_loop(0, inner_steps, step, pair.theta)
            back = jax.tree.map(lambda old, new: (old - new) / learning_rate, pair.theta, theta)
            return Pair(jax.tree.map(lambda w, t: lam * (w - t), pair.w, theta), back), aux

        return tilted

    def transform(round: fl.Round) -> fl.Round:
        def trained(message, client, key, tilt=fl.identity):
            start = message._replace(params=Pair(message.params, message.params))
            run = round.local(start, client, key, fl.chain_tilts(pull, tilt, pairs))
            return run._replace(variables=run.variables._replace(params=run.variables.params.w))

        def client_update(message, state, client, key, tilt=fl.identity):
            run = trained(message, client, key, tilt)
            upload = fl.difference(run.variables, message)
            return fl.ClientOutput(upload, fl.client_weight("examples", client), metrics={"loss": run.loss})

        def personalize(message, state, client, key):
            return trained(message, client, key).variables

        return round._replace(client_update=client_update, personalize=personalize, traits=round.traits | {"personal"})

    return transform
