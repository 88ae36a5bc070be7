"""Selective upload: a client sends its update only if a rule says that it is worth it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.aggregators import within
from fedjax_lab.local import client_weight
from fedjax_lab.models.base import add, difference
from fedjax_lab.nesting import first_turn
from fedjax_lab.population import mean_weight, population_mean
from fedjax_lab.round import Aggregator, Lens, Round, Sent, Transform, identity, nbytes, through
from fedjax_lab.transforms import memories
from fedjax_lab.transforms.uplink import is_mean_of_everything
from fedjax_lab.turn import select
from fedjax_lab.wire.base import Like

PyTree = Any
INSTEAD = ("nothing", "stale")


class Rule(NamedTuple):
    """What decides whether a client sends.

    Attributes:
      decide: ``(known, Seen) -> bool[]``: whether this client's upload is worth sending; on the client.
      asks: ``(known, Seen) -> bool[]`` of a rule that the server applies before anything is sent: a client that isn't
        asked gets no model and does nothing. ``Seen`` has no ``out`` then.
      init: ``(params) -> `` what the server remembers; ``()`` if nothing.
      renew: ``(memory, old params, new params) -> memory``, once a round.
      tells: ``(memory) -> known``, what travels with each message.
      keeps: whether it compares with the client's last upload (``Seen.last``).
      remembers: whether it compares with the model that the client sent from (``Seen.sent_from``).
      name: for messages.
    """

    decide: Callable[[Any, "Seen"], jax.Array]
    asks: Callable[[Any, "Seen"], jax.Array] | None = None
    init: Callable[[PyTree], Any] = lambda params: ()
    renew: Callable[[Any, PyTree, PyTree], Any] = lambda memory, old, new: memory
    tells: Callable[[Any], Any] = lambda memory: memory
    keeps: bool = False
    remembers: bool = False
    name: str = "selective()"


class Seen(NamedTuple):
    """What a rule may look at.

    Attributes:
      out: the client's output, ``None`` while the server decides whom to ask.
      params: of the model that was broadcast.
      last: the client's last upload that was sent, zeros before; ``()`` unless the rule keeps it.
      sent_from: the parameters that it was made from; ``()`` unless the rule remembers them.
      met: whether there is a last upload.
      share: the client's weight over the population's mean weight.
      client: its data.
      round: the inner Round.
      key: the client's own PRNG key, ``None`` on the server.
    """

    out: Any
    params: PyTree
    last: PyTree
    sent_from: PyTree
    met: Any
    share: Any
    client: Any
    round: Round
    key: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelectiveServer:
    """The inner server's state, the rule's ``memory``, the ``mean`` of stale uploads, the population's mean weight.

    ``like`` is what an upload looks like, where clients keep one.
    """

    inner: Any
    memory: Any
    mean: Any
    mean_weight: jax.Array
    like: Like | None = dataclasses.field(default=None, metadata={"static": True})


class SelectiveClient(NamedTuple):
    """The inner state; the ``last`` upload sent, the parameters it was made from, and whether there is one."""

    inner: Any
    last: Any
    sent_from: Any
    met: jax.Array


class SelectiveMessage(NamedTuple):
    """The inner message, what the rule tells, and the population's mean weight if needed.

    ``inner`` is a :class:`fedjax_lab.round.Sent` of no length for a client that the server doesn't ask.
    """

    inner: Any
    known: Any
    mean_weight: Any
    asked: Any


class Selection(NamedTuple):
    """Which clients send, and what counts for those that don't: the arguments of :func:`selective`."""

    rule: Rule
    instead: str
    weighting: Any

    @property
    def stale(self) -> bool:
        """Whether clients that don't send count with what they sent last."""
        return self.instead == "stale"

    @property
    def kept(self) -> bool:
        """Whether a client keeps its last upload."""
        return self.stale or self.rule.keeps

    @property
    def traits(self) -> set[str]:
        """What a Round has more by it."""
        return {"moves_alone"} | ({"changes"} if self.stale else set()) | ({"in_step"} if self.rule.asks else set())

    def opened(self, message: SelectiveMessage) -> PyTree:
        """The inner message."""
        return message.inner.content if self.rule.asks else message.inner

    def put(self, message: SelectiveMessage, part: PyTree) -> SelectiveMessage:
        """The message with another inner one."""
        inner = Sent(part, message.inner.length) if self.rule.asks else part
        return message._replace(inner=inner)


