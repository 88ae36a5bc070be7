"""The keys of a round and of a client's turn.

A fold is some 130 operations to XLA:CPU, wherever it stands, and six of them were 800 of the 2,700 of a small model's
round (W1), all of which are compiled at every start. So those that follow each other are made in one loop.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class RoundKeys(NamedTuple):
    """What a round draws from: in public (:class:`fedjax_lab.Env`), for the clients' own use, and for the server's."""

    public: jax.Array
    clients: jax.Array
    serving: jax.Array


def of_round(key: jax.Array, number: jax.Array) -> RoundKeys:
    """``fold_in(fold_in(key, number), i)`` for each of them, of a run's key and the round's ``number: int32[]``."""
    _, *three = _child_and_its(key, number, range(3))
    return RoundKeys(*three)


def of_client(key: jax.Array, client: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``fold_in(fold_in(key, client), i)`` for ``i`` 0 and 1: what the server's message, and its own work, draws from.

    Args:
      key: ``RoundKeys.clients``.
      client: ``int32[]``.
    """
    own, update = _child_and_its(key, client, [1])
    return jax.random.fold_in(own, 0), update  # few messages draw: then XLA drops the fold


def _child_and_its(key: jax.Array, number: jax.Array, numbers: Sequence[int]) -> list[jax.Array]:
    """The key folded with a number, and that one folded with each of ``numbers``."""
    folds = jnp.concatenate([number[None], jnp.array(numbers, number.dtype)])

    def fold(parent, of):
        first, number = of
        made = jax.random.fold_in(parent, number)
        return jnp.where(first, made, parent), made

    made = jax.lax.scan(fold, key, (jnp.arange(len(folds)) == 0, folds))[1]
    return [made[i] for i in range(len(folds))]
