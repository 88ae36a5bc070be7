"""ClientData inside jit and vmap: every example once an epoch, no one else's rows, ragged and empty alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_lab as fl

SIZES = (5, 0, 1, 12, 7)
DATA = fl.FederatedData.from_clients({k: {"v": 100 * k + np.arange(n)} for k, n in enumerate(SIZES)}).on_device()


def seen(client, **kwargs):
    """How often each of 20 values was seen, in which step first, and the number of steps."""

    def step(carry, batch, mask, positions, key):
        counts, first, t = carry
        counts = counts.at[positions].add(mask)
        first = jnp.where((first < 0) & (jnp.zeros(20, bool).at[positions].max(mask)), t, first)
        wrong = jnp.any(mask & (batch["v"] != 100 * client.id + positions))
        return counts, jnp.where(wrong, -99, first), t + 1

    return client.fold(step, (jnp.zeros(20, jnp.int32), jnp.full(20, -1), jnp.int32(0)), **kwargs)


def over_clients(function):
    return jax.jit(jax.vmap(lambda k: function(DATA.view(k))))(jnp.arange(len(SIZES)))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_epoch_visits_every_example_once(epochs, static):
    counts, first, steps = over_clients(
        lambda c: seen(c, epochs=epochs, batch_size=4, key=jax.random.key(1), static=static)
    )
    for k, n in enumerate(SIZES):
        assert counts[k, :n].tolist() == [epochs] * n
        assert counts[k, n:].sum() == 0
        assert first.min() >= -1
        assert steps[k] == epochs * -(-n // 4)


def test_steps_go_on_through_epochs_and_an_empty_client_makes_none():
    counts, _, steps = over_clients(lambda c: seen(c, steps=5, batch_size=4, key=jax.random.key(2)))
    assert steps.tolist() == [5, 0, 5, 5, 5]
    assert counts[2, 0] == 5
    assert sorted(set(counts[3, :12].tolist())) == [1, 2]  # 5 steps of 4 over 12 rows: once, then a second epoch begun


def test_the_number_of_steps_may_be_of_a_smaller_integer_type():
    order = lambda steps: over_clients(lambda c: seen(c, steps=steps, batch_size=4, key=jax.random.key(2)))
    for dtype in (jnp.int8, jnp.int16):
        np.testing.assert_array_equal(order(dtype(5))[1], order(5)[1])


def test_static_and_dynamic_folds_agree_bit_for_bit():
    def total(client, static):
        def step(c, batch, mask, positions, key):
            return c * 1.1 + jnp.sum(jnp.where(mask, batch["v"], 0)) + jax.random.normal(key)

        return client.fold(step, jnp.float32(0), epochs=2, batch_size=3, key=jax.random.key(3), static=static)

    a, b = (over_clients(lambda c, s=s: total(c, s)) for s in (False, True))
    np.testing.assert_array_equal(a, b)


def test_a_static_fold_is_differentiable():
    def total(w, k):
        step = lambda c, batch, mask, positions, key: c + w * jnp.sum(jnp.where(mask, batch["v"], 0))
        return DATA.view(k).fold(step, 0.0, batch_size=3, key=jax.random.key(0), static=True)

    grads = jax.jit(jax.vmap(jax.grad(total), (None, 0)))(2.0, jnp.arange(len(SIZES)))
    np.testing.assert_allclose(grads, [sum(100 * k + np.arange(n)) if n else 0 for k, n in enumerate(SIZES)])


def test_orders_differ_by_key_and_epoch_but_not_by_the_population():
    def order(client, key):
        step = lambda c, batch, mask, positions, key: (c[0].at[c[1]].set(positions[0]), c[1] + 1)
        return client.fold(step, (jnp.zeros(24, jnp.int32), 0), epochs=2, batch_size=1, key=key)[0]

    a = jax.jit(order)(DATA.view(3), jax.random.key(0))
    assert not np.array_equal(a[:12], a[12:])
    assert not np.array_equal(a, jax.jit(order)(DATA.view(3), jax.random.key(1)))
    alone = DATA.client(3)
    np.testing.assert_array_equal(a, jax.jit(order)(alone, jax.random.key(0)))


def test_without_a_key_the_order_is_the_clients_own():
    step = lambda c, batch, mask, positions, key: (c[0].at[c[1]].set(batch["v"][0]), c[1] + 1)
    rows = DATA.client(4).fold(step, (jnp.zeros(7, jnp.int32), 0), batch_size=1)[0]
    assert rows.tolist() == (400 + np.arange(7)).tolist()


def test_a_whole_client_is_padded_and_masked():
    batch, mask = jax.jit(lambda k: DATA.view(k).full())(0)
    assert batch["v"].shape == mask.shape == (12,)
    assert batch["v"][mask].tolist() == [0, 1, 2, 3, 4]
    assert set(batch["v"].tolist()) == {0, 1, 2, 3, 4}  # padding repeats its own rows


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8])
def test_a_split_is_disjoint_complete_and_stable(fraction):
    def parts(client):
        a, b = client.split(fraction)
        return seen_values(a), seen_values(b), a.size, b.size

    def seen_values(part):
        step = lambda c, batch, mask, positions, key: c.at[batch["v"] % 100].add(mask)
        return part.fold(step, jnp.zeros(20, jnp.int32), batch_size=2, key=jax.random.key(0))

    a, b, size_a, size_b = over_clients(parts)
    for k, n in enumerate(SIZES):
        assert (a[k] + b[k])[:n].tolist() == [1] * n
        assert size_a[k] + size_b[k] == n
        if n >= 2:
            assert size_a[k] == min(max(int(fraction * n + 0.5), 1), n - 1)


def test_parts_are_a_partition():
    def counts(client):
        step = lambda c, batch, mask, positions, key: c.at[batch["v"] % 100].add(mask)
        return sum(client.part(p, 3).fold(step, jnp.zeros(20, jnp.int32), batch_size=2) for p in range(3))

    total = over_clients(counts)
    for k, n in enumerate(SIZES):
        assert total[k].tolist() == [1] * n + [0] * (20 - n)


def test_out_of_range_and_absent_clients_are_empty():
    assert [int(DATA.view(jnp.int32(k)).size) for k in (-1, 5, 99)] == [0, 0, 0]
    assert int(DATA.view(jnp.int32(3), (), jnp.bool_(False)).size) == 0
