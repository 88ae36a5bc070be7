"""Nothing private travels, whatever the algorithm: no private leaf, and nothing computed for one."""

import jax
import jax.numpy as jnp
import pytest

import fedjax_lab as fl
from fedjax_lab.transforms import apfl, control_variates, gradient_rounds, leaves, per_fedavg, personal_model, private
from tests.laws.table import ALGORITHMS
from tests.problems import softmax_data

BIAS = leaves("params/b")
# Sends no model; keep a part already; names its leaves otherwise; is FedAvg.
SKIPPED = ("local_only", "fedper", "lg_fedavg", "fedrep", "meta_sgd", "_template")


def travelling(round, data):
    """Shapes of the message's and the upload's leaves, from an abstract turn of one client."""

    def turn(key):
        server, client = round.init(key, data), data.view(jnp.int32(0))
        state = round.init_client(server, client)
        message = round.broadcast(server, state, client, key)
        env = fl.cohort.make_env(jnp.int32(0), key, jnp.arange(8), jnp.ones(8, bool), 8)
        return message, round.client_update(message, state, data.view(jnp.int32(0), env), key).upload

    return [[leaf.shape for leaf in jax.tree.leaves(part)] for part in jax.eval_shape(turn, jax.random.key(0))]


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if n not in SKIPPED])
def test_private_leaves_of_every_algorithm_stay(name):
    data = softmax_data().on_device()
    plain = ALGORITHMS[name].make()
    hidden = fl.compose(plain, private(BIAS))
    for with_bias, without in zip(travelling(plain, data), travelling(hidden, data), strict=True):
        assert with_bias.count((3,)) == with_bias.count((4, 3)) > 0  # one of each for every model that travels
        assert (3,) not in without
        assert without.count((4, 3)) == with_bias.count((4, 3))
        scalars = with_bias.count(()) - without.count(())
        assert scalars == (1 if name == "fednova" and () in with_bias else 0)  # its number for each leaf
    fl.synchronous(hidden, softmax_data())  # the whole round has stable types


def test_personal_models_stay_over_each_other():
    data = softmax_data().on_device()
    base = ALGORITHMS["scaffold"].make()
    round = fl.compose(base, per_fedavg(0.1), private(BIAS), personal_model(0.5), apfl(0.5))
    for shapes in travelling(round, data):
        assert sorted(shapes) == [(4, 3), (4, 3)]  # the shared model, and the control variate of what is shared
    fl.synchronous(round, softmax_data())


@pytest.mark.parametrize("late", [control_variates("I"), gradient_rounds(lambda *_: fl.identity)])
def test_what_would_send_it_is_refused_and_says_what_to_do(late):
    shared = fl.compose(ALGORITHMS["fedavg"].make(), private(BIAS))
    with pytest.raises(ValueError, match="put it first"):
        fl.compose(shared, late)
