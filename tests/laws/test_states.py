"""Laws of every algorithm's state: it is complete, and clients that don't take part keep theirs."""

import jax
import numpy as np
import pytest

import fedjax_lab as fl
from tests.laws.table import ALGORITHMS, sometimes
from tests.laws.test_every_algorithm import COHORT
from tests.problems import assert_same_bits, softmax_data


@pytest.mark.parametrize("name", sometimes("fedadam", "scaffold", "feddyn", "mime_adam", "apfl", "fedavg_adam_kept"))
def test_a_state_is_all_that_a_process_built_anew_needs(name):
    """Two rounds, the state through NumPy, one more round elsewhere: the bits of three rounds."""
    build = lambda: fl.synchronous(ALGORITHMS[name].make(), softmax_data(empty=1), COHORT, lanes=2)
    process = build()
    state, key = process.init(jax.random.key(0)), jax.random.split(jax.random.key(0))[1]
    for _ in range(2):
        state, _ = process.step(state, process.data)
    stored = jax.tree.map(np.asarray, state._replace(key=()))
    whole = process.step(state, process.data)
    other = build()
    again = other.step(stored._replace(key=key), other.data)
    assert_same_bits(again, whole)
    # Whoever took no part in the third round kept its row.
    public = jax.random.fold_in(jax.random.fold_in(key, 2), 0)
    ids = np.asarray(COHORT.sample((), public, process.data, None)[0])
    rest = np.setdiff1d(np.arange(process.data.num_clients), ids)
    rows = lambda table: jax.tree.map(lambda t: np.asarray(t)[rest], table)
    assert_same_bits(rows(process.clients(whole[0]).table), rows(stored.clients.table))
