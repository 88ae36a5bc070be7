"""Top-k of 1% with error feedback in the digits experiment: what it costs in accuracy, and in how many rounds."""

import numpy as np
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from experiments import digits

SEEDS, ROUNDS = range(5), 300


def accuracies(seed: int, *links: fl.wire.Wire) -> tuple[dict[int, float], int]:
    """Test accuracy on everybody's digits by round, in percent, and the bytes sent up."""
    config = digits.Config(seed=seed)
    data = fl.datasets.digits(fl.datasets.dirichlet(config.num_clients, config.alpha), seed)
    model, optimizer = fl.models.mlp(10), optax.sgd(config.learning_rate)
    base = fedavg(model, optimizer, epochs=config.epochs, batch_size=config.batch_size)
    process = fl.synchronous(fl.compose(base, fl.uplink(*links)), data.train, fl.uniform(config.cohort_size))
    result = fl.run(process, ROUNDS, seed, evaluate=fl.per_client_accuracy(data.test), every=50)
    return {r["round"]: 100 * r["accuracy"] for r in result.metrics if "accuracy" in r}, result.uplink_bytes


@pytest.mark.slow
def test_one_percent_top_k_stays_within_a_point_of_dense_uploads():
    """Means over five seeds and over what is evaluated from round 150 on: one digit of the 360 is 0.28 points, and a
    single run moves by a point between rounds.

    The experiment's own 100 rounds are too few: an entry waits for its turn, and a client for 5 rounds on average.
    Seen: 1.4 points short after 100 rounds; 0.8, 0.7, 1.3 and 0.5 after 150, 200, 250 and 300; 0.4 from
    350 to 600.
    """
    sparse = fl.wire.error_feedback(fl.wire.top_k(0.01))
    dense, top = ([accuracies(seed, *links) for seed in SEEDS] for links in ((), (sparse,)))
    mean = lambda runs, round: np.mean([by_round[round] for by_round, _ in runs])
    gap = {round: mean(dense, round) - mean(top, round) for round in (100, 150, 200, 250, 300)}
    print({round: float(points.round(2)) for round, points in gap.items()})
    assert np.mean([gap[round] for round in (150, 200, 250, 300)]) < 1
    assert sum(b for _, b in top) * 60 < sum(b for _, b in dense)
