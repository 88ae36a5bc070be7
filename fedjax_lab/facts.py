"""What is told of a client's turn, in one row of numbers.

A round keeps it of every client of a cohort, in the order in which they ran, and puts it back into the cohort's order;
over devices it travels as well. As arrays of their own, half a dozen numbers would each need kernels to make room, to
be written, moved and read, which is compiling time and, for small clients, dispatches.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

FIXED = 7  # numbers in front of the metrics


@functools.partial(jax.tree_util.register_dataclass, data_fields=["row"], meta_fields=["names"])
class Facts:
    """A client's ``row: float32[7 + metrics]``, with any axes in front for several clients.

    Bytes are held in two halves of 16 bits, which a float32 holds exactly.
    """

    def __init__(self, row: jax.Array, names: tuple[str, ...]):
        self.row, self.names = row, names

    @property
    def alive(self) -> jax.Array:
        """``bool[...]``: present, and all it computed is finite."""
        return self._at(0) > 0

    @property
    def counted(self) -> jax.Array:
        """``bool[...]``: alive, sent, and of positive weight."""
        return self._at(1) > 0

    @property
    def weight(self) -> jax.Array:
        """``float32[...]``."""
        return self._at(2)

    @property
    def bytes_up(self) -> jax.Array:
        """``uint32[...]``."""
        return self._whole(3)

    @property
    def bytes_down(self) -> jax.Array:
        """``uint32[...]``."""
        return self._whole(5)

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """``{name: float32[...]}``."""
        return {name: self._at(FIXED + i) for i, name in enumerate(self.names)}

    def _whole(self, at: int) -> jax.Array:
        high, low = (self._at(i).astype(jnp.uint32) for i in (at, at + 1))
        return (high << 16) + low

    def _at(self, i: int) -> jax.Array:
        return jax.lax.index_in_dim(self.row, i, -1, keepdims=False)


def facts(
    alive: jax.Array,
    counted: jax.Array,
    weight: jax.Array,
    bytes_up: jax.Array,
    bytes_down: jax.Array,
    metrics: dict[str, Any],
) -> Facts:
    """One client's :class:`Facts`, of scalars."""
    halves = [half for n in (bytes_up, bytes_down) for half in (n >> 16, n & 0xFFFF)]
    numbers = [alive, counted, weight, *halves, *metrics.values()]
    return Facts(jnp.stack([jnp.asarray(number, jnp.float32) for number in numbers]), tuple(metrics))
