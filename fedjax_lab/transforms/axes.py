"""Which axes of a program's inputs count the same things, found by following them through its equations."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

PyTree = Any
Axis = tuple[int, ...]  # the dimensions that an axis is made of, the slowest first; none for an axis of length 1

_SAME_PLACE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp convert_element_type
    copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma
    log log1p logistic lt max min mul ne neg nextafter not optimization_barrier or pow real reduce_precision rem round
    rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub
    tan tanh xor
    """.split()  # noqa: SIM905
)
# Zero where all their arguments are: what is made of weights by them vanishes with the weights.
_KEEPS_ZERO = (
    "add",
    "add_any",
    "sub",
    "mul",
    "neg",
    "convert_element_type",
    "copy",
    "stop_gradient",
    "reduce_precision",
)
_RANDOM = (
    "random_bits",
    "random_split",
    "random_fold_in",
    "random_wrap",
    "random_unwrap",
    "random_seed",
    "threefry2x32",
)
_MOVES = ("transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim")


class Followed(NamedTuple):
    """An array of the program: its ``axes``, and whether it is a ``weight``, made of parameters alone."""

    axes: tuple[Axis, ...]
    weight: bool


class Dimensions:
    """Dimensions that are found to be the same, or made of others, as equations are followed."""

    def __init__(self):
        self.size: list[int] = []
        self._made_of: dict[int, Axis] = {}
        self._whole: set[int] = set()
        self._contracted: set[int] = set()

    def new(self, shape: Sequence[int], whole: bool = False) -> tuple[Axis, ...]:
        """An axis of its own for each length; ``whole``: it can't be cut."""
        axes = []
        for size in shape:
            axes.append(() if size == 1 else (len(self.size),))
            if size != 1:
                if whole:
                    self._whole.add(len(self.size))
                self.size.append(size)
        return tuple(axes)

    def resolve(self, axis: Axis) -> Axis:
        """The dimensions that an axis is made of, as far as is known."""
        out: list[int] = []
        for d in axis:
            out.extend(self.resolve(self._made_of[d]) if d in self._made_of else (d,))
        return tuple(out)

    def keep_whole(self, *axes: Axis) -> None:
        for axis in axes:
            self._whole.update(self.resolve(axis))

    def contract(self, axis: Axis) -> None:
        """Units along this axis are without effect where the weights they meet are zero."""
        self._contracted.update(self.resolve(axis))

    def may_be_cut(self, dimension: int) -> bool:
        return dimension in self._contracted and dimension not in self._whole

    def _set(self, dimension: int, made_of: Axis) -> None:
        self._made_of[dimension] = made_of
        for known in (self._whole, self._contracted):
            if dimension in known:
                known.update(made_of)

    def tie(self, a: Axis, b: Axis) -> None:
        """Both axes count the same."""
        first, second = list(self.resolve(a)), list(self.resolve(b))
        while first and second:
            if first[0] == second[0]:
                first.pop(0)
                second.pop(0)
                continue
            if self.size[first[0]] < self.size[second[0]]:
                first, second = second, first
            one, parts = first.pop(0), [second.pop(0)]
            while second and math.prod(self.size[d] for d in parts) < self.size[one]:
                parts.append(second.pop(0))
            if math.prod(self.size[d] for d in parts) != self.size[one] or one in parts:
                self._whole.update([one, *parts, *first, *second])
                return
            self._set(one, tuple(parts))
            first, second = list(self.resolve(tuple(first))), list(self.resolve(tuple(second)))
        self._whole.update([*first, *second])

    def reshape(self, axes: Sequence[Axis], shape: Sequence[int]) -> tuple[Axis, ...]:
        """The axes of the same entries in another shape."""
        left = [d for axis in axes for d in self.resolve(axis)]
        out = []
        for size in shape:
            taken: list[int] = []
            while (room := size // math.prod(self.size[d] for d in taken)) > 1 and left:
                if self.size[left[0]] > room and self.size[left[0]] % room == 0:
                    split = self.new((room, self.size[left[0]] // room))
                    self._set(left[0], split[0] + split[1])
                    left[:1] = split[0] + split[1]
                taken.append(left.pop(0))
            if math.prod(self.size[d] for d in taken) != size:
                self.keep_whole(*axes)
                return self.new(shape, whole=True)
            out.append(tuple(taken))
        return tuple(out)


def follow(program: ClosedJaxpr, dims: Dimensions, values: Sequence[Followed]) -> list[Followed]:
    """The program's results for its arguments; what is learnt on the way is kept in ``dims``."""
    constants = [Followed(dims.new(np.shape(c), whole=True), False) for c in program.consts]
    return _follow(program.jaxpr, dims, [*constants, *values])


def _follow(jaxpr: Jaxpr, dims: Dimensions, values: Sequence[Followed]) -> list[Followed]:
    known: dict[Any, Followed] = dict(zip((*jaxpr.constvars, *jaxpr.invars), values, strict=True))

    def read(v):
        return Followed(dims.new(np.shape(v.val), whole=True), False) if isinstance(v, Literal) else known[v]

    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _equation(eqn, dims, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _equation(eqn: Any, dims: Dimensions, values: list[Followed]) -> list[Followed]:
    name, shapes = eqn.primitive.name, [v.aval.shape for v in eqn.outvars]
    if name in _SAME_PLACE and len(shapes) == 1:
        return [_same_place(name, dims, values, shapes[0])]
    if name in _MOVES:
        return [_moved(name, eqn, dims, values[0], shapes[0])]
    if name == "dot_general":
        return [_product(eqn.params["dimension_numbers"], dims, *values)]
    if name == "conv_general_dilated":
        return [_convolution(eqn.params, dims, values, shapes[0])]
    if name == "scan":
        return _scan(eqn, dims, values)
    if name in _RANDOM:
        return [Followed(dims.new(shape), False) for shape in shapes]
    if name in ("slice", "pad", "reduce_window_max", "reduce_window_sum", "reduce_window", "select_and_scatter_add"):
        return [_same_lengths(dims, values[0], shapes[0])]
    if name.startswith("reduce_") and "axes" in eqn.params:
        return [_reduced(eqn.params["axes"], dims, value) for value in values[: len(shapes)]]
    inner = [p for p in eqn.params.values() if isinstance(p, Jaxpr | ClosedJaxpr)]
    inner = [p for p in inner if len(getattr(p, "jaxpr", p).invars) == len(values)]
    if len(inner) == 1 and name not in ("while", "cond"):
        return follow(inner[0], dims, values) if isinstance(inner[0], ClosedJaxpr) else _follow(inner[0], dims, values)
    for value in values:
        dims.keep_whole(*value.axes)
    return [Followed(dims.new(shape, whole=True), False) for shape in shapes]


def _same_place(name, dims, values, shape) -> Followed:
    full = [v for v in values if len(v.axes) == len(shape) and shape]
    if not full:
        return Followed(dims.new(shape), all(v.weight for v in values))
    axes = []
    for same in zip(*(v.axes for v in full), strict=True):
        first, *others = [axis for axis in same if axis] or [()]  # an axis of length 1 goes with any
        for other in others:
            dims.tie(first, other)
        axes.append(first)
    weight = name in _KEEPS_ZERO and all(v.weight for v in values)
    if name == "mul":
        weight = any(v.weight and all(a or not b for a, b in zip(v.axes, axes, strict=True)) for v in full)
    if name in ("div", "integer_pow"):
        weight = values[0].weight
    return Followed(tuple(axes), weight)


def _moved(name, eqn, dims, value, shape) -> Followed:
    if name == "transpose":
        axes = tuple(value.axes[i] for i in eqn.params["permutation"])
    elif name == "broadcast_in_dim":
        placed = dict(zip(eqn.params["broadcast_dimensions"], value.axes, strict=True))
        axes = tuple(placed.get(i) or dims.new((n,))[0] for i, n in enumerate(shape))
        if any(n > 1 and not placed.get(i) for i, n in enumerate(shape)):  # along these it needn't vanish
            return Followed(axes, False)
    else:
        axes = dims.reshape(value.axes, shape)
    return Followed(axes, value.weight)


def _product(numbers, dims, left, right) -> Followed:
    (of_left, of_right), (batch_left, batch_right) = numbers
    for i, j in zip(of_left, of_right, strict=True):
        dims.tie(left.axes[i], right.axes[j])
        if left.weight or right.weight:
            dims.contract(left.axes[i])
        else:  # two activations: what a unit gives for no input needn't be zero
            dims.keep_whole(left.axes[i])
    for i, j in zip(batch_left, batch_right, strict=True):
        dims.tie(left.axes[i], right.axes[j])
    rest = [a for i, a in enumerate(left.axes) if i not in (*of_left, *batch_left)]
    rest += [a for i, a in enumerate(right.axes) if i not in (*of_right, *batch_right)]
    batch = [left.axes[i] for i in batch_left]
    return Followed((*batch, *rest), left.weight and right.weight)


def _convolution(params, dims, values, shape) -> Followed:
    left, right = values
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    (batch, inputs, *_), (outputs, kernel_inputs, *window) = numbers.lhs_spec, numbers.rhs_spec
    channels, kernel = left.axes[inputs], right.axes[kernel_inputs]
    sizes = lambda axis: math.prod(dims.size[d] for d in dims.resolve(axis))
    out = right.axes[outputs]
    if groups == 1 and params["batch_group_count"] == 1 and right.weight:
        dims.tie(channels, kernel)
        dims.contract(channels)
    elif groups == sizes(channels) == sizes(out) and right.weight:  # each channel by itself
        dims.tie(channels, out)
    else:
        dims.keep_whole(channels, kernel, out)
    dims.keep_whole(*(right.axes[i] for i in window), *(left.axes[i] for i in numbers.lhs_spec[2:]))
    axes = list(dims.new(shape, whole=True))
    axes[numbers.out_spec[0]], axes[numbers.out_spec[1]] = left.axes[batch], out
    return Followed(tuple(axes), False)


def _same_lengths(dims, value, shape) -> Followed:
    """Axes that kept their length are the same; of the others nothing is known."""
    axes = []
    for axis, size in zip(value.axes, shape, strict=True):
        if math.prod(dims.size[d] for d in dims.resolve(axis)) == size:
            axes.append(axis)
        else:
            dims.keep_whole(axis)
            axes.append(dims.new((size,), whole=True)[0])
    return Followed(tuple(axes), False)


def _reduced(axes, dims, value) -> Followed:
    """A sum or a maximum over units would see those that are missing."""
    dims.keep_whole(*(value.axes[i] for i in axes))
    return Followed(tuple(a for i, a in enumerate(value.axes) if i not in axes), False)


def _scan(eqn, dims, values) -> list[Followed]:
    body = eqn.params["jaxpr"]
    # In order: constants, carry, rows; and carry, rows. A row has one axis less in the body than outside.
    is_row = lambda outside, inside: outside.aval.ndim > inside.ndim
    rows = sum(map(is_row, eqn.invars, body.in_avals))
    carried = len(eqn.outvars) - sum(map(is_row, eqn.outvars, body.out_avals))
    first = len(values) - rows - carried
    inside = [Followed(v.axes[1:], False) if i >= first + carried else v for i, v in enumerate(values)]
    for value in values[first + carried :]:
        dims.keep_whole(value.axes[0])
    carry = [v._replace(weight=False) for v in inside[first : first + carried]]
    out = follow(body, dims, [*inside[:first], *carry, *inside[first + carried :]])
    for before, after in zip(carry, out[:carried], strict=True):
        for a, b in zip(before.axes, after.axes, strict=True):
            dims.tie(a, b)
    length = eqn.params["length"]
    return carry + [Followed((dims.new((length,), whole=True)[0], *v.axes), False) for v in out[carried:]]
