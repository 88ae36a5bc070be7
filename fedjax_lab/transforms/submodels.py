"""Clients that train a part of every hidden layer: federated dropout, and models of several widths."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fedjax_lab import checks
from fedjax_lab.client import ClientData
from fedjax_lab.models.base import Variables
from fedjax_lab.round import Aggregator, Lens, Round, Sent, Tilt, Transform, chain_tilts, identity, projection
from fedjax_lab.transforms.slices import Part, bytes_of, completed, cut, held_units, marks, opened, put_back, replaced
from fedjax_lab.transforms.transfers import of
from fedjax_lab.transforms.units import Rule, Units, by_rule, hidden_units

PyTree = Any


def federated_dropout(rate: Any, units: Rule | None = None) -> Transform:
    """Each client trains a random part of every hidden layer, another one each round (Caldas et al., "Expanding the
    Reach of Federated Learning by Reducing Client Resource Requirements", 2018, section 3.2).

    A client is sent a fixed number of each layer's units, drawn for it and this round, with what belongs to them; it
    trains this smaller model, and the server puts the update back in its place. Every entry is averaged over the
    clients that had it, and one that nobody had stays as it was. Kept per client: nothing. Travels: the part each
    way, and four bytes down that name it.

    Uploads of the same rate are as short as the part, so that :func:`fedjax_lab.uplink` and
    ``downlink(..., deltas=False)`` compress them further, as the paper does; error feedback, which would add to one
    unit what it remembers of another, doesn't make sense there and is refused. So are transforms behind it that keep a
    model for each client (Ditto, APFL, coupling); those that train another objective, or make a client's model when it
    is used (Per-FedAvg, fine-tuning), are not, and start there from the whole model. In a simulation a client's part
    is computed as a whole model with zeros in it: it saves bytes, not time.

    Args:
      rate: the share of each layer's units that a client has, the paper's federated dropout rate: a number, an array
        with one for each client of the population, or the name of a client attribute.
      units: which axes count units, :data:`fedjax_lab.transforms.units.Rule`; found from the model's loss by default
        (:func:`hidden_units`).

    Raises:
      ValueError: a rate outside 0..1, or 0; a Round that trains no model, or whose uploads aren't one change of it;
        when the process is built, if the model has no hidden units that may be left out.
    """
    return _submodels(rate, units, random=True, who="federated_dropout()")


def width_slices(rate: Any, units: Rule | None = None) -> Transform:
    """Each client trains the first units of every hidden layer, as many as it can afford (HeteroFL, Diao, Ding and
    Tarokh, ICLR 2021, algorithm 1).

    A client of rate ``r`` is sent the upper left ``ceil(r n)`` by ``ceil(r m)`` corner of each kernel, so that the
    parts are nested. Every entry is averaged over the clients that had it, and one that nobody had stays as
    it was. What each client would use is its own part. Kept per client: nothing. Travels: the part each way, and
    four bytes down where clients differ.

    Deviations: activations aren't scaled by ``1/r`` in training, and batch-norm statistics are averaged as the round
    does it, where the paper takes them anew after training; logits of absent classes aren't masked. In a simulation a
    client's part is computed as a whole model with zeros in it: it saves bytes, not time. Where clients differ in
    rate, :func:`fedjax_lab.uplink` encodes uploads of the largest one's size, and counts what that takes.

    Args:
      rate: the share of each layer's units that a client has: a number, an array with one for each client of the
        population, or the name of a client attribute.
      units: as for :func:`federated_dropout`.

    Raises:
      ValueError: as for :func:`federated_dropout`.
    """
    return _submodels(rate, units, random=False, who="width_slices()")


def _submodels(rate: Any, rule: Rule | None, random: bool, who: str) -> Transform:
    _check_rate(rate, who)
    table = not isinstance(rate, str) and np.ndim(rate) > 0
    single = isinstance(rate, int | float)
    most = float(rate) if single else float(np.max(rate)) if table and not isinstance(rate, Tracer) else 1.0

    def transform(round: Round) -> Round:
        _check_round(round, who, random)
        if single and rate == 1:
            return round
        model, view = round.model, round.view
        units_of = functools.partial(_units_of, rule, round.loss)

        def init(key, data, params=None):
            _check_clients(rate, data)
            server = round.init(key, data, params)
            _check_units(units_of(model.get(server), data), model.get(server), who)
            return server

        def broadcast(server, state, client, key):
            _check_population(rate, client)
            inner = round.broadcast(server, state, client, key)
            units = units_of(model.get(server), client)
            if random and client.for_use:  # units are left out in training only
                return Part(inner, (), (), units, 1.0)
            seed = jax.random.bits(jax.random.fold_in(key, 0xD0), dtype=jnp.uint32) if random else ()
            own = () if single else jax.lax.bitcast_convert_type(jnp.float32(of(client, rate)), jnp.uint32)
            part = Part((), seed, own, units, most)
            part = dataclasses.replace(part, inner=cut(units, part.held(), inner))
            if single:
                return part
            told = 4 * (table or isinstance(rate, str))  # a sweep's rate is the same for all: nobody need be told
            return Sent(part, bytes_of(units, part.held(), part.inner) + jnp.uint32(told + 4 * random))

        def client_update(message, state, client, key, tilt=identity):
            part = opened(message)
            held, received = part.held(), completed(message)
            only = restricted(marks(part.units, held, bool).params)
            # On both sides of the other tilts: these see, and change, nothing of the units that aren't there.
            out = round.client_update(received, state, client, key, tilt=chain_tilts(only, tilt, projection(only)))
            _one_change(out.upload, part.units, who)
            upload = cut(part.units, held, out.upload)
            return out._replace(upload=upload, bytes_up=None if single else bytes_of(part.units, held, upload))

        def server_update(server, aggregate, key):
            mean, had = aggregate
            new, metrics = round.server_update(server, mean, key)
            stay = jax.tree.map(lambda h, a, b: jnp.where(h, a, b), had, model.get(new), model.get(server))
            return model.set(new, stay), metrics

        personal = round.personalize
        made = round._replace(
            init=init,
            broadcast=broadcast,
            client_update=client_update,
            aggregate=_by_entry(round.aggregate),
            server_update=server_update,
            personalize=personal and (lambda m, state, client, key: personal(completed(m), state, client, key)),
            view=Lens(lambda m: view.get(completed(m)), lambda m, new: replaced(m, view.set(completed(m), new))),
            traits=round.traits | {"sub_models"} | ({"moving_units"} if random else {"personal"}),
        )
        if random or round.local is None:
            return made
        return made._replace(local=_sliced(round.local, units_of, rate, most))

    return transform


def _units_of(rule: Rule | None, loss: Any, variables: Variables, client: ClientData) -> Units:
    """What the model's axes count, by the rule, or as its loss shows on a client's data."""
    if rule is not None:
        return by_rule(rule, variables)
    rows = jax.tree.map(lambda a: jax.ShapeDtypeStruct((3, *a.shape[1:]), a.dtype), client.arrays)
    return hidden_units(loss, variables, rows)


def _by_entry(aggregate: Aggregator) -> Aggregator:
    """The mean of each entry over the clients that had it, and whether anybody had."""

    def lift(upload, weight, message, env):
        part = opened(message)
        held = part.held()
        full = put_back(part.units, held, upload)
        value, below = aggregate.lift(full, weight, completed(message), env)
        had = jax.tree.map(lambda m: m * weight, marks(part.units, held))
        return value, (below, had, weight)

    def finish(sums, env):
        value, (below, had, weight) = sums
        mean = aggregate.finish((value, below), env)
        # The inner mean took clients without an entry for ones that left it as it was.
        each = lambda m, h: jnp.where(h > 0, m * (weight / jnp.where(h > 0, h, 1)).astype(m.dtype), 0)
        return jax.tree.map(each, mean, had), jax.tree.map(lambda h: h > 0, had)

    return Aggregator(lift, finish)


def restricted(mask: PyTree) -> Tilt:
    """The tilt to parameters that are zero, and stay as they are, where ``mask`` is false."""

    def tilt(oracle):
        def tilted(params, inputs, key):
            hold = lambda m, x: jnp.where(m, x, jnp.zeros_like(x))
            grads, aux = oracle(jax.tree.map(hold, mask, params), inputs, key)
            return jax.tree.map(hold, mask, grads), aux

        return tilted

    return tilt


def _sliced(local: Callable, units_of: Callable, rate: Any, most: float) -> Any:
    """Local training of the client's own part, for transforms that train besides the round."""

    def sliced(start, client, key, tilt=identity, opt_state=None):
        own = None if isinstance(rate, int | float) else jnp.float32(of(client, rate))

        def only(oracle):
            def tilted(params, inputs, key):
                units = units_of(Variables(params, inputs[0]), client)
                mask = marks(units, held_units(units, most, own, None), bool).params
                return restricted(mask)(oracle)(params, inputs, key)

            return tilted

        return local(start, client, key, chain_tilts(only, tilt), opt_state)

    return sliced


def _check_rate(rate: Any, who: str) -> None:
    if isinstance(rate, str | Tracer):
        return
    values = np.asarray(rate)
    if values.dtype.kind not in "iuf" or values.ndim > 1 or not values.size or not ((values > 0) & (values <= 1)).all():
        raise ValueError(
            f"{who} needs a rate above 0 and at most 1, the share of each hidden layer's units: a number, one for each "
            f"client, or the name of a client attribute; got {checks.shown(rate)}"
        )


def _check_clients(rate: Any, data: Any) -> None:
    """Refuse rates of another population, or an attribute with values that are no rates."""
    if isinstance(rate, str):
        if rate not in data.attrs:
            near = checks.nearest(rate, data.attrs)
            raise ValueError(f"clients have no attribute {rate!r}{near or f'; they have {sorted(data.attrs)}'}")
        values = data.attrs[rate]
        if not isinstance(values, Tracer):
            _check_rate(np.asarray(values), f"the client attribute {rate!r}:")


def _check_units(units: Units, variables: Variables, who: str) -> None:
    """Refuse a model without hidden units that may be left out."""
    if not units.sizes:
        names = [name for name, _ in checks.named_leaves(variables)]
        raise ValueError(
            f"{who} found no hidden units to leave out in {names}: give units=, a function (path, shape) -> "
            "the group of units that each axis counts"
        )


def _check_population(rate: Any, client: ClientData) -> None:
    population = getattr(client, "population", None)
    if not isinstance(rate, str) and np.ndim(rate) and population not in (None, np.shape(rate)[0]):
        raise ValueError(f"rates of {np.shape(rate)[0]} clients were given for a population of {population}")


def _check_round(round: Round, who: str, random: bool) -> None:
    if round.model is None or round.view is None or round.loss is None:
        raise ValueError(f"{who} sends parts of a model, but this Round trains none")
    if {"encoded", "summed"} & round.traits:
        raise ValueError(f"{who} cuts uploads to size, but this Round's are encoded already: put fl.uplink behind it")
    if {"sub_models", "pruned", "split"} & round.traits:
        raise ValueError(
            f"{who} needs a Round that sends one whole model, but this one sends a part of it (federated dropout, "
            "width slices, pruning, private leaves), which don't go together"
        )
    if {"partial", "many_models"} & round.traits:
        raise ValueError(f"{who} comes before transforms that multiply the model: put it first")
    if "personal" in round.traits:
        more = "; those that keep one from round to round (Ditto, APFL, coupling) go with width_slices() only"
        raise ValueError(
            f"{who} comes before transforms that give clients models of their own: put it first{more if random else ''}"
        )
    if "moves_alone" in round.traits:
        raise ValueError(f"{who} comes before rules by which clients keep their uploads to themselves: put it first")
    if round.aggregate.reduce is not None:
        raise ValueError(f"{who} averages each entry over who had it, but this Round's aggregator needs whole uploads")


def _one_change(upload: PyTree, units: Units, who: str) -> None:
    like: Any = units.like.shapes()
    if jax.tree.structure(upload) != jax.tree.structure(like):
        raise ValueError(
            f"{who} averages each entry over the clients that had it, for which their uploads must be one change of "
            "the model; this Round's hold something else (control variates, gradients), which has other means"
        )
