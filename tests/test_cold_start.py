"""What clients get that never took part: closed forms on quadratics, a hypernetwork in NumPy, and refusals."""

import jax
import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from algorithms.local_only import local_only
from fedjax_lab.transforms import Hypernetwork, fine_tuning, hypernetwork, personal_model
from tests.algorithms.quadratics import DIM, MODEL, quadratics
from tests.problems import assert_same_bits, steps

ETA, TAU, ROUNDS = 0.2, 3, 2
WORK = {"steps": TAU, "batch_size": None}
BASE = fedavg(MODEL, optax.sgd(ETA), **WORK)
SEEN, UNSEEN = [0, 3], [1, 2]


def trained(round):
    """Clients 0 and 3 take part; 1 and 2 come later, with the same examples to learn from and to be tested on."""
    data = quadratics().data
    process = fl.synchronous(round, data.select(SEEN))
    return process, steps(process, 2)[0], data.select(UNSEEN)


def evaluated(round, **options):
    process, state, unseen = trained(round)
    evaluate = fl.cold_start(unseen, unseen, process.data, rounds=ROUNDS, **options)
    return process, state, evaluate(process, state)


def mean_loss(models):
    """Over the newcomers' examples, for a model of each."""
    q, sizes = quadratics(), quadratics().sizes[UNSEEN]
    return float(sizes @ [q.loss(k, w) for k, w in zip(UNSEEN, models, strict=True)] / sizes.sum())


def descent(k, w, steps=TAU, lam=0.0, center=0.0):
    for _ in range(steps):
        w = w - ETA * (quadratics().gradient(k, w) + lam * (w - center))
    return w


def test_of_a_global_model_newcomers_get_that():
    process, state, found = evaluated(BASE)
    w = np.asarray(process.params(state), np.float64)
    assert found["unseen_loss"] == pytest.approx(mean_loss([w, w]), rel=1e-5)
    assert found["loss"] == fl.per_client(process.data)(process, state)["loss"]
    assert not [name for name in found if "personal" in name or "joined" in name]


def test_what_is_made_of_the_model_needs_no_rounds():
    process, state, found = evaluated(fl.compose(BASE, fine_tuning()))
    w = np.asarray(process.params(state), np.float64)
    assert found["unseen_loss"] == pytest.approx(mean_loss([w, w]), rel=1e-5)
    assert found["unseen_personal_loss"] == pytest.approx(mean_loss([descent(k, w) for k in UNSEEN]), rel=1e-5)
    assert found["unseen_joined_loss"] == found["unseen_personal_loss"]


def test_dittos_newcomers_train_their_models_on_the_server_as_it_is():
    process, state, found = evaluated(fl.compose(BASE, personal_model(0.7)))
    w = np.asarray(process.params(state), np.float64)
    own = [descent(k, w, ROUNDS * TAU, 0.7, w) for k in UNSEEN]
    assert found["unseen_personal_loss"] == pytest.approx(mean_loss([w, w]), rel=1e-5)
    assert found["unseen_joined_loss"] == pytest.approx(mean_loss(own), rel=1e-5)
    assert_same_bits(state, trained(fl.compose(BASE, personal_model(0.7)))[1])  # nothing of it was used up


def test_alone_newcomers_begin_at_the_beginning():
    _, _, found = evaluated(local_only(MODEL, optax.sgd(ETA), **WORK))
    assert found["unseen_joined_loss"] == pytest.approx(
        mean_loss([descent(k, np.zeros(DIM), ROUNDS * TAU) for k in UNSEEN]), rel=1e-5
    )
    assert "unseen_loss" not in found


def test_a_hypernetwork_finds_them_embeddings_and_stays_as_it_is():
    linear = Hypernetwork(lambda key, v, params: 0.5 * jax.random.normal(key, (DIM, len(v))), lambda phi, v: phi @ v)
    round = fl.compose(BASE, hypernetwork(linear, embedding_size=2, embedding_learning_rate=0.3))
    process, state, found = evaluated(round)
    server = process.server(state)
    W = np.asarray(server.phi, np.float64)
    first = W @ np.asarray(server.embeddings, np.float64).mean(0)
    assert found["unseen_personal_loss"] == pytest.approx(mean_loss([first, first]), rel=1e-5)
    drawn = round.init(jax.random.fold_in(jax.random.key(0), 0), quadratics().data.select(UNSEEN)).embeddings
    models = []
    for k, v in zip(UNSEEN, np.asarray(drawn, np.float64), strict=True):
        for _ in range(ROUNDS):
            v = v + 0.3 * W.T @ (descent(k, W @ v) - W @ v)
        models.append(W @ v)
    assert found["unseen_joined_loss"] == pytest.approx(mean_loss(models), rel=1e-4)


@pytest.mark.slow
def test_part_of_a_larger_program_it_says_the_same():
    q, unseen = quadratics().data, quadratics().data.select(UNSEEN)
    evaluate = fl.cold_start(unseen, unseen, rounds=ROUNDS)

    def process_for(lam):
        return fl.synchronous(fl.compose(BASE, personal_model(lam)), q.select(SEEN))

    many = fl.sweep(process_for, 2, (0,), evaluate=evaluate, lam=[0.2, 0.7])
    process = process_for(0.7)
    alone = evaluate(process, steps(process, 2)[0])["unseen_joined_loss"]
    assert many.metrics["unseen_joined_loss"][1, 0, -1] == pytest.approx(alone, rel=1e-5)


def test_refusals():
    process, state, unseen = trained(BASE)
    data = quadratics().data
    with pytest.raises(ValueError, match="same clients"):
        fl.cold_start(unseen, data.select([1]))
    with pytest.raises(ValueError, match="rounds must"):
        fl.cold_start(unseen, unseen, rounds=-1)
    with pytest.raises(ValueError, match="must be a FederatedData"):
        fl.cold_start(unseen, None)
    for clients, word in ((data.select([1, 3]), "client 3 is part of"), (process.data, "set some apart")):
        with pytest.raises(ValueError, match=word):
            fl.cold_start(clients, clients)(process, state)
