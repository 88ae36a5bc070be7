"""What Rounds remember for each client, and what that doesn't go with: refused when a Round is built."""

from fedjax_lab.round import Round


def of_units(round: Round, who: str) -> None:
    """Refuse a Round that sends a client other units of the model each time, for what remembers something of each."""
    if "moving_units" in round.traits:
        raise ValueError(
            f"{who} remembers something of every unit for each client, but federated_dropout() sends other units each "
            "round: take width_slices(), which sends a client always the same"
        )


def of_one_model(round: Round, who: str) -> None:
    """Refuse a Round that remembers something of one model for each client, for what moves clients between models.

    Args:
      round: the Round.
      who: what moves them, and how, such as ``"clusters() lets clients go from one model to another"``.
    """
    if "remembering" in round.traits:
        raise ValueError(
            f"{who}, but this Round corrects them by what it remembers of one (control variates, dual variables): put "
            "it over a Round without"
        )
    if "changes" in round.traits:
        raise ValueError(
            f"{who}, but this Round uploads what is new since the last upload, for one model: take a selective(...) "
            'that has instead="nothing"'
        )
