"""Nothing private travels, whatever the algorithm: no private leaf, and nothing computed for one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab.transforms import (
    apfl,
    control_variates,
    gradient_rounds,
    leaves,
    per_fedavg,
    personal_model,
    private,
    proximal,
)
from tests.laws.table import ALGORITHMS, MODEL
from tests.problems import softmax_data, steps

BIAS = leaves("params/b")
# Sends no model; keep a part already; names its leaves otherwise; is FedAvg.
SKIPPED = ("local_only", "fedper", "lg_fedavg", "fedrep", "meta_sgd", "mocha", "mocha_learned", "_template")
SKIPPED += ("fedrecon", "pfedhn")  # keeps a part already; makes models of what private() leaves it
SKIPPED += ("federated_dropout", "heterofl", "pruned", "fedpara", "pfedpara", "fedlora")  # send parts; or no leaf of it
SKIPPED += ("virtual_private",)  # keeps a part already
SKIPPED += ("lag_ps", "partial_averaging", "one_shot")  # encode their messages, or keep whole models: refused
SKIPPED += ("matched_averaging",)  # has no such leaf
SKIPPED += ("ifca", "hypcluster", "clustered_fl", "fedem")  # several models: private comes first, in tests of their own


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


def test_a_proximal_term_pulls_the_private_part_to_where_it_was():
    """FedProx of FedPer: with a pull of one over the rate, two steps are one step from where each part began."""
    data, rate = softmax_data((6,)), 0.25
    final = {}
    for steps_made, pull in ((1, 0.0), (2, 1 / rate)):
        base = fedavg(MODEL, optax.sgd(rate), steps=steps_made, batch_size=None)
        process = fl.synchronous(fl.compose(base, private(BIAS), proximal(pull)), data)
        state, _ = steps(process, 1)
        final[pull] = process.clients(state).table.part.params["b"], process.params(state)["w"]
    # w_2 = w_1 - rate (g(w_1) + (w_1 - w_0) / rate) = w_0 - rate g(w_1): one step by the gradient at w_1.
    one, two = final.values()
    process = fl.synchronous(fl.compose(fedavg(MODEL, optax.sgd(rate), steps=1, batch_size=None)), data)
    first = process.params(process.init(jax.random.key(0)))
    at = {"b": one[0][0], "w": one[1]}
    moved = process.params(process.step(process.init(jax.random.key(0), at), process.data)[0])
    np.testing.assert_allclose(two[0][0], first["b"] + (moved["b"] - at["b"]), atol=1e-6)
    np.testing.assert_allclose(two[1], first["w"] + (moved["w"] - at["w"]), atol=1e-6)


@pytest.mark.parametrize("late", [control_variates("I"), gradient_rounds(lambda *_: fl.identity)])
def test_what_would_send_it_is_refused_and_says_what_to_do(late):
    shared = fl.compose(ALGORITHMS["fedavg"].make(), private(BIAS))
    with pytest.raises(ValueError, match="put it first"):
        fl.compose(shared, late)


@pytest.mark.parametrize(
    ("name", "why"),
    [("lag_ps", "messages, but .* encoded"), ("partial_averaging", "a period of 0"), ("one_shot", "whole models")],
)
def test_what_keeps_or_encodes_whole_models_is_refused(name, why):
    with pytest.raises(ValueError, match=why):
        fl.synchronous(fl.compose(ALGORITHMS[name].make(), private(BIAS)), softmax_data())
