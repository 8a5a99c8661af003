"""How each operation of a traced network ties the axes of its inputs, weights and output together.

A rule takes the axes of every argument and gives those of the result. What has no rule pins all it touches, so
that an unknown operation costs symmetries, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

from ticketlab.permutation.axes import Axes, Axis

Shape = tuple[int, ...]
Rule = Callable[[Axes, Mapping[str, Any], Shape], list[Axis]]
"""(axes, arguments by their names in the operation's schema with tensors replaced by their axes, output shape)."""


def linear(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    axes.join(x[-1], weight[1])
    if bias:
        axes.join(bias[0], weight[0])
    return [*x[:-1], weight[0]]


def convolution(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    """Groups may trade places as wholes, and channels inside a group in the same way in every group."""
    x, weight, bias, groups = given["input"], given["weight"], given.get("bias"), given.get("groups", 1)
    spatial = len(weight) - 2
    lead, channels = x[: len(x) - spatial - 1], x[len(x) - spatial - 1]
    group = axes.new(groups)
    axes.join(channels, group + weight[1])
    axes.join(weight[0], group + axes.new(_size(axes, weight[0]) // groups))
    if bias:
        axes.join(bias[0], weight[0])
    axes.pin(sum([*x[len(x) - spatial :], *weight[2:]], ()))
    return [*lead, weight[0], *_pinned(axes, shape[len(shape) - spatial :])]


def transposed_convolution(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    """The weight is [channels in, channels out of one group, ...]."""
    x, weight, bias, groups = given["input"], given["weight"], given.get("bias"), given.get("groups", 1)
    spatial = len(weight) - 2
    lead, channels = x[: len(x) - spatial - 1], x[len(x) - spatial - 1]
    group = axes.new(groups)
    axes.join(channels, weight[0])
    axes.join(weight[0], group + axes.new(_size(axes, weight[0]) // groups))
    if bias:
        axes.join(bias[0], group + weight[1])
    axes.pin(sum([*x[len(x) - spatial :], *weight[2:]], ()))
    return [*lead, group + weight[1], *_pinned(axes, shape[len(shape) - spatial :])]


def channel_wise(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    """Batch and instance norm, PReLU: a weight, a bias and statistics for each channel, or one weight for all."""
    x = next(iter(given.values()))
    for name in ("weight", "bias", "running_mean", "running_var"):
        if given.get(name) and len(x) > 1:
            axes.join(x[1], given[name][0])
    return x


def group_norm(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    x, groups = given["input"], given["num_groups"]
    axes.join(x[1], axes.new(groups) + axes.new(shape[1] // groups))
    return channel_wise(axes, given, shape)


def layer_norm(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    x, n = given["input"], len(given["normalized_shape"])
    for name in ("weight", "bias"):
        for own, axis in zip(given.get(name) or [], x[-n:], strict=False):
            axes.join(own, axis)
    return x


def pool(spatial: int, axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    """The last so many axes are positions and keep their order; channels, and examples if there are any, pass."""
    x = next(iter(given.values()))
    axes.pin(sum(x[-spatial:], ()))
    return [*x[:-spatial], *_pinned(axes, shape[-spatial:])]


def padding(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    """Order matters along the axes that grow, shrink or shift; ``pad`` has two lengths an axis, from the last on."""
    x = next(iter(given.values()))
    moved = {len(x) - 1 - place // 2 for place, length in enumerate(given["pad"]) if length}
    axes.pin(sum((x[d] for d in moved), ()))
    return [axes.new(shape[d], pinned=True) if d in moved else axis for d, axis in enumerate(x)]


def reshape(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    """Views, flattenings, added and removed axes of length 1: the same atoms in the same order."""
    x = next(iter(given.values()))
    new = [axes.new(size) for size in shape]
    axes.join(sum(x, ()), sum(new, ()))
    return new


def expansion(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    """An axis of copies may be permuted as whatever it meets."""
    x = next(iter(given.values()))
    x = [()] * (len(shape) - len(x)) + x
    return [axis if axes.atoms(axis) else axes.new(size) for axis, size in zip(x, shape, strict=True)]


def transpose(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    x = next(iter(given.values()))
    order = list(range(len(x)))
    if "dims" in given:
        order = [d % len(x) for d in given["dims"]]
    else:
        a, b = given.get("dim0", 0) % len(x), given.get("dim1", -1) % len(x)  # t() has neither, and two axes
        order[a], order[b] = order[b], order[a]
    return [x[d] for d in order]


def reduction(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    """A mean, a sum or a norm does not depend on the order along the axes it removes."""
    x = next(iter(given.values()))
    dims = given.get("dim")
    dims = range(len(x)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {d % len(x) for d in dims}
    keep = bool(given.get("keepdim"))
    return [() if d in gone else axis for d, axis in enumerate(x) if keep or d not in gone]


def matmul(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    a, b = list(given.values())[:2]
    if min(len(a), len(b)) < 2:
        return opaque(axes, given, shape)
    axes.join(a[-1], b[-2])
    return [*_broadcast(axes, [a[:-2], b[:-2]], shape[:-2]), a[-2], b[-1]]


def added_matmul(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    bias, a, b = list(given.values())[:3]
    return _broadcast(axes, [bias, matmul(axes, {"a": a, "b": b}, shape)], shape)


def einsum(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    """Axes with one letter are one axis."""
    terms, arrow, result = given["equation"].replace(" ", "").partition("->")
    if not arrow or "." in terms:
        return opaque(axes, given, shape)
    found: dict[str, Axis] = {}
    for letters, x in zip(terms.split(","), given["tensors"], strict=True):
        for letter, axis in zip(letters, x, strict=True):
            if axes.atoms(axis):  # not of length 1
                axes.join(found.setdefault(letter, axis), axis)
    return [found.get(letter, ()) for letter in result]


def embedding(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    axes.pin(given["weight"][0])
    return [*given["indices"], given["weight"][1]]


def along_one_axis(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    """Slicing, selecting or splitting along ``dim``, where order then matters; other axes pass."""
    x = next(iter(given.values()))
    dim = given.get("dim", 0) % len(x)
    if len(shape) < len(x):
        axes.pin(x[dim])
        return [*x[:dim], *x[dim + 1 :]]
    if _size(axes, x[dim]) == shape[dim]:
        return x
    axes.pin(x[dim])
    return [*x[:dim], *_pinned(axes, shape[dim : dim + 1]), *x[dim + 1 :]]


def concatenation(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    """The joint axis is pinned: a direct sum of permutations is not among those looked for."""
    tensors, dim = given["tensors"], given.get("dim", 0) % len(shape)
    for x in tensors:
        axes.pin(x[dim])
        for d, (one, other) in enumerate(zip(tensors[0], x, strict=True)):
            if d != dim:
                axes.join(one, other)
    return [*tensors[0][:dim], *_pinned(axes, shape[dim : dim + 1]), *tensors[0][dim + 1 :]]


def stacking(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    tensors, dim = given["tensors"], given.get("dim", 0) % len(shape)
    for x in tensors[1:]:
        for one, other in zip(tensors[0], x, strict=True):
            axes.join(one, other)
    return [*tensors[0][:dim], *_pinned(axes, shape[dim : dim + 1]), *tensors[0][dim:]]


def same(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    return next(iter(given.values()))


def pointwise(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    return _broadcast(axes, [value for value in given.values() if is_axes(value)], shape)


def opaque(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    for value in given.values():
        for x in [value] if is_axes(value) else value if isinstance(value, list) else []:  # one tensor or several
            axes.pin(sum(x, ()) if is_axes(x) else ())
    return _pinned(axes, shape)


def is_axes(value: object) -> bool:
    """Whether an argument stands for a tensor: the only lists of tuples there are."""
    return isinstance(value, list) and all(isinstance(axis, tuple) for axis in value)


def _broadcast(axes: Axes, tensors: Sequence[list[Axis]], shape: Shape) -> list[Axis]:
    """Axes aligned at the end; () is an axis of length 1 and follows the others."""
    found: list[Axis] = []
    for place in range(-len(shape), 0):
        here = [x[place] for x in tensors if len(x) >= -place and axes.atoms(x[place])]
        for other in here[1:]:
            axes.join(here[0], other)
        found.append(here[0] if here else ())
    return found


def _pinned(axes: Axes, shape: Shape) -> list[Axis]:
    return [axes.new(size, pinned=True) for size in shape]


def _size(axes: Axes, axis: Axis) -> int:
    return prod(axes.sizes[atom] for atom in axes.atoms(axis))


_NAMES: dict[Rule, str] = {
    linear: "linear",
    convolution: "conv1d conv2d conv3d",
    transposed_convolution: "conv_transpose1d conv_transpose2d conv_transpose3d",
    channel_wise: "batch_norm instance_norm prelu",
    group_norm: "group_norm",
    layer_norm: "layer_norm rms_norm",
    partial(pool, 1): "max_pool1d avg_pool1d adaptive_avg_pool1d "
    "upsample_nearest1d _upsample_nearest_exact1d upsample_linear1d",
    partial(pool, 2): "max_pool2d avg_pool2d adaptive_avg_pool2d "
    "upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d",
    partial(pool, 3): "max_pool3d avg_pool3d adaptive_avg_pool3d "
    "upsample_nearest3d _upsample_nearest_exact3d upsample_trilinear3d",
    padding: "pad constant_pad_nd",
    reshape: "view reshape flatten unflatten unsqueeze squeeze _unsafe_view",
    expansion: "expand expand_as",
    transpose: "transpose t permute swapaxes",
    reduction: "mean sum amax amin var std linalg_vector_norm logsumexp",
    matmul: "matmul mm bmm",
    added_matmul: "addmm baddbmm",
    einsum: "einsum",
    embedding: "embedding",
    along_one_axis: "select slice",
    concatenation: "cat concat",
    stacking: "stack",
    pointwise: "_weight_norm",  # of v and g; the norm of v does not depend on order
    same: "dropout dropout_ feature_dropout alpha_dropout contiguous clone detach alias to softmax log_softmax",
}
RULES: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}
