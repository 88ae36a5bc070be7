"""Models of which a part is built anew by each client in every round, and kept by nobody: FedRecon."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from fedjax_lab import checks
from fedjax_lab.client import of_second_part
from fedjax_lab.local import ClientOptimizer
from fedjax_lab.models.base import Model, Variables, as_model, initial_variables
from fedjax_lab.ownership import owning
from fedjax_lab.round import Round, Transform, chain_tilts, identity
from fedjax_lab.transforms.personal import own_training
from fedjax_lab.transforms.private import fill, holding, keep, merge, not_encoded, splits, strip

PyTree = Any


def reconstruction(
    model: Model,
    predicate: Callable[[str], bool],
    client_optimizer: ClientOptimizer | None = None,
    *,
    support: float = 0.5,
    **local_work: Any,
) -> Transform:
    """Rebuild the private leaves from a part of the client's data, then train the others on the rest (FedRecon, Singhal
    et al., "Federated Reconstruction: Partially Local Federated Learning", NeurIPS 2021, algorithm 1).

    In every round a client splits its examples in two, always alike. From the support it reconstructs its private
    leaves, with those received held; on the query the inner round trains the others, with the private ones held, and
    that update travels. It weighs by its query examples. What each client would use is what it was sent, completed
    from all its data: a client that never took part does the same. Kept per client: nothing, so that the population
    may be large and a client may come once. Travels: the shared part, each way. Over :func:`mixture` the private leaves
    are rebuilt for components of equal weights.

    The private leaves begin where ``model`` initialises them with a key that all clients know: they are part of the
    program and not sent.

    Args:
      model: the model that the Round trains, for its initialisation.
      predicate: of a leaf's path in Variables, such as ``params/Dense_1/kernel``. See
        :func:`fedjax_lab.transforms.leaves`.
      client_optimizer: of the reconstruction; by default the inner round's local training is used as it is.
      support: a client's share of examples to reconstruct from; a client of one example has nothing left to train
        on, and counts for nothing.
      **local_work: ``epochs``, ``steps`` and ``batch_size`` of the reconstruction, see
        :func:`fedjax_lab.local_training`; the paper's k_r.

    Raises:
      ValueError: a share outside 0..1, ``local_work`` without an optimizer; a Round that sends no whole model; when the
        process is built, if nothing or everything is private, no client has two examples, or the Round trains
        another model.
    """
    checks.model(model)
    checks.predicate(predicate)
    checks.share(support, "support")

    def transform(round: Round) -> Round:
        _check_round(round)
        view, lens = round.view, round.model
        local = own_training(round, client_optimizer, local_work, "reconstruction()")

        def init(key, data, params=None):
            server = round.init(key, of_second_part(data, support), params)
            splits(predicate, lens.get(server))
            _same_model(lens.get(server), jax.eval_shape(lambda: _initial(model, data)))
            _divisible(data)
            return server

        def broadcast(server, state, client, key):
            message = not_encoded(round.broadcast(server, state, client, key), "reconstruction()")
            return strip(predicate, lens.get(server), message)

        def completed(message, client, key):
            """The inner message with private leaves reconstructed from the client's examples."""
            part = keep(predicate, _initial(model, client))
            whole = fill(part, message)
            start = merge(part, view.get(whole))
            only = holding(lambda path: not predicate(path))
            run = local(start, client, jax.random.fold_in(key, 0xFEC0), tilt=only)
            return view.set(whole, merge(keep(predicate, run.variables), start))

        def client_update(message, state, client, key, tilt=identity):
            known, query = client.split(support)
            whole = completed(message, known, key)
            out = round.client_update(
                whole, state, owning(query, predicate), key, tilt=chain_tilts(tilt, holding(predicate))
            )
            shared = lambda tree: strip(predicate, view.get(whole), tree)
            return out._replace(upload=shared(out.upload), bytes_up=None, parts=shared(out.parts))

        def server_update(server, aggregate, key):
            # The server's own copy of the private leaves gets zero updates: it stays where it began.
            return round.server_update(server, fill(keep(predicate, lens.get(server)), aggregate), key)

        def personalize(message, state, client, key):
            return round.personalize(completed(message, client, key), state, client, key)

        return round._replace(
            init=init,
            broadcast=broadcast,
            client_update=client_update,
            server_update=server_update,
            personalize=personalize,
            traits=round.traits | {"personal", "partial", "split"},
        )

    return transform


def _check_round(round: Round) -> None:
    """Refuse a Round that doesn't send whole models as they are."""
    if round.view is None or round.model is None:
        raise ValueError("reconstruction() splits a model, but this Round sends none")
    if {"encoded", "summed"} & round.traits:
        raise ValueError(
            "reconstruction() takes leaves out of uploads, but this Round's are encoded: put fl.uplink behind it"
        )
    if {"sub_models", "pruned", "merged"} & round.traits:
        raise ValueError(
            "reconstruction() takes leaves out of whole models, but this Round sends parts of one (federated "
            "dropout, width slices, pruning, merged adapters), which don't go together"
        )
    if {"split", "many_models"} & round.traits:
        raise ValueError("reconstruction() comes before transforms that split or multiply the model: put it first")
    if "by_leaf" in round.traits:
        raise ValueError(
            "reconstruction() takes leaves out of messages, but partial_averaging() has these travel in rounds of "
            "their own: leave one of the two out"
        )


def _divisible(data: Any) -> None:
    """Refuse data of which no client can be split in two."""
    if not isinstance(data.sizes, Tracer) and np.asarray(data.sizes).max() < 2:
        raise ValueError("reconstruction() splits each client's data in two, but no client has two examples")


def _initial(model: Model, data: Any) -> Variables:
    """The model as every client can make it; ``data`` are looked at for their shapes only."""
    unchecked = as_model(model)._replace(num_classes=None, classes=None, check=None)
    return initial_variables(unchecked, jax.random.key(0), data)


def _same_model(trained: Variables, made: Variables) -> None:
    """Refuse a model that isn't the Round's."""
    names = [name for name, _ in checks.named_leaves(trained)]
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    if shapes(trained) != shapes(made):
        raise ValueError(
            f"reconstruction(model, ...) initialises {[n for n, _ in checks.named_leaves(made)]}, but the Round trains "
            f"{names}, or others of these names: give it the Round's own model"
        )
