"""Round: what one round of a federated computation does, as pure functions.

Nothing here knows how many clients run at once, on which device, or when. A Process (``synchronous``,
``asynchronous``, ...) drives a Round; a transform makes a Round from a Round.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.client import ClientData
from fedjax_lab.models.base import Variables

PyTree = Any
ServerState = PyTree
ClientState = PyTree
Message = PyTree
Upload = PyTree
Aggregate = PyTree

# (params, (model_state, batch, mask), key) -> (grads, (loss, model_state)); loss is a mean over the mask.
Oracle = Callable[[PyTree, tuple[PyTree, PyTree, jax.Array], jax.Array], tuple[PyTree, tuple[jax.Array, PyTree]]]
# A change of the local objective: prox terms, control variates, frozen leaves, MAML's objective.
Tilt = Callable[[Oracle], Oracle]


def identity(x):
    """The tilt that changes nothing."""
    return x


class Env(NamedTuple):
    """The public facts of a round, which every client may know.

    Attributes:
      round: ``int32[]``, from 0.
      key: a PRNG key shared by server and clients (random-k's indices, sketches' hashes).
      ids: ``int32[cohort]``, positions in the population; ``population`` in an empty slot.
      invited: ``bool[cohort]``, slots that hold a client. Invited clients cost downlink.
      present: ``bool[cohort]``, the invited who can answer.
      population: number of clients in all.
      survivors: ``int32[]``, the present; once uploads are being aggregated, those whose upload counts.
    """

    round: Any
    key: Any
    ids: Any
    invited: Any
    present: Any
    population: Any
    survivors: Any


class Trained(NamedTuple):
    """What a local run did. It never travels; transforms such as control variates read it.

    Attributes:
      start: Variables it began with.
      variables: Variables it ended with.
      steps: ``int32[]``, local steps made.
      loss: ``float32[]``, mean training loss over the examples it saw, while it moved.
      opt_state: the client optimizer's last state.
    """

    start: Variables
    variables: Variables
    steps: jax.Array
    loss: jax.Array
    opt_state: PyTree = ()


class ClientOutput(NamedTuple):
    """What a client's computation gives.

    Attributes:
      upload: pytree of arrays that travels.
      weight: ``float32[]``, its weight in a weighted mean; a client of weight 0 counts for nothing.
      state: the client's next state.
      sent: ``bool[]``; a client may keep its upload to itself (selective upload).
      bytes_up: ``uint32[]``, length of the upload on the wire; ``None``: the size of its arrays that travel.
      metrics: scalars, reported as means over the survivors, by weight.
      trained: see :class:`Trained`; ``None`` when nothing was trained.
      parts: which parts of the upload travel, ``bool[]`` for each: a pytree with the upload's structure, or the outer
        part of it. The others must be zeros: they cost nothing, and links send nothing for them. ``None``: all travel.
    """

    upload: Upload
    weight: Any
    state: ClientState = ()
    sent: Any = True
    bytes_up: Any = None
    metrics: dict[str, jax.Array] = {}  # noqa: RUF012 - never mutated
    trained: Trained | None = None
    parts: PyTree = None


class Lens(NamedTuple):
    """How to read and replace Variables inside a larger state or message.

    Attributes:
      get: ``(whole) -> Variables``.
      set: ``(whole, Variables) -> whole``.
    """

    get: Callable[[PyTree], Variables]
    set: Callable[[PyTree, Variables], PyTree]


def through(outer: Callable[[PyTree], PyTree], put: Callable[[PyTree, PyTree], PyTree], lens: Lens) -> Lens:
    """The lens into ``outer(whole)``, which ``put(whole, part)`` replaces; for transforms that nest states."""
    return Lens(
        get=lambda whole: lens.get(outer(whole)),
        set=lambda whole, variables: put(whole, lens.set(outer(whole), variables)),
    )


class Aggregator(NamedTuple):
    """How uploads become one aggregate: a mean of some kind.

    A sum is the mean times the number of survivors, so that gossip and staleness can't change its scale.

    Attributes:
      lift: ``(upload, weight, Message, Env) -> (value, denominators)``, on the client. Values and
        denominators are added up over the clients.
      finish: ``((value, denominators), Env) -> Aggregate``, on the sums.
      reduce: ``None`` if sums are all it needs (nothing is kept per client then), otherwise
        ``(uploads, weights, ok, Messages, Env) -> Aggregate`` over stacked ``[cohort, ...]`` arrays
        (median, Krum, coded computation), in which the entries that are not ``ok`` are zeros.
    """

    lift: Callable[[Upload, jax.Array, Message, Env], tuple[PyTree, PyTree]]
    finish: Callable[[tuple[PyTree, PyTree], Env], Aggregate]
    reduce: Callable[[Upload, jax.Array, jax.Array, Message, Env], Aggregate] | None = None


class ClientUpdate(Protocol):
    def __call__(
        self,
        message: Message,
        state: ClientState,
        client: ClientData,
        key: jax.Array,
        tilt: Tilt = ...,
    ) -> ClientOutput: ...


class LocalTraining(Protocol):
    def __call__(
        self,
        start: Variables,
        client: ClientData,
        key: jax.Array,
        tilt: Tilt = ...,
        opt_state: PyTree = ...,
    ) -> Trained: ...


class Round(NamedTuple):
    """One round of federated learning, analytics or evaluation.

    Attributes:
      init: ``(key, data, params=None) -> ServerState``; params default to the model's initialisation.
      client_update: ``(Message, ClientState, ClientData, key, tilt=identity) -> ClientOutput``.
      aggregate: an :class:`Aggregator`.
      server_update: ``(ServerState, Aggregate, key) -> (ServerState, metrics)``; skipped when nobody
        survived.
      init_client: ``(ServerState, ClientData) -> ClientState``, at a client's first contact; ``()`` when
        clients keep nothing.
      broadcast: ``(ServerState, ClientState, client, key) -> Message``; may differ by client. By default
        the whole server state.
      personalize: ``(Message, ClientState, ClientData, key) -> Variables``, the model that this client
        would use.
      local: :class:`LocalTraining`, for transforms to reuse.
      loss: the model's per-example loss, for transforms, samplers and evaluation to reuse.
      metrics: the model's per-example metrics.
      model: lens ServerState <-> Variables.
      view: lens Message <-> Variables.
      traits: what transforms must know to compose or to refuse.
    """

    init: Callable[..., ServerState]
    client_update: ClientUpdate
    aggregate: Aggregator
    server_update: Callable[[ServerState, Aggregate, jax.Array], tuple[ServerState, dict]]
    init_client: Callable[[ServerState, ClientData], ClientState] = lambda server, client: ()
    broadcast: Callable[[ServerState, ClientState, ClientData, jax.Array], Message] = (
        lambda server, state, client, key: server
    )
    personalize: Callable[[Message, ClientState, ClientData, jax.Array], Variables] | None = None
    local: LocalTraining | None = None
    loss: Callable | None = None
    metrics: Callable | None = None
    model: Lens | None = None
    view: Lens | None = None
    traits: frozenset[str] = frozenset()


Transform = Callable[[Round], Round]


def compose(round: Round, *transforms: Transform) -> Round:
    """Apply transforms in reading order: ``compose(r, f, g)`` is ``g(f(r))``.

    Raises:
      ValueError: the first argument is no Round, or another one no transform.
    """
    if not isinstance(round, Round):
        raise ValueError(f"compose(round, *transforms) takes a Round first; got {checks.shown(round)}")
    for number, transform in enumerate(transforms, 1):
        made = transform(round) if callable(transform) else None
        if not isinstance(made, Round):
            raise ValueError(
                f"transform {number} of compose(round, *transforms) gives no Round: {checks.shown(transform)}. "
                "A transform is made by calling, such as fl.transforms.proximal(mu=0.1)"
            )
        round = made
    return round


@dataclasses.dataclass(frozen=True)
class Tilts:
    """A tilt made of others: ``changes`` of the objective, in order, then ``projections``."""

    changes: tuple[Tilt, ...]
    projections: tuple[Tilt, ...] = ()

    def __call__(self, oracle: Oracle) -> Oracle:
        for each in (*self.changes, *self.projections):
            oracle = each(oracle)
        return oracle


def chain_tilts(*tilts: Tilt) -> Tilt:
    """Apply tilts in reading order, the last is outermost; but a :func:`projection` goes behind all that are none.

    What corrects gradients towards the others' (control variates) belongs behind the tilts of transforms further
    out: these change the objective, whose gradient it is that is corrected.
    """
    parts = [tilt if isinstance(tilt, Tilts) else Tilts((tilt,)) for tilt in tilts]
    return Tilts(sum((part.changes for part in parts), ()), sum((part.projections for part in parts), ()))


def projection(tilt: Tilt) -> Tilt:
    """A tilt that says what may move at all, whatever the gradient: held leaves, entries that aren't there."""
    return Tilts((), (tilt,))


