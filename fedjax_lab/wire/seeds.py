"""A seed of a client's own, for links whose randomness must differ from client to client."""

import jax
import jax.numpy as jnp

from fedjax_lab.wire.base import Ctx, Wire, as_opened, stateless, undo
from fedjax_lab.wire.payload import length


def own_seed(link: Wire) -> Wire:
    """The link with a random seed of each client's own in place of the round's public key.

    The seed travels (4 bytes). Clients' errors are independent then and average out, but each payload must be
    undone by itself.

    Raises:
      ValueError: a link that keeps a state on the server or must be summed.
    """
    if link.must_sum or link.collective or link.init is not stateless:
        raise ValueError(f"{link.name} works on sums, which clients' own seeds rule out: use it without own_seed")

    def public(ctx: Ctx, seed: jax.Array) -> Ctx:
        return ctx._replace(public=jax.random.key(seed))

    def encode(x, state, ctx):
        seed = jax.random.bits(ctx.private, (), jnp.uint32)
        private = jax.random.fold_in(ctx.private, 1)
        code, state, _ = link.encode(x, state, public(ctx, seed)._replace(private=private))
        payload = {"code": code, "seed": seed}
        return payload, state, length(payload)

    def open_(payload, ctx):
        return undo(link, payload["code"], public(ctx, payload["seed"]))

    return Wire(
        encode,
        open=open_,
        decode=as_opened,
        init_client=link.init_client,
        varies=link.varies,
        coded=link.coded,
        bound=link.bound,
        gain=link.gain,
        name=f"own_seed({link.name})",
    )