def selective(rule: Rule, *, instead: str = "nothing", weighting: Any = "examples") -> Transform:
    """Send an upload only if a rule says so.

    A client that keeps its upload to itself sends nothing, counts as absent in the means of a round, and keeps its
    state, as if it had not taken part. The server's rule and its step go on in a round in which nobody sends.

    Args:
      rule: see :func:`lag_wk`, :func:`lag_ps`, :func:`cmfl`, :func:`local_accuracy`, or your own.
      instead: what the server uses for a client that doesn't send. ``"nothing"``: the mean is over those that do.
        ``"stale"``: what it sent last. Clients then send how their upload changed since, and the server's mean is
        over the whole population, those that never sent counting as zero. Kept per client: an upload. A lossy
        ``uplink`` behind it needs error feedback, or what it loses adds up.
      weighting: of the inner round.

    Raises:
      ValueError: another word; for stale values a Round whose aggregate isn't one mean of whole uploads, or whose
        uploads are encoded already.
    """
    if instead not in INSTEAD:
        raise ValueError(f"instead must be one of {INSTEAD}{checks.nearest(str(instead), INSTEAD)}; got {instead!r}")
    checks.weighting(weighting)
    chosen = Selection(rule, instead, weighting)
    stale, kept, opened = chosen.stale, chosen.kept, chosen.opened

    def transform(round: Round) -> Round:
        model, view = _lenses(chosen, round)

        def init_client(server, client):
            inner = round.init_client(server.inner, client)
            last = _zeros(server.like.shapes()) if kept else ()
            now = model.get(server.inner).params if rule.remembers else ()
            return SelectiveClient(inner, last, now, jnp.bool_(False))

        def seen(out, params, state, share, client, key=None):
            return Seen(out, params, state.last, state.sent_from, state.met, share, client, round, key)

        def broadcast(server, state, client, key):
            message = round.broadcast(server.inner, state.inner, client, key)
            known = rule.tells(server.memory)
            if rule.asks is None:
                return SelectiveMessage(message, known, server.mean_weight, jnp.bool_(True))
            params, weight = view.get(message).params, client_weight(weighting, client)
            asked = ~state.met | rule.asks(known, seen(None, params, state, weight / server.mean_weight, client))
            sent = Sent(message, jnp.where(asked, nbytes(message), 0).astype(jnp.uint32))
            return SelectiveMessage(sent, (), (), asked)

        def client_update(message, state, client, key, tilt=identity):
            out = round.client_update(opened(message), state.inner, client, key, tilt=tilt)
            params, weight = view.get(opened(message)).params, jnp.asarray(out.weight, jnp.float32)
            if rule.asks is None:
                looked = seen(out, params, state, weight / message.mean_weight, client, key)
                sends = rule.decide(message.known, looked)
            else:
                sends = message.asked
            sends = sends & jnp.asarray(out.sent, bool) & (weight > 0)
            upload = difference(out.upload, state.last) if stale else out.upload
            new = SelectiveClient(
                out.state, out.upload if kept else (), params if rule.remembers else (), jnp.bool_(True)
            )
            return out._replace(upload=upload, sent=sends, state=select(sends, new, state))

        inner_mean = within(round.aggregate, opened)
        aggregate = _heard(population_mean() if stale else inner_mean)

        personal = round.personalize
        return round._replace(
            init=lambda key, data, params=None: _begin(chosen, round, data, round.init(key, data, params)),
            init_client=init_client,
            broadcast=broadcast,
            client_update=client_update,
            aggregate=aggregate,
            server_update=lambda server, aggregate, key: _step(chosen, round, server, aggregate, key),
            personalize=personal and (lambda m, s, client, key: personal(opened(m), s.inner, client, key)),
            model=through(lambda server: server.inner, lambda s, part: dataclasses.replace(s, inner=part), model),
            view=through(opened, chosen.put, view),
            traits=round.traits | chosen.traits,
        )

    return transform


