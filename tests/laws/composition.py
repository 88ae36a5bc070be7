"""Which transforms go together: ``python -m tests.laws.composition`` tries all pairs and writes docs/composition.md."""

import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_lab as fl
from algorithms.fedadam import fedadam
from algorithms.fedavg import fedavg
from algorithms.fedprox import fedprox
from algorithms.scaffold import scaffold
from fedjax_lab import transforms as t
from tests.problems import softmax_data
from tests.transforms.networks import network

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "composition.md"
NETWORK = network()
BASE = NETWORK.init(jax.random.key(7))[0]
SGD = optax.sgd(0.1)
LOCAL = {"epochs": 2, "batch_size": 10}
TRAINS, REFUSED, ROUNDS = "trains", "refused: ", 3


def output_bias(path: str) -> bool:
    """The leaf that is private, in whatever the models of other transforms make of its path."""
    return "output" in path and "bias" in path


class Part(NamedTuple):
    """A transform of the matrix: what it needs the model to be, and the transform, made for that model."""

    transform: Callable[[fl.Model], fl.Transform]
    model: Callable[[fl.Model], fl.Model] = lambda model: model


ALGORITHMS = {
    "FedAvg": lambda model: fedavg(model, SGD, **LOCAL),
    "FedProx": lambda model: fedprox(model, SGD, mu=0.1, **LOCAL),
    "SCAFFOLD": lambda model: scaffold(model, SGD, **LOCAL),
    "FedAdam": lambda model: fedadam(model, SGD, **LOCAL),
}
TRANSFORMS = {
    "fine_tuning": Part(lambda model: t.fine_tuning()),
    "personal_model": Part(lambda model: t.personal_model(0.5)),
    "pfedme": Part(lambda model: t.pfedme(2.0, inner_learning_rate=0.1, inner_steps=3)),
    "apfl": Part(lambda model: t.apfl(0.5)),
    "coupling": Part(lambda model: t.coupling(0.5)),
    "private": Part(lambda model: t.private(output_bias)),
    "reconstruction": Part(lambda model: t.reconstruction(model, output_bias, SGD, **LOCAL)),
    "per_fedavg": Part(lambda model: t.per_fedavg(0.1)),
    "meta_sgd": Part(lambda model: t.meta_sgd(), lambda model: t.with_rates(model, 0.1)),
    "reptile": Part(lambda model: t.reptile(0.5)),
    "nearest_neighbours": Part(lambda model: t.nearest_neighbours(lambda variables, x: x, num_classes=3)),
    "hypernetwork": Part(lambda model: t.hypernetwork(embedding_size=2, server_optimizer=optax.sgd(0.1))),
    "clusters": Part(lambda model: t.clusters(2)),
    "mixture": Part(lambda model: t.mixture(), lambda model: t.with_components(model, 2)),
    "split_clusters": Part(lambda model: t.split_clusters(2, eps1=0.3, eps2=0.35, min_rounds=1)),
    "control_variates": Part(lambda model: t.control_variates(learning_rate=0.1)),
    "proximal": Part(lambda model: t.proximal(0.1)),
    "local_gradients": Part(lambda model: t.local_gradients(0.1)),
    "partial_averaging": Part(lambda model: t.partial_averaging(t.periods({"*hidden*": 2}))),
    "lag_wk": Part(lambda model: t.lag_wk(0.1, memory=2)),
    "cmfl": Part(lambda model: t.cmfl(0.1)),
    "pruning": Part(lambda model: t.pruning(0.5, start=0, end=2, every=1)),
    "federated_dropout": Part(lambda model: t.federated_dropout(0.5)),
    "width_slices": Part(lambda model: t.width_slices(0.5)),
    "fedpara": Part(lambda model: lambda round: round, lambda model: t.fedpara(model, rank=2)),
    "uplink": Part(lambda model: fl.uplink(fl.wire.error_feedback(fl.wire.top_k(0.2)), fl.wire.qsgd(8))),
    "downlink": Part(lambda model: fl.downlink(fl.wire.quantize(8))),
}


def cells() -> Iterator[tuple[str, str]]:
    """Every transform over every algorithm, and over FedAvg under every other transform."""
    for name in TRANSFORMS:
        yield from ((inner, name) for inner in (*ALGORITHMS, *TRANSFORMS) if inner != name)


def model_of(inner: str, outer: str) -> fl.Model:
    """The shared network as the two want it; a mixture's components go around all other changes."""
    model = NETWORK
    for name in sorted((inner, outer), key=lambda name: name == "mixture"):
        model = TRANSFORMS[name].model(model) if name in TRANSFORMS else model
    return model


def build(inner: str, outer: str) -> fl.Round:
    """The Round ``compose(algorithm, outer)`` or ``compose(fedavg, inner, outer)`` of the shared network."""
    parts = [TRANSFORMS[name] for name in (inner, outer) if name in TRANSFORMS]
    model = model_of(inner, outer)
    round = ALGORITHMS.get(inner, ALGORITHMS["FedAvg"])(model)
    return fl.compose(round, *(part.transform(model) for part in parts))


