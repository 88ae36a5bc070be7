"""Hidden units of several networks matched to one another, so that their mean is a network of the same function.

Swapping hidden units changes a network's parameters and not what it computes. Networks that were trained apart have
their units in different places, and their plain mean mixes unlike ones. (Yurochkin et al., "Bayesian Nonparametric
Federated Learning of Neural Networks", ICML 2019; Wang et al., "Federated Learning with Matched Averaging", ICLR 2020.)
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.models.base import Model, Variables
from fedjax_lab.transforms.units import Units, hidden_units

PyTree = Any


def assignment(cost: jax.Array) -> jax.Array:
    """The permutation of least cost: row ``i`` goes with column ``assignment(cost)[i]``.

    The Hungarian algorithm by shortest augmenting paths (Kuhn 1955; Jonker and Volgenant 1987), in ``n^2`` to ``n^3``
    operations, as a program that jit and vmap take.

    Args:
      cost: ``float[n, n]``; what isn't finite counts as very large.

    Returns:
      ``int32[n]``.

    Raises:
      ValueError: a cost that isn't square.
    """
    if jnp.ndim(cost) != 2 or cost.shape[0] != cost.shape[1]:
        raise ValueError(f"an assignment needs a square cost, as many rows as columns; got shape {jnp.shape(cost)}")
    n = cost.shape[0]
    finite = jnp.isfinite(cost)
    largest = jnp.max(jnp.where(finite, jnp.abs(cost), 0), initial=0.0)
    cost = jnp.where(finite, cost, 2 * n * largest + 1).astype(jnp.float32)

    # Column 0 is a place for the row that is being added; rows and columns count from 1 here.
    def add_row(row, carry):
        row_price, column_price, holder = carry
        holder = holder.at[0].set(row)
        free = (jnp.int32(0), jnp.full(n + 1, jnp.inf), jnp.zeros(n + 1, bool), jnp.zeros(n + 1, jnp.int32))

        def search(state):
            (column, nearest, used, before), row_price, column_price = state
            used = used.at[column].set(True)
            i = holder[column]
            away = jnp.concatenate([jnp.full(1, jnp.inf), cost[i - 1] - row_price[i] - column_price[1:]])
            closer = ~used & (away < nearest)
            nearest, before = jnp.where(closer, away, nearest), jnp.where(closer, column, before)
            reach = jnp.where(used, jnp.inf, nearest)
            next_column = jnp.argmin(reach).astype(jnp.int32)
            step = reach[next_column]
            row_price = row_price.at[holder].add(jnp.where(used, step, 0))
            column_price = jnp.where(used, column_price - step, column_price)
            return (next_column, jnp.where(used, nearest, nearest - step), used, before), row_price, column_price

        def blocked(state):
            (column, _, used, _), _, _ = state
            return (holder[column] != 0) & ~jnp.all(used)

        first = search((free, row_price, column_price))
        (column, _, _, before), row_price, column_price = jax.lax.while_loop(blocked, search, first)

        def hand_over(state):
            column, holder = state
            return before[column], holder.at[column].set(holder[before[column]])

        _, holder = jax.lax.while_loop(lambda s: s[0] != 0, hand_over, (column, holder))
        return row_price, column_price, holder

    start = (jnp.zeros(n + 1), jnp.zeros(n + 1), jnp.zeros(n + 1, jnp.int32))
    holder = jax.lax.fori_loop(1, n + 1, add_row, start)[2]
    return jnp.zeros(n, jnp.int32).at[holder[1:] - 1].set(jnp.arange(n, dtype=jnp.int32))


# ---- units ----


def unit_vectors(variables: Variables, units: Units, group: str) -> jax.Array:
    """Everything that belongs to each unit of a group, ``float32[units, entries]``."""
    rows = []
    for leaf, axes in zip(jax.tree.leaves(variables), units.leaves, strict=True):
        for at, whole in _factored(leaf, axes, group):
            rows.append(jnp.moveaxis(whole, at, 0).reshape(whole.shape[at], -1).astype(jnp.float32))
    return jnp.concatenate(rows, axis=1)


def reordered(variables: Variables, units: Units, group: str, order: jax.Array) -> Variables:
    """The same network with a group's units in another order: unit ``i`` is the old ``order[i]``."""
    leaves, structure = jax.tree.flatten(variables)
    out = []
    for leaf, axes in zip(leaves, units.leaves, strict=True):
        for at, whole in _factored(leaf, axes, group):
            leaf = jnp.take(whole, order, axis=at).reshape(leaf.shape)
        out.append(leaf)
    return jax.tree.unflatten(structure, out)


