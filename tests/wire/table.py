"""One table of links, which the laws of links go through. A new link joins here."""

import functools

import jax
import jax.numpy as jnp

from fedjax_lab import wire
from fedjax_lab.wire.base import shapes

SIZE = 40 * 30 + 7  # float entries of TREE


def tree(seed: int = 0):
    """A pytree with a matrix, a vector and a counter, as uploads have them."""
    a, b = jax.random.split(jax.random.key(seed))
    return {"w": jax.random.normal(a, (40, 30)), "b": jax.random.normal(b, (7,)), "n": jnp.arange(3, dtype=jnp.int32)}


LOSSLESS = {
    "identity": wire.identity(),
    "top_k of all": wire.top_k(SIZE),
    "hadamard": wire.hadamard(),
    "kashin": wire.kashin(),
    "dense_rotation": wire.grouped(wire.dense_rotation(), size=64),
    "clip of nothing": wire.clip(1e6),
    "grouped hadamard": wire.grouped(wire.hadamard(), count=3),
}
UNBIASED = {
    "random_k": wire.random_k(0.25),
    "rand_mask": wire.rand_mask(0.25),
    "quantize stochastic": wire.quantize(3, stochastic=True),
    "qsgd": wire.qsgd(4),
    "qsgd max": wire.qsgd(2, norm="max"),
    "natural": wire.natural(),
    "terngrad": wire.terngrad(),
    "eden 1": wire.eden(1),
    "eden 2": wire.eden(2),
    "drive": wire.drive(),
    "count_mean_sketch": wire.count_mean_sketch(3, width=20),
    "qsgd in buckets": wire.grouped(wire.qsgd(3), size=16),
    "rotated": wire.chain(wire.hadamard(), wire.quantize(2, stochastic=True)),
    "sparse and quantized": wire.chain(wire.random_k(0.5), wire.qsgd(4)),
    "fixed_point": wire.fixed_point(12, limit=8.0, clients=20),
}
BIASED = {
    "top_k": wire.top_k(0.1),
    "top_k as bitmap": wire.top_k(0.5),
    "random_k plain": wire.random_k(0.1, unbiased=False),
    "threshold": wire.threshold(1.0),
    "quantize": wire.quantize(5),
    "sign": wire.sign(),
    "sign of fixed size": wire.sign(0.1),
    "majority_vote": wire.majority_vote(0.1),
    "one_bit": wire.one_bit(),
    "terngrad clipped": wire.terngrad(2.5),
    "lloyd_max": wire.lloyd_max(5, scale="least_squares"),
    "drive of least error": wire.drive(unbiased=False),
    "low_rank": wire.low_rank(3),
    "low_rank by iteration": wire.low_rank(3, iterations=2),
    "factorize": wire.factorize(3),
    "power_sgd": wire.power_sgd(3),
    "count_sketch": wire.count_sketch(5, width=100),
    "fetch_sgd": wire.fetch_sgd(3, width=100, k=20),
    "error_feedback": wire.error_feedback(wire.top_k(0.1)),
    "ef21": wire.error_feedback(wire.top_k(0.1), "ef21"),
    "momentum_correction": wire.momentum_correction(wire.top_k(0.1)),
    "by parameter": wire.grouped(wire.top_k(0.2)),
    "split": wire.split({"w": wire.top_k(0.1)}, wire.sign()),
    "chain": wire.chain(wire.error_feedback(wire.top_k(0.05)), wire.quantize(8)),
    "long chain": wire.chain(wire.hadamard(), wire.random_k(0.5), wire.quantize(4)),
    "golomb": wire.chain(wire.top_k(0.05), wire.golomb()),
    "golomb of a bitmap": wire.chain(wire.top_k(0.3), wire.qsgd(4), wire.golomb()),
    "elias gamma": wire.chain(wire.qsgd(3), wire.elias("gamma")),
    "elias delta": wire.chain(wire.terngrad(), wire.elias("delta", runs=True)),
    "elias omega": wire.chain(wire.qsgd(levels=1), wire.elias(runs=True)),
    "golomb in blocks": wire.grouped(wire.chain(wire.top_k(0.1), wire.golomb()), size=200),
    "clip": wire.clip(1.0),
    "noise of clients": wire.chain(wire.clip(1.0), wire.gaussian(0.1, by="client")),
    "noise of the server": wire.chain(wire.clip(1.0), wire.random_k(0.5), wire.gaussian(0.1)),
    "noise in shares": wire.chain(
        wire.clip(1.0), wire.gaussian(0.1, by="client", shares=4), wire.fixed_point(limit=5.0, clients=4)
    ),
}
LINKS = LOSSLESS | UNBIASED | BIASED


@functools.cache
def compiled(name: str):
    """``(encode, undo)`` of a link for inputs as ``tree()``: ``(x, own, server, key) -> (payload, own, bytes)``, ..."""
    link = LINKS[name]

    def encode(x, own, server, key):
        payload, own, size = link.encode(x, own, context(key, link.sends(server)))
        return payload, own, jnp.asarray(size, jnp.uint32)

    return jax.jit(encode), jax.jit(lambda payload, server, key: wire.undo(link, payload, context(key, server)))


def context(key, state):
    public, private = jax.random.split(key)
    return wire.Ctx(public, private, state, (), jnp.int32(0))


def states(name: str):
    """The first states of a client and of the server."""
    like = shapes(tree())
    return LINKS[name].init_client(like), LINKS[name].init(like)
