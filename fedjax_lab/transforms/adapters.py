"""LoRA: a model that is known to all stays as it is, and clients train small adapters beside its kernels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab import checks
from fedjax_lab.models.base import Model, Variables, reparametrized
from fedjax_lab.round import Lens, Round, Transform

PyTree = Any


class Adapter(NamedTuple):
    """``W + scale * a b``: ``a: [inputs, r]`` and ``b: [r, outputs]``, which starts at zero."""

    a: jax.Array
    b: jax.Array


class Adapters(NamedTuple):
    """Adapters of a model.

    Attributes:
      model: a :class:`fedjax_lab.Model` whose parameters are the adapters, for any algorithm.
      merge: ``(adapters) -> params`` of the whole model.
      merged: a transform, put last: what the process gives as its parameters, and what clients would use, is the
        whole model.
    """

    model: Model
    merge: Callable[[PyTree], PyTree]
    merged: Transform


def adapters(
    model: Model,
    base: PyTree,
    *,
    rank: int = 4,
    alpha: Any = None,
    predicate: Callable[[str], bool] | None = None,
    whole: Callable[[str], bool] = lambda path: False,
) -> Adapters:
    """Low-rank adapters beside the kernels of a model that everybody has (LoRA, Hu et al., ICLR 2022, section 4.1).

    Kernels become ``W + alpha/rank a b`` with ``W`` frozen. ``a`` is drawn and ``b`` starts at zero, so that training
    starts from the model itself. ::

        lora = adapters(model, base=pretrained, rank=4)
        round = fl.compose(fedavg(lora.model, optax.sgd(0.1)), lora.merged)

    The base is a constant of the program: it is in no message, upload or state, so that none of it can be sent, and
    adapters go through any algorithm and transform as any parameters do. Travels: the adapters, each way (and the
    model's state, where it has one).

    Args:
      model: any model; kernels are parameters ``[inputs, outputs]`` or ``[*window, inputs, outputs]``, as Flax has
        them. A convolution's window counts to its inputs.
      base: the parameters that all have; arrays on the host or the device.
      rank: of each adapter.
      alpha: strength of the adapters; ``rank`` by default, a factor of 1.
      predicate: of the paths of kernels that get an adapter, such as ``hidden_0/kernel``; by default all.
      whole: of the paths of leaves that are trained as they are, such as a new head; from the base's values.

    Raises:
      ValueError: a rank below 1 or above a kernel's, an ``alpha`` that isn't positive, a predicate that names no
        kernel; when the process is built, a base of other shapes than the model's.
    """
    checks.model(model)
    checks.integer(rank, "rank", 1)
    if alpha is not None:
        checks.positive(alpha, "alpha")
    frozen = jax.tree.map(np.asarray, base)  # on the host, so that programs for several devices may hold it
    chosen = _chosen(frozen, rank, predicate, whole)
    scale = 1.0 if alpha is None else alpha / rank
    named = dict(checks.named_leaves(frozen))

    def fresh(key):
        made = {}
        for i, name in enumerate(sorted(named)):
            leaf = named[name]
            if whole(name):
                made[name] = jnp.asarray(leaf)
            elif name in chosen:
                inputs, outputs = int(np.prod(leaf.shape[:-1])), leaf.shape[-1]
                a = jax.random.normal(jax.random.fold_in(key, i), (inputs, rank)) / np.sqrt(inputs)
                made[name] = Adapter(a.astype(leaf.dtype), jnp.zeros((rank, outputs), leaf.dtype))
        return made

    def merge(params):
        def one(path, leaf):
            own = params.get(checks.path_name(path))
            if isinstance(own, Adapter):
                return leaf + (scale * (own.a @ own.b)).reshape(leaf.shape).astype(leaf.dtype)
            return leaf if own is None else own

        return jax.tree_util.tree_map_with_path(one, frozen)

    def started(made, key):
        params, model_state = made
        _same(frozen, params)
        return fresh(jax.random.fold_in(key, 0x10A)), model_state

    return Adapters(reparametrized(model, started, merge), merge, _merged(model, merge))


def _merged(model: Model, merge: Callable[[PyTree], PyTree]) -> Transform:
    """The Round whose model is the whole one."""
    of = lambda variables: Variables(merge(variables.params), variables.model_state)

    def fixed(*_):
        raise ValueError(
            "merged adapters can't be replaced by a whole model: put `merged` last, behind every transform"
        )

    def transform(round: Round) -> Round:
        inner, view, personal = round.model, round.view, round.personalize
        if inner is None or view is None:
            raise ValueError("merged gives adapters their model back, but this Round trains none or sends none")
        sees = view.get if "partial" in round.traits else lambda m: of(view.get(m))
        return round._replace(
            model=Lens(lambda server: of(inner.get(server)), fixed),
            view=Lens(sees, fixed),
            personalize=personal and (lambda m, state, client, key: of(personal(m, state, client, key))),
            local=None,
            loss=model.loss,
            metrics=model.metrics,
            traits=round.traits | {"merged"},
        )

    return transform


def _chosen(base: PyTree, rank: int, predicate, whole) -> set[str]:
    kernels = {name: leaf.shape for name, leaf in checks.named_leaves(base) if np.ndim(leaf) >= 2 and not whole(name)}
    chosen = {name for name in kernels if predicate is None or predicate(name)}
    if not chosen:
        raise ValueError(f"adapters() finds no kernel to adapt: predicate= names none of {list(kernels)}")
    for name in sorted(chosen):
        most = min(int(np.prod(kernels[name][:-1])), kernels[name][-1])
        if rank > most:
            raise ValueError(
                f"rank {rank} is above that of {name}, {most} of {list(kernels[name])}: give a smaller one, or a "
                "predicate= that leaves this kernel as it is"
            )
    return chosen


def _same(base: PyTree, params: PyTree) -> None:
    shapes = lambda tree: {name: jnp.shape(leaf) for name, leaf in checks.named_leaves(tree)}
    theirs, own = shapes(base), shapes(params)
    wrong = [name for name in {**own, **theirs} if own.get(name) != theirs.get(name)]
    if wrong:
        name = wrong[0]
        raise ValueError(f"base has {name} of shape {theirs.get(name)}, and the model of shape {own.get(name)}")