def begun(inner: str, outer: str) -> tuple[fl.Process, object]:
    """The process on eight uneven clients, all in every round, and its first state."""
    process = fl.synchronous(build(inner, outer), softmax_data(), fl.everyone(), lanes=2)
    return process, process.init(jax.random.key(0))


def outcome(inner: str, outer: str) -> str:
    """``"trains"`` if three jitted rounds, compiled once, lower the loss; or how the pair is refused.

    The clients' own while they train; where not all of them send, that of the server's model on all data.
    """
    try:
        process, state = begun(inner, outer)
    except ValueError as error:
        return f"{REFUSED}{error}"
    step = jax.jit(process.step).lower(state, process.data).compile()  # which refuses a state of other types
    losses, model = [], model_of(inner, outer)
    rows = jax.tree.map(jnp.asarray, process.data.arrays)
    for _ in range(ROUNDS):
        state, metrics = step(state, process.data)
        if {"lag_wk", "cmfl"} & {inner, outer}:
            now = process.variables(state)
            here = model.loss(now.params, now.model_state, rows, jnp.ones(len(rows["y"]), bool), None, False)[0]
            losses.append(float(jnp.mean(here)))
        else:
            losses.append(float(metrics["loss"]))
    return TRAINS if np.isfinite(losses).all() and losses[-1] < losses[0] else f"loss {losses}"


def table(outcomes: dict[tuple[str, str], str]) -> str:
    """The page: a row for each transform, a column for what it is put over; refusals as notes."""
    inners = [*ALGORITHMS, *TRANSFORMS]
    notes: list[str] = []

    def mark(inner, outer):
        text = outcomes.get((inner, outer), "")
        if text in ("", TRAINS):
            return "yes" if text else ""
        text = text.removeprefix(REFUSED)
        if text not in notes:
            notes.append(text)
        return f"[{notes.index(text) + 1}]"

    rows = [[outer, *(mark(inner, outer) for inner in inners)] for outer in TRANSFORMS]
    lines = [f"| {' | '.join(row)} |" for row in (["", *inners], ["---"] * (len(inners) + 1), *rows)]
    remarks = [f"{i}. {note}" for i, note in enumerate(notes, 1)]
    count = sum(text == TRAINS for text in outcomes.values())
    trains = lambda *cell: outcomes.get(cell) == TRAINS
    over = [cell for cell in outcomes if cell[0] in ALGORITHMS]
    pairs = list(itertools.combinations(TRANSFORMS, 2))
    either = sum(trains(one, other) or trains(other, one) for one, other in pairs)
    return "\n".join([
        "# What composes with what",
        "",
        "`fl.compose(algorithm, row)`, and `fl.compose(fedavg, column, row)` for a column that is a transform: *yes*",
        "if three jitted rounds on eight uneven clients lower the training loss, compiled once; a number if the pair",
        f"is refused when it is built, with the sentence below. {count} of {len(outcomes)} train: "
        f"{sum(trains(*cell) for cell in over)} of {len(over)}",
        f"over the algorithms, and {either} of the {len(pairs)} pairs of transforms in one order at least. Made by",
        "`python -m tests.laws.composition [names]`; `tests/laws/test_composition.py` holds the page to the code. An",
        "empty cell was not tried yet.",
        "",
        *lines,
        "",
        *remarks,
        "",
    ])  # fmt: skip


def published() -> dict[tuple[str, str], str]:
    """The page, read back: ``{(column, row): "trains" or "refused: sentence"}``."""
    lines = PAGE.read_text().splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    notes = dict(line.split(". ", 1) for line in lines if line[:1].isdigit())
    said = lambda mark: TRAINS if mark == "yes" else f"{REFUSED}{notes[mark.strip('[]')]}"
    inners = rows[0][1:]
    return {
        (inner, row[0]): said(mark)
        for row in rows[2:]
        for inner, mark in zip(inners, row[1:], strict=True)
        if mark
    }  # fmt: skip


def main(names: list[str]) -> None:
    """Try the pairs with one of the names, or all, and write the page; the others stay as they are there."""
    outcomes = published() if names and PAGE.exists() else {}
    for inner, outer in cells():
        if names and not {inner, outer} & set(names):
            continue
        try:
            outcomes[inner, outer] = outcome(inner, outer)
        except Exception as error:  # a defect, to be seen beside the others
            outcomes[inner, outer] = f"{type(error).__name__}: {error}"
        if outcomes[inner, outer] != TRAINS:
            print(f"{outer} over {inner}: {outcomes[inner, outer]}", flush=True)
    defects = [cell for cell, text in outcomes.items() if text != TRAINS and not text.startswith(REFUSED)]
    PAGE.write_text(table({cell: text for cell, text in outcomes.items() if cell not in defects}))
    if defects:
        sys.exit(f"{len(defects)} pairs neither train nor are refused when built: {defects}")


if __name__ == "__main__":
    main(sys.argv[1:])
