"""Full garbage collections wait while programs are traced, and come again afterwards."""

import gc
import sys
import threading

import jax
import jax.numpy as jnp
import optax
import pytest

import fedjax_lab as fl
from algorithms.fedavg import fedavg
from fedjax_lab import compiling, garbage, kept_programs
from tests.problems import softmax_data, softmax_model


@pytest.fixture
def threshold():
    """One of the user's, by which full collections come often."""
    before = gc.get_threshold()
    gc.set_threshold(50, 2, 2)
    gc.collect()
    gc.freeze()  # a full one waits for objects in proportion to those that have stayed
    yield gc.get_threshold()
    gc.unfreeze()
    gc.set_threshold(*before)


def full_collections(function) -> int:
    """How many come while it runs."""
    seen = []
    note = lambda phase, info: seen.append(info) if phase == "start" and info["generation"] == 2 else None
    gc.collect()
    gc.callbacks.append(note)
    function()
    gc.callbacks.remove(note)
    return len(seen)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python collects the old generation a part at a time")
def test_processes_are_built_and_programs_made_without_a_full_collection(threshold):
    round, data, sampler = fedavg(softmax_model(), optax.sgd(0.1)), softmax_data(), fl.uniform(4)
    new = lambda: lambda x: [jnp.tanh(x + i) for i in range(100)]  # JAX hasn't traced it before
    assert full_collections(lambda: jax.make_jaxpr(new())(1.0)) > 0
    assert full_collections(lambda: fl.synchronous(round, data, sampler)) == 0
    assert full_collections(lambda: compiling.now(new(), (1.0,))) == 0
    assert gc.get_threshold() == threshold


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python collects the old generation a part at a time")
def test_a_first_call_has_no_full_collection_where_no_programs_are_kept(threshold, monkeypatch):
    monkeypatch.setattr(kept_programs, "folder", lambda: None)
    new = lambda: lambda x: [jnp.full(i, x) for i in range(60)]  # each is written out for XLA anew
    assert full_collections(lambda: jax.jit(new())(1.0)) > 0
    assert full_collections(lambda: compiling.jit(new())(1.0)) == 0
    assert gc.get_threshold() == threshold


def test_what_held_before_holds_again_after_an_error(threshold):
    with pytest.raises(ValueError, match="cohort"), garbage.put_off():
        fl.synchronous(fedavg(softmax_model(), optax.sgd(0.1)), softmax_data(), fl.uniform(10_000))
    assert gc.get_threshold() == threshold


def test_several_threads_put_it_off_until_the_last_of_them_is_done(threshold):
    first, second = threading.Event(), threading.Event()

    def other():
        with garbage.put_off():
            first.set()
            second.wait(10)

    thread = threading.Thread(target=other)
    with garbage.put_off():
        thread.start()
        first.wait(10)
    assert gc.get_threshold() == (*threshold[:2], garbage.NEVER)
    second.set()
    thread.join()
    assert gc.get_threshold() == threshold


def test_collections_that_the_user_turned_off_stay_off():
    gc.disable()
    try:
        with garbage.put_off():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