def shift(correction: Callable[[PyTree], PyTree]) -> Tilt:
    """The tilt that adds ``correction(params)`` to every gradient (prox terms, control variates)."""

    def tilt(oracle: Oracle) -> Oracle:
        def tilted(params, inputs, key):
            grads, aux = oracle(params, inputs, key)
            return jax.tree.map(lambda g, c: g + c.astype(g.dtype), grads, correction(params)), aux

        return tilted

    return tilt


def proximal(mu: Any, center: PyTree) -> Tilt:
    """The tilt that adds ``mu/2 ||w - center||^2`` to the objective. Exactly nothing for ``mu = 0``."""
    return shift(lambda params: jax.tree.map(lambda w, c: mu * (w - c), params, center))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sent:
    """A message as its receiver holds it, which took ``length`` bytes on the wire (``fl.downlink``)."""

    content: PyTree
    length: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sometimes:
    """A part of a message that travels, and takes bytes, only if ``there: bool[]``, as both sides know."""

    content: PyTree
    there: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verbatim:
    """A part of a message that arrives as it is, whatever ``fl.downlink`` does to the rest, in ``length`` bytes."""

    content: PyTree
    length: Any


def marked(tree: PyTree, parts: PyTree) -> PyTree:
    """``tree`` with :class:`Sometimes` around what ``parts`` has a truth value for (``ClientOutput.parts``).

    Raises:
      ValueError: ``parts`` has another structure.
    """
    try:
        return tree if parts is None else jax.tree.map(lambda there, x: Sometimes(x, there), parts, tree)
    except ValueError as error:
        raise ValueError(
            "ClientOutput.parts must have the structure of the upload, or the outer part of it: whatever changes "
            f"the one must change the other ({error})"
        ) from error


