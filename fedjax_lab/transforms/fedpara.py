"""FedPara: kernels as the entrywise product of two low-rank ones, so that fewer numbers travel at full rank."""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.models.base import Model, reparametrized
from fedjax_lab.transforms.mixture import Components

PyTree = Any


class Factors(NamedTuple):
    """A kernel's factors.

    Attributes:
      x1, x2: ``[inputs, r]``.
      y1, y2: ``[outputs, r]``.
      t1, t2: of convolutions, ``[*window, r, r]``; else ``()``.
    """

    x1: jax.Array
    y1: jax.Array
    t1: Any
    x2: jax.Array
    y2: jax.Array
    t2: Any


def fedpara(
    model: Model,
    gamma: Any = 0.1,
    *,
    rank: int | None = None,
    predicate: Callable[[str], bool] | None = None,
    personal: bool = False,
) -> Model:
    """The model with kernels ``W = (X1 Y1') * (X2 Y2')``, entry by entry (FedPara, Hyeon-Woo, Ye-Bin and Oh, ICLR 2022,
    section 2).

    Two products of rank ``r`` give ranks up to ``r^2`` (proposition 1) with ``2 r (m + n)`` numbers in place of
    ``m n``. Convolutions have ``W = (T1 x X1 x Y1) * (T2 x X2 x Y2)``, with ``2 r (I + O + r h w)`` numbers in place
    of ``h w I O`` (proposition 3). Any Round of this model sends factors only; evaluation and everything else see
    the model as it was. Factors start so that kernels have the variance of the model's own initialisation.

    Args:
      model: any model; its kernels are the parameters of two axes ``[inputs, outputs]`` or more ``[*window, inputs,
        outputs]``, as Flax has them.
      gamma: where the rank lies between the least that can be of full rank, ``ceil(sqrt(min(m, n)))`` (corollary 1),
        and the largest that isn't longer than the kernel. Kernels that wouldn't get shorter stay as they are.
      rank: the rank itself instead, the same for all.
      predicate: of the paths of kernels to factorize, such as ``hidden_0/kernel``; by default all of them.
      personal: pFedPara's ``W = (X1 Y1') * (X2 Y2' + 1)`` (section 2.3): ``private(personal_factors)`` keeps the second
        half with each client. It starts at zero, so that all clients begin with the same kernel.

    Raises:
      ValueError: gamma outside 0..1; a rank below 1 or above a kernel's; a predicate that names no kernel, the latter
        two when the process is built.
    """
    checks.model(model)
    checks.probability(gamma, "gamma")
    if not isinstance(gamma, int | float):
        raise ValueError(f"gamma decides on shapes and must be a Python number; got {checks.shown(gamma)}")
    if rank is not None:
        checks.integer(rank, "rank", 1)

    def factorized(made, key):
        params, model_state = made
        if isinstance(params, Components):
            raise ValueError("fedpara() factorizes one model's kernels: write with_components(fedpara(model), M)")
        ranks = _ranks(params, gamma, rank, predicate)

        def one(path, kernel):
            name = checks.path_name(path)
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            return _start(kernel, ranks[name], personal, own) if name in ranks else kernel

        return jax.tree_util.tree_map_with_path(one, params), model_state

    return reparametrized(model, factorized, lambda params: composed(params, personal))


def composed(params: PyTree, personal: bool = False) -> PyTree:
    """The parameters with kernels in place of their factors."""
    is_factors = lambda x: isinstance(x, Factors)
    return jax.tree.map(lambda x: kernel_of(x, personal) if is_factors(x) else x, params, is_leaf=is_factors)


def kernel_of(factors: Factors, personal: bool = False) -> jax.Array:
    """The kernel that factors stand for, ``[inputs, outputs]`` or ``[*window, inputs, outputs]``."""

    def half(x, y, t):
        return x @ y.T if isinstance(t, tuple) else jnp.einsum("...rs,ir,os->...io", t, x, y)

    first = half(factors.x1, factors.y1, factors.t1)
    second = half(factors.x2, factors.y2, factors.t2)
    return first * (second + 1 if personal else second)


def personal_factors(path: str) -> bool:
    """The predicate of pFedPara's private half, for :func:`fedjax_lab.transforms.private`."""
    return path.rsplit("/", 1)[-1] in ("x2", "y2", "t2")


def rank_of(shape: tuple[int, ...], gamma: float) -> int | None:
    """The paper's rank of a kernel of this shape, or ``None`` where factors wouldn't be shorter."""
    least = math.ceil(math.sqrt(min(shape[-2:])))
    most = max((r for r in range(1, min(shape[-2:]) + 1) if _length(shape, r) <= math.prod(shape)), default=0)
    rank = int((1 - gamma) * least + gamma * max(most, least))
    return rank if _length(shape, rank) < math.prod(shape) else None


def _length(shape: tuple[int, ...], rank: int) -> int:
    """Numbers in a kernel's factors."""
    *window, inputs, outputs = shape
    return 2 * rank * (inputs + outputs + (rank * math.prod(window) if window else 0))


def _ranks(params: PyTree, gamma: float, rank: int | None, predicate) -> dict[str, int]:
    """The rank of each kernel that is factorized, by its path."""
    kernels = {
        name: jnp.shape(leaf)
        for name, leaf in checks.named_leaves(params)
        if jnp.ndim(leaf) >= 2 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    }
    chosen = {name: shape for name, shape in kernels.items() if predicate is None or predicate(name)}
    if not chosen:
        raise ValueError(f"fedpara() finds no kernel to factorize: predicate= names none of {list(kernels)}")
    for name, shape in chosen.items():
        if rank is not None and rank > min(shape[-2:]):
            raise ValueError(
                f"rank {rank} is above that of {name}, {min(shape[-2:])} of {list(shape)}: give a smaller one, or a "
                "predicate= that leaves this kernel as it is"
            )
    ranks = {name: rank_of(shape, gamma) if rank is None else rank for name, shape in chosen.items()}
    found = {name: r for name, r in ranks.items() if r is not None}
    if not found:
        raise ValueError(f"fedpara() would make none of the kernels shorter: {chosen}. Give a rank=")
    return found


def _start(kernel: jax.Array, rank: int, personal: bool, key: jax.Array) -> Factors:
    """Normal factors whose kernel has the given one's variance; of a kernel of zeros one that is zero, too."""
    *window, inputs, outputs = kernel.shape
    spread = jnp.mean(jnp.square(kernel.astype(jnp.float32)))
    zero = spread == 0
    spread = jnp.where(zero, 1 / inputs, spread)
    halves = 1 if personal else 2
    terms = rank**2 if window else rank
    # A half's variance is that of `terms` products of two factors, or three; the kernel's is the product of halves.
    size = (spread ** (1 / halves) / terms) ** (1 / (6 if window else 4))
    draw = lambda i, *shape: size * jax.random.normal(jax.random.fold_in(key, i), shape)
    core = lambda i: draw(i, *window, rank, rank).astype(kernel.dtype) if window else ()
    x1 = jnp.where(zero, 0, draw(0, inputs, rank))
    y2 = jnp.zeros((outputs, rank)) if personal else draw(3, outputs, rank)
    cast = lambda x: x.astype(kernel.dtype)
    return Factors(cast(x1), cast(draw(1, outputs, rank)), core(4), cast(draw(2, inputs, rank)), cast(y2), core(5))
