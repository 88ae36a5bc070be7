"""ClientData: one client's view of a FederatedData, usable inside jit and vmap."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab import checks, shuffle

PyTree = Any
Step = Callable[[PyTree, PyTree, jax.Array, jax.Array, Any], PyTree]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClientData:
    """One client's examples: a range of rows of the population's flat arrays, never a copy.

    Attributes:
      size: ``int32[]``, its number of examples.
      id: ``int32[]``, its position in the population (``FederatedData.ids`` has the user's own id).
      attrs: its entries of the population's attributes.
      env: the round's public facts (:class:`fedjax_lab.Env`), or ``()`` outside a round.
      max_size: a static bound of ``size`` over the population.
      tile: static, how many rows :meth:`fold` best reads at once when order doesn't matter.
      population: static, the number of clients; ``None`` outside a round.
      own: static, predicates of the parameters that are its own (:mod:`fedjax_lab.ownership`).
      for_use: static, whether it is sent a model to use it, and not to train it.
    """

    arrays: PyTree
    first_row: jax.Array
    rows: jax.Array  # of the whole client, of which this view may be a part
    offset: jax.Array
    size: jax.Array
    id: jax.Array
    attrs: dict[str, Any]
    env: Any
    max_size: int = dataclasses.field(metadata={"static": True})
    tile: int = dataclasses.field(metadata={"static": True})
    shuffled: bool = dataclasses.field(default=False, metadata={"static": True})
    population: int | None = dataclasses.field(default=None, metadata={"static": True})
    own: tuple[Callable[[str], bool], ...] = dataclasses.field(default=(), metadata={"static": True})
    for_use: bool = dataclasses.field(default=False, metadata={"static": True})

    def take(self, positions: jax.Array) -> PyTree:
        """The examples at ``positions`` of this view, ``int[n]`` -> leaves ``[n, ...]``.

        Positions outside ``0..size-1`` give the nearest example inside, so that no other client's
        rows are ever read (of an empty client: an arbitrary row; mask it).
        """
        inside = self.offset + jnp.clip(positions, 0, jnp.maximum(self.size - 1, 0))
        if self.shuffled:
            # One fixed order for each client, so that the parts of a split stay disjoint.
            inside = shuffle.permute(inside, self.rows, shuffle.derive(jnp.uint32(0x5EED), self.id))
        rows = self.first_row + inside

        def gather(a):
            if not a.shape[0]:  # an empty client outside a population has no row at all to stand for the masked ones
                return jnp.zeros((*rows.shape, *a.shape[1:]), a.dtype)
            return jnp.asarray(a).at[rows].get(wrap_negative_indices=False)

        return jax.tree.map(gather, self.arrays)

    def full(self) -> tuple[PyTree, jax.Array]:
        """All examples as one padded batch: leaves ``[max_size, ...]`` and ``mask: bool[max_size]``.

        Costs the population's largest client; prefer :meth:`fold` where sizes differ much.
        """
        positions = jnp.arange(max(self.max_size, 1))
        return self.take(positions), positions < self.size

    def split(self, fraction: float) -> tuple["ClientData", "ClientData"]:
        """Two disjoint random parts, for instance support and query of meta-learning.

        The order is drawn once for each client, so that the same split comes out in every round.
        The first part has ``fraction`` of the examples, both at least one if there are two.
        """
        checks.shares(fraction)
        count = first_of(self.size, fraction)
        top = min(max(int(fraction * self.max_size + 0.5), 1), self.max_size)
        rest = max(self.max_size - min(int(fraction * self.max_size), max(self.max_size - 1, 0)), 1)
        return self._range(0, count, top), self._range(count, self.size - count, min(rest, self.max_size))

    def part(self, p: jax.Array | int, of: int) -> "ClientData":
        """The ``p``-th of ``of`` disjoint random parts of nearly equal size (folds, coded work)."""
        low, high = p * self.size // of, (p + 1) * self.size // of
        return self._range(low, high - low, -(-self.max_size // of))

    def _range(self, low, size, max_size: int) -> "ClientData":
        return dataclasses.replace(
            self,
            offset=self.offset + low,
            size=jnp.asarray(size, jnp.int32),
            max_size=max_size,
            tile=min(self.tile, max(max_size, 1)),
            shuffled=True,
        )

    def fold(
        self,
        step: Step,
        carry: PyTree,
        *,
        epochs: jax.Array | int = 1,
        steps: jax.Array | int | None = None,
        batch_size: int | None = None,
        key: jax.Array | None = None,
        static: bool = False,
    ) -> PyTree:
        """Go through the client's examples in batches: ``carry = step(carry, batch, mask, positions, key)``.

        Each epoch visits every example once, in an order of its own; its last batch may be partly
        filled, which ``mask: bool[batch_size]`` tells. An empty client makes no step.

        Args:
          step: ``batch`` has leaves ``[batch_size, ...]``; ``positions: int32[batch_size]`` says which
            examples of the client they are; ``key`` is the step's own (``key=None``: an unusable one).
          carry: pytree, kept in structure and dtypes by ``step``.
          epochs: passes over the data; may be traced and differ by client.
          steps: a number of steps instead, going on through further epochs as needed.
          batch_size: examples a step; ``None`` reads pieces of ``tile`` examples (for sums over the
            client, where their size is immaterial).
          key: the order's PRNG key; ``None`` keeps the examples in order.
          static: run a number of steps known at compile time (the largest client's, the rest masked
            out), which reverse-mode differentiation needs. ``epochs`` or ``steps`` must be static then.

        Returns:
          The last carry.
        """
        size = self.tile if batch_size is None else batch_size
        batches = _quotient(self.size + (size - 1), size)  # of one epoch
        trips = epochs * batches if steps is None else jnp.where(self.size > 0, steps, 0)
        per_epoch = jnp.maximum(batches, 1)
        seed = None if key is None else shuffle.seed_of(key)
        slots = jnp.arange(size)

        def body(t, carry):
            done = jax.lax.convert_element_type(t, per_epoch.dtype)  # "steps" may be of another type
            epoch = _quotient(done, per_epoch)
            positions = (done - epoch * per_epoch) * size + slots
            mask = positions < self.size
            if seed is None:
                positions = jnp.clip(positions, 0, jnp.maximum(self.size - 1, 0))
            else:
                positions = shuffle.permute(positions, self.size, shuffle.derive(seed, epoch))
            step_key = key if key is None else jax.random.fold_in(key, t)
            return step(carry, self.take(positions), mask, positions, step_key)

        if not static:
            return jax.lax.fori_loop(0, trips, body, carry)
        bound = epochs * -(-self.max_size // size) if steps is None else steps
        if not isinstance(bound, int):
            raise ValueError("fold(static=True) needs epochs or steps as Python integers")

        def masked(carry, t):
            new = body(t, carry)
            return jax.tree.map(lambda a, b: jnp.where(t < trips, a, b), new, carry), None

        return jax.lax.scan(masked, carry, jnp.arange(bound))[0]


def _quotient(n: jax.Array, by: jax.Array | int) -> jax.Array:
    """``n // by`` of integers that aren't negative: a division only, where "//" looks at signs and remainders."""
    n = jnp.asarray(n)
    return jax.lax.div(n, jnp.asarray(by, n.dtype))


def first_of(size: Any, fraction: float) -> Any:
    """How many of ``size`` examples, ``int32``, are in the first part of :meth:`ClientData.split`."""
    xp: Any = jnp if isinstance(size, jax.Array) else np
    count = xp.floor(np.float32(fraction) * xp.asarray(size, np.float32) + np.float32(0.5)).astype(np.int32)
    few = xp.minimum(size, 1)
    return xp.clip(count, few, xp.maximum(size - 1, few))


def of_second_part(data: Any, fraction: float) -> Any:
    """The population with the sizes that the second parts of :meth:`ClientData.split` have, for what weighs by them."""
    return dataclasses.replace(data, sizes=data.sizes - first_of(data.sizes, fraction))