def _lenses(chosen: Selection, round: Round) -> tuple[Lens, Lens]:
    """Into the server's state and into messages. Raises ValueError for a Round that the rule doesn't go with."""
    rule, model, view = chosen.rule, round.model, round.view
    if model is None or view is None:
        raise ValueError(f"{rule.name} looks at the model that is trained, but this Round sends none")
    if {"partial", "many_models"} & round.traits:
        raise ValueError(f"{rule.name} comes before transforms that split or multiply the model: put it first")
    if chosen.kept and "encoded" in round.traits:
        raise ValueError(f"{rule.name} compares uploads with earlier ones: put it before fl.uplink, not behind")
    if chosen.kept or rule.remembers:
        memories.of_units(round, rule.name)
    return model, view


def _begin(chosen: Selection, round: Round, data: Any, server: PyTree) -> SelectiveServer:
    """The server's state around the inner one, before anybody has sent anything."""
    rule = chosen.rule
    memory, weight = rule.init(round.model.get(server).params), mean_weight(chosen.weighting, data)
    if not chosen.kept:
        return SelectiveServer(server, memory, (), weight)
    found = jax.eval_shape(lambda s, d: _example(round, s, d), server, data)
    if chosen.stale:
        _check_mean(round, rule, found)
    return SelectiveServer(server, memory, _zeros(found[0]) if chosen.stale else (), weight, Like.of(found[0]))


def _step(chosen: Selection, round: Round, server: SelectiveServer, aggregate: tuple, key: jax.Array):
    """The server after a round in which perhaps nobody sent, and its metrics."""
    model = round.model
    found, anyone = aggregate
    mean = server.mean
    if chosen.stale:
        mean = add(mean, jax.tree.map(lambda x: x / server.mean_weight, found))
        found = mean
    inner, metrics = round.server_update(server.inner, found, key)
    if not chosen.stale:
        inner = select(anyone, inner, server.inner)
    memory = chosen.rule.renew(server.memory, model.get(server.inner).params, model.get(inner).params)
    return dataclasses.replace(server, inner=inner, memory=memory, mean=mean), metrics


def _heard(aggregator: Aggregator) -> Aggregator:
    """The aggregate, and whether anybody's upload is in it."""

    def finish(sums, env):
        return aggregator.finish(sums, env), env.survivors > 0

    inner = aggregator.reduce
    if inner is None:
        return Aggregator(aggregator.lift, finish)
    return Aggregator(
        aggregator.lift, finish, lambda uploads, weights, ok, *rest: (inner(uploads, weights, ok, *rest), jnp.any(ok))
    )


def _check_mean(round: Round, rule: Rule, like: tuple) -> None:
    upload, weight, message, env = like
    if not is_mean_of_everything(round.aggregate, upload, weight, message, env):
        raise ValueError(
            f"{rule.name} with stale values needs a Round whose aggregate is one mean of whole uploads (FedAvg's kin), "
            'and this one treats parts of an upload differently: use instead="nothing"'
        )


def _zeros(like: PyTree) -> PyTree:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like)


def _example(round: Round, server: PyTree, data: Any) -> tuple:
    """One client's ``(upload, weight, message, env)``; for their shapes alone."""
    out, message, env = first_turn(round, server, data)
    # In the type that the difference of two uploads has.
    return difference(out.upload, out.upload), jnp.asarray(out.weight, jnp.float32), message, env