def _factored(leaf: jax.Array, axes: Sequence, group: str) -> list[tuple[int, jax.Array]]:
    """For each place of the group, ``(axis, the leaf in a shape that has the units as this axis)``."""
    found = []
    for i, factors in enumerate(axes):
        for j, (count, name) in enumerate(factors):
            if name == group:
                lengths = [n for n, _ in factors]
                shape = (*leaf.shape[:i], *lengths, *leaf.shape[i + 1 :])
                assert shape[i + j] == count
                found.append((i + j, leaf.reshape(shape)))
    return found


def aligned(variables: Variables, reference: Variables, units: Units, sweeps: int = 2) -> Variables:
    """The same network with its units in the order in which they are most like the reference's.

    Group by group the best assignment, given the other groups' order; networks of several hidden layers take a few
    ``sweeps``, and may stop short of the best order of all.
    """
    for _ in range(sweeps if len(units.groups) > 1 else 1):
        for group in units.groups:
            mine, theirs = (unit_vectors(v, units, group) for v in (variables, reference))
            # For permutations the least sum of squared distances is the largest sum of products.
            products = jnp.matmul(theirs, mine.T, precision=jax.lax.Precision.HIGHEST)
            variables = reordered(variables, units, group, assignment(-products))
    return variables


def matched_mean(models: PyTree, weights: jax.Array, units: Units, *, sweeps: int = 2, passes: int = 2) -> Variables:
    """The weighted mean of networks whose units are matched first.

    All are aligned to the heaviest one, and then, ``passes - 1`` times, to the mean that this gave. The number of units
    stays, where PFNM and FedMA let unlike units stand side by side.

    Args:
      models: Variables stacked, leaves ``[K, ...]``.
      weights: ``float[K]``, at least 0; networks of weight 0 don't count.
      units: :func:`fedjax_lab.transforms.hidden_units` of the model.
      sweeps: see :func:`aligned`.
      passes: alignments of each network.

    Returns:
      Variables, floats in float32 at least; integer leaves are means, too.
    """
    weights = jnp.asarray(weights, jnp.float32)
    total = jnp.where(jnp.sum(weights) > 0, jnp.sum(weights), 1)
    reference = jax.tree.map(lambda x: x[jnp.argmax(weights)], models)
    for _ in range(passes):

        def add(sums, entry, reference=reference):
            model, weight = entry
            wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)) * weight
            return jax.tree.map(jnp.add, sums, jax.tree.map(wide, aligned(model, reference, units, sweeps))), None

        wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
        sums, _ = jax.lax.scan(add, jax.tree.map(wide, reference), (models, weights))
        reference = jax.tree.map(lambda x: x / total, sums)
    return reference


def matched_average(
    model: Model, models: Sequence[Variables], batch: PyTree, weights: Sequence[float] | None = None, **options: int
) -> Variables:
    """:func:`matched_mean` of a list of a model's Variables, such as clients trained apart.

    Args:
      model: whose loss says which entries are a unit's.
      models: at least one.
      batch: examples, or their shapes.
      weights: at least 0, all the same by default.
      **options: ``sweeps`` and ``passes``.

    Raises:
      ValueError: no model, models of unlike shapes, weights that don't fit, a model without hidden units.
    """
    if not models:
        raise ValueError("an average of no models: give at least one")
    for number, other in enumerate(models[1:], 2):
        _alike(models[0], other, number)
    chosen = [1.0] * len(models) if weights is None else weights
    checks.weights(chosen, "weights", len(models))
    units = hidden_units(model.loss, models[0], batch)
    if not units.groups:
        raise ValueError("this model has no hidden units that could be matched: take the plain mean")
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    return jax.jit(lambda m, w: matched_mean(m, w, units, **options))(stacked, jnp.asarray(chosen, jnp.float32))


def _alike(first: PyTree, other: PyTree, number: int) -> None:
    names = [[name for name, _ in checks.named_leaves(tree)] for tree in (first, other)]
    if names[0] != names[1] or jax.tree.structure(first) != jax.tree.structure(other):
        raise ValueError(f"model {number} has the leaves {names[1]}, the first one {names[0]}")
    for (name, a), (_, b) in zip(checks.named_leaves(first), checks.named_leaves(other), strict=True):
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(
                f"model {number} has {name} of shape {jnp.shape(b)}, the first one {jnp.shape(a)}: only networks of "
                "the same shapes can be matched"
            )
