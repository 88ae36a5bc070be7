"""Packed lanes: a lane takes up the next client when it has done the last one's steps.

Chunks of clients walk in step, and each lasts as long as its largest client: with sizes by a power law a sixth of the
steps is waste. Packing has none of it, but must tell a turn's training loop from what comes before and after. All
clients begin before any of them trains, so that what they begin and end with is held for the whole cohort.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from fedjax_lab.program import flops

Values = list[Any]


class Parts(NamedTuple):
    """A traced turn around its training loop; lists of arrays go in and come out.

    Attributes:
      once: ``(shared) -> public``, what is the same for all clients.
      begin: ``(public, own) -> (facts, carry, kept)``: what the loop reads, what it starts from, and what is
        needed after it, of one client.
      goes_on: ``(public, facts, carry) -> bool[]``, whether there is another step to make.
      step: ``(public, facts, carry) -> carry``.
      finish: ``(public, kept, carry) -> outputs`` of the turn.
    """

    once: Callable[[Values], Values]
    begin: Callable[[Values, Values], tuple[Values, Values, Values]]
    goes_on: Callable[[Values, Values, Values], jax.Array]
    step: Callable[[Values, Values, Values], Values]
    finish: Callable[[Values, Values, Values], Values]


def in_parts(turn: Jaxpr, shared: Sequence[bool]) -> Parts | None:
    """The parts of a turn that has one loop of matrix products; ``None`` if it has none, or several.

    Args:
      turn: its program.
      shared: for each of its constants and inputs, whether all clients have the same.
    """
    loops = [eqn for eqn in turn.eqns if eqn.primitive.name == "while" and flops(eqn.params["body_jaxpr"].jaxpr)]
    if len(loops) != 1:
        return None
    loop, inputs = loops[0], [*turn.constvars, *turn.invars]
    given, mine = ([v for v, same in zip(inputs, shared, strict=True) if same == one] for one in (True, False))
    own, late = dict.fromkeys(mine), dict.fromkeys(loop.outvars)  # dictionaries keep an order: programs are compared
    once, before, after = [], [], []
    for eqn in turn.eqns:
        if eqn is loop:
            continue
        group, made = (after, late) if _reads(eqn, late) else (before, own) if _reads(eqn, own) else (once, {})
        group.append(eqn)
        made.update(dict.fromkeys(eqn.outvars))
    read = _variables(v for eqn in (*before, loop, *after) for v in eqn.invars) | _variables(turn.outvars)
    public = list(dict.fromkeys(given + [v for eqn in once for v in eqn.outvars if v in read]))
    wanted = _variables(v for eqn in after for v in eqn.invars) | _variables(turn.outvars)
    kept = [v for v in own if v in wanted]
    tests, steps = loop.params["cond_nconsts"], loop.params["body_nconsts"]
    facts, carry = loop.invars[: tests + steps], loop.invars[tests + steps :]
    varying = [v for v in _variables(facts) if v in own]
    begin = _piece(turn, before, public + mine, [*varying, *carry, *kept])

    def begun(public: Values, own: Values) -> tuple[Values, Values, Values]:
        out = begin(*public, *own)
        facts, carried = out[: len(varying)], out[len(varying) :]
        return facts, carried[: len(carry)], carried[len(carry) :]

    def facts_of(names: list, values: Values, own: Values) -> Values:
        known = dict(zip(public, values, strict=True)) | dict(zip(varying, own, strict=True))
        return [v.val if isinstance(v, Literal) else known[v] for v in names]

    def body(name: str, names: list) -> Callable[[Values, Values, Values], Values]:
        program = loop.params[name]
        return lambda public, own, carry: eval_jaxpr(
            program.jaxpr, program.consts, *facts_of(names, public, own), *carry
        )

    test, step = body("cond_jaxpr", facts[:tests]), body("body_jaxpr", facts[tests:])
    compute = _piece(turn, once, given, public)
    finish = _piece(turn, after, public + kept + loop.outvars, turn.outvars)
    return Parts(
        once=lambda shared: compute(*shared),
        begin=begun,
        goes_on=lambda public, own, carry: test(public, own, carry)[0],
        step=step,
        finish=lambda public, kept, carry: finish(*public, *kept, *carry),
    )


def train(parts: Parts, public: Values, facts: Values, carry: Values, lanes: int) -> Values:
    """Every client's training loop, ``lanes`` of them at a time; gives the last ``carry`` of each.

    Args:
      parts: of the turn.
      public: what is the same for all clients.
      facts: what each one's loop reads, ``[clients, ...]``.
      carry: what each one's loop starts from, ``[clients, ...]``, those with the most steps first.
      lanes: clients side by side.
    """
    clients = carry[0].shape[0]
    goes_on = jax.vmap(lambda facts, carry: parts.goes_on(public, facts, carry))
    step = jax.vmap(lambda facts, carry: parts.step(public, facts, carry))

    def choose(where: jax.Array, new: Values, old: Values) -> Values:
        pick = lambda a, b: jnp.where(where.reshape(-1, *[1] * (a.ndim - 1)), a, b)
        return list(map(pick, new, old))

    def take_up(state):
        carries, seat, waiting, mine, at = state
        free = (seat == clients) | ~goes_on(mine, at)
        put = jnp.where(free, seat, clients)
        carries = [whole.at[put].set(part, mode="drop") for whole, part in zip(carries, at, strict=True)]
        seat = jnp.where(free, jnp.minimum(waiting + jnp.cumsum(free) - 1, clients), seat)
        row = jnp.minimum(seat, clients - 1)
        mine = choose(free, [x[row] for x in facts], mine)
        at = choose(free, [x[row] for x in carries], at)
        taken = seat < clients

        def all_go_on(at):
            return jnp.any(taken) & jnp.all(goes_on(mine, at) | ~taken)

        at = jax.lax.while_loop(all_go_on, lambda at: choose(taken, step(mine, at), at), at)
        return carries, seat, jnp.minimum(waiting + jnp.sum(free), clients), mine, at

    nobody = jnp.full(lanes, clients)
    first = lambda values: [x[jnp.zeros(lanes, jnp.int32)] for x in values]
    state = (carry, nobody, jnp.zeros((), nobody.dtype), first(facts), first(carry))
    busy = lambda state: (state[2] < clients) | jnp.any(state[1] < clients)
    return jax.lax.while_loop(busy, take_up, state)[0]


def _piece(turn: Jaxpr, eqns: list[JaxprEqn], inputs: list, outputs: Sequence) -> Callable:
    """Some of a program's equations as a function of the values of ``inputs``."""
    unnamed = turn.debug_info._replace(arg_names=None, result_paths=None)
    piece = turn.replace(constvars=[], invars=inputs, outvars=list(outputs), eqns=eqns, debug_info=unnamed)
    return lambda *values: eval_jaxpr(piece, (), *values)


def _variables(atoms: Iterable) -> dict:
    return {v: None for v in atoms if not isinstance(v, Literal)}


def _reads(eqn: JaxprEqn, variables: dict) -> bool:
    return any(v in variables for v in _variables(eqn.invars))
