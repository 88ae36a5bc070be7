"""Transforms that change the local objective."""

from collections.abc import Callable
from typing import Any

from fedjax_lab import checks
from fedjax_lab.client import ClientData
from fedjax_lab.models.base import Variables
from fedjax_lab.round import Round, Tilt, Transform, chain_tilts, identity
from fedjax_lab.round import proximal as proximal_tilt
from fedjax_lab.transforms.personal import received_model


def tilted(make: Callable[[Variables, ClientData], Tilt]) -> Transform:
    """Train on a changed objective: ``make(received variables, client) -> Tilt``.

    The tilts of transforms further out are applied after this one.
    """
    if not callable(make):
        raise ValueError(f"make must be a function of (received variables, client); got {checks.shown(make)}")

    def transform(round: Round) -> Round:
        if round.view is None:
            raise ValueError("tilted() changes local training, but this Round trains no model (Round.view is None)")

        received = received_model(round, "tilted()")  # whole, where a client has parts or a choice of its own

        def client_update(message, state, client, key, tilt=identity):
            own = make(received(message, state, client, key), client)
            return round.client_update(message, state, client, key, tilt=chain_tilts(own, tilt))

        return round._replace(client_update=client_update)

    return transform


def proximal(mu: Any) -> Transform:
    """Add ``mu/2 ||w - w_received||^2`` to every client's objective (FedProx, Li et al. 2020, eq. 2).

    Args:
      mu: strength, at least 0; 0 leaves the round as it is.

    Raises:
      ValueError: a negative ``mu``.
    """
    checks.not_negative(mu, "mu")
    return tilted(lambda received, client: proximal_tilt(mu, received.params))