def unmarked(tree: PyTree) -> PyTree:
    """The same without :class:`Sometimes`, all of their contents in place."""
    is_part = lambda x: isinstance(x, Sometimes)
    return jax.tree.map(lambda x: x.content if is_part(x) else x, tree, is_leaf=is_part)


def travelling(tree: PyTree, parts: PyTree) -> PyTree:
    """``tree`` with zeros in those parts that don't travel (``ClientOutput.parts``)."""
    zero_unless = lambda there, part: jax.tree.map(lambda x: jnp.where(there, x, jnp.zeros_like(x)), part)
    return tree if parts is None else jax.tree.map(zero_unless, parts, tree)


def upload_bytes(output: ClientOutput) -> Any:
    """The length of a client's upload on the wire, an integer or ``uint32[]``."""
    return nbytes(marked(output.upload, output.parts)) if output.bytes_up is None else output.bytes_up


def nbytes(tree: PyTree) -> Any:
    """Bytes of a pytree's arrays on the wire, each in its true width; PRNG keys by their data.

    An integer; ``uint32[]`` if there is something in it whose length depends on the data (:class:`Sent`, parts of a
    link's payload) or that may not travel (:class:`Sometimes`).
    """
    special = (Sent, Sometimes, Verbatim)

    def size(leaf) -> Any:
        if hasattr(leaf, "wire_bytes"):  # see fedjax_lab.wire.payload
            return leaf.wire_bytes()
        if isinstance(leaf, Sent | Verbatim):
            return jnp.sum(leaf.length, dtype=jnp.uint32) if jnp.ndim(leaf.length) else leaf.length  # several, stacked
        if isinstance(leaf, Sometimes):
            there = jnp.asarray(leaf.there)  # several where messages are stacked, and so are their contents
            return (jnp.sum(there) * (nbytes(leaf.content) // there.size)).astype(jnp.uint32)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        bits = jnp.iinfo(leaf.dtype).bits if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf.dtype.itemsize * 8
        return -(-leaf.size * bits // 8)

    return sum(
        size(jnp.asarray(leaf) if isinstance(leaf, int | float | bool) else leaf)
        for leaf in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, special) or hasattr(x, "wire_bytes"))
    )
