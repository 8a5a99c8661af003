"""How each operation of a traced network ties the axes of its inputs, weights and output together.

A rule takes the axes of every argument and gives those of the result. What has no rule pins all it touches, so
that an unknown operation costs symmetries, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def channel_norm(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    """Batch and instance norm: a weight, a bias and statistics for each channel."""
    x = given["input"]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if given.get(name):
            axes.join(x[1], given[name][0])
    return x


def group_norm(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    x, groups = given["input"], given["num_groups"]
    axes.join(x[1], axes.new(groups) + axes.new(shape[1] // groups))
    return channel_norm(axes, given, shape)


def layer_norm(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    x, n = given["input"], len(given["normalized_shape"])
    for name in ("weight", "bias"):
        for own, axis in zip(given.get(name) or [], x[-n:], strict=False):
            axes.join(own, axis)
    return x


def pool(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    """Examples and channels pass; spatial positions keep their order."""
    x = next(iter(given.values()))
    axes.pin(sum(x[2:], ()))
    return [*x[:2], *_pinned(axes, shape[2:])]


def reshape(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    """Views, flattenings, added and removed axes of length 1: the same atoms in the same order."""
    x = next(iter(given.values()))
    new = [axes.new(size) for size in shape]
    axes.join(sum(x, ()), sum(new, ()))
    return new


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
    """A mean or a sum does not depend on the order along the axes it removes."""
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
        for one, other in zip(tensors[0], x, strict=True):
            if one is not tensors[0][dim]:
                axes.join(one, other)
    return [*tensors[0][:dim], *_pinned(axes, shape[dim : dim + 1]), *tensors[0][dim + 1 :]]


def same(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    return next(iter(given.values()))


def pointwise(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    return _broadcast(axes, [value for value in given.values() if is_axes(value)], shape)


def opaque(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    for value in given.values():
        for x in value if isinstance(value, list) and value and is_axes(value[0]) else [value]:
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
    channel_norm: "batch_norm instance_norm",
    group_norm: "group_norm",
    layer_norm: "layer_norm rms_norm",
    pool: "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d",
    reshape: "view reshape flatten unflatten unsqueeze squeeze _unsafe_view",
    transpose: "transpose t permute swapaxes",
    reduction: "mean sum amax amin",
    matmul: "matmul mm bmm",
    embedding: "embedding",
    along_one_axis: "select slice",
    concatenation: "cat concat",
    same: "dropout dropout_ feature_dropout alpha_dropout contiguous clone detach alias to softmax log_softmax",
}
RULES: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}
