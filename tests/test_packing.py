"""Packed lanes: every client's loop is its own, whatever the lanes and however ragged the clients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_lab.packing import in_parts, train
from fedjax_lab.program import trace
from tests.problems import assert_close

TABLE = jax.random.normal(jax.random.key(0), (3, 3)) / 2


def turn(table, start, steps):
    """Some work before a loop of products, and some after it that reads both."""
    scaled, begin = table / 2, start + 1
    end = jax.lax.fori_loop(0, steps, lambda t, x: jnp.tanh(scaled @ x + steps + t), begin)
    return end - begin, steps * 2


@pytest.mark.parametrize("lanes", [1, 3, 8])
@pytest.mark.parametrize("steps", [[9, 5, 5, 2, 1, 0, 0], [4], [0, 0, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
def test_each_client_makes_its_own_steps(lanes, steps):
    starts = jax.random.normal(jax.random.key(1), (len(steps), 3))
    steps = jnp.array(steps)
    parts = in_parts(trace(turn, TABLE, starts[0], steps[0]).jaxpr, [True, False, False])

    @jax.jit
    def packed(table, starts, steps):
        public = parts.once([table])
        facts, carry, kept = jax.vmap(lambda *own: parts.begin(public, list(own)))(starts, steps)
        carry = train(parts, public, facts, carry, lanes)
        return jax.vmap(lambda kept, carry: parts.finish(public, kept, carry))(kept, carry)

    assert_close(tuple(packed(TABLE, starts, steps)), jax.vmap(turn, (None, 0, 0))(TABLE, starts, steps))


def test_lanes_do_not_wait_for_the_longest_client():
    """Two lanes of 8 clients make the steps of the fuller lane, and not those of four chunks' longest clients."""
    steps = jnp.array([8, 1, 1, 1, 1, 1, 1, 1])
    made = []

    def counted(table, start, steps):
        def step(t, x):
            jax.debug.callback(lambda t: made.append(int(t)), t)
            return table @ x

        return jax.lax.fori_loop(0, steps, step, start)

    starts = jnp.ones((8, 3))
    parts = in_parts(trace(counted, TABLE, starts[0], steps[0]).jaxpr, [True, False, False])
    facts, carry, _ = jax.vmap(lambda *own: parts.begin(parts.once([TABLE]), list(own)))(starts, steps)
    jax.block_until_ready(train(parts, parts.once([TABLE]), facts, carry, 2))
    jax.effects_barrier()
    assert len(made) == 2 * 8


def test_a_turn_of_no_loop_or_of_two_has_no_parts():
    twice = lambda *arguments: turn(*arguments)[0] + turn(*arguments)[0]
    straight = lambda table, start, steps: table @ start * steps
    for function in (twice, straight):
        program = trace(function, TABLE, jnp.ones(3), jnp.int32(2)).jaxpr
        assert in_parts(program, [True, False, False]) is None


def test_what_all_clients_share_is_computed_once():
    parts = in_parts(trace(turn, TABLE, jnp.ones(3), jnp.int32(2)).jaxpr, [True, False, False])
    assert any(np.allclose(x, TABLE / 2) for x in parts.once([TABLE]))
