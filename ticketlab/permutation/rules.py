"""How each operation of a traced network ties the axes of its inputs, weights and output together.

A rule takes the axes of every argument and gives those of the result. What has no rule, and is not made of
operations that have, pins all it touches: an unknown operation costs symmetries, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any

from ticketlab.permutation.axes import Axes, Axis

Shape = Any
"""Of a result: a tuple of lengths; a list of shapes for several tensors, None for a number."""
Result = list[Any]
"""Axes for each dimension; a list of those for several tensors."""
Rule = Callable[[Axes, Mapping[str, Any], Shape], Result | None]
"""(axes, arguments by their names in the operation's schema with tensors replaced by their axes, output shape);
None where it does not apply."""


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
        if given.get(name) and axes.atoms(given[name][0]):
            axes.join(x[1], given[name][0])
    return x


def group_norm(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    x, groups = given["input"], given["num_groups"]
    axes.join(x[1], axes.new(groups) + axes.new(shape[1] // groups))
    return channel_wise(axes, given, shape)


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
    """Of matrices, batches of them, or vectors."""
    a, b = list(given.values())[:2]
    axes.join(a[-1], b[-2:][0])
    return [*_broadcast(axes, [a[:-2], b[:-2]], shape[: max(len(a), len(b)) - 2]), *a[-2:-1], *b[-1:][: len(b) - 1]]


def embedding(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    axes.pin(given["weight"][0])
    return [*given["indices"], given["weight"][1]]


def along_one_axis(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    """Slicing or selecting along ``dim``; other axes pass.

    A slice may be permuted inside, if all slices of its length are in the same way: as the gates of a recurrent
    net, or the queries, keys and values that one layer makes.
    """
    x = next(iter(given.values()))
    dim = given.get("dim", 0) % len(x)
    if len(shape) < len(x):
        axes.pin(x[dim])
        return [*x[:dim], *x[dim + 1 :]]
    length, size = shape[dim], _size(axes, x[dim])
    if length == size:
        return x
    start = given.get("start") or 0
    if not length or size % length or start % length or given.get("step", 1) != 1:
        axes.pin(x[dim])
        return [*x[:dim], *_pinned(axes, shape[dim : dim + 1]), *x[dim + 1 :]]
    inside = axes.new(length)
    axes.join(x[dim], axes.new(size // length, pinned=True) + inside)
    return [*x[:dim], inside, *x[dim + 1 :]]


def pieces(axes: Axes, given: Mapping[str, Any], shape: Shape) -> Result:
    """One after another along ``dim``, or each of its places alone."""
    dim = given.get("dim", 0)
    if len(shape[0]) < len(given["self"]):
        return [along_one_axis(axes, given, one) for one in shape]
    starts = accumulate((one[dim] for one in shape), initial=0)
    return [along_one_axis(axes, {**given, "start": start}, one) for start, one in zip(starts, shape, strict=False)]


def concatenation(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    """Parts of one length are permuted in the same way; a direct sum of permutations is not looked for."""
    dim = given.get("dim", 0) % len(shape)
    # Empty tensors hold nothing; one of shape [0] may stand beside any other. An unknown length is 0 in the result too.
    tensors = [x for x in given["tensors"] if len(x) == len(shape) and _size(axes, x[dim])]
    lengths = {_size(axes, x[dim]) for x in tensors}
    for x in tensors:
        if len(lengths) > 1:
            axes.pin(x[dim])
        for d, (one, other) in enumerate(zip(tensors[0], x, strict=True)):
            if d != dim or len(lengths) == 1:
                axes.join(one, other)
    joint = axes.new(len(tensors), pinned=True) + tensors[0][dim]
    return [*tensors[0][:dim], joint if len(lengths) == 1 else _pinned(axes, shape)[dim], *tensors[0][dim + 1 :]]


def extremes(axes: Axes, given: Mapping[str, Any], shape: Shape) -> Result:
    """Larger or smaller entries of two tensors, the largest or smallest of one, or those along an axis and where."""
    if "other" in given:
        return pointwise(axes, given, shape)
    return ordered(axes, given, shape) if "dim" in given else reduction(axes, given, shape)


def several(axes: Axes, given: Mapping[str, Any], shape: Shape) -> Result:
    """Statistics along one and the same axes."""
    return [reduction(axes, given, one) for one in shape]


def ordered(axes: Axes, given: Mapping[str, Any], shape: Shape) -> Result:
    """Sorting, shifting or picking along axes where order then matters; other axes pass."""
    if isinstance(shape, list):
        return [ordered(axes, given, one) for one in shape]
    x = next(iter(given.values()))
    dims = given.get("dims") if "shifts" in given else given.get("dims", given.get("dim", -1))  # rolled without: all
    moved = {d % len(x) for d in ([dims] if isinstance(dims, int) else dims or range(len(x)))}
    axes.pin(sum((x[d] for d in moved), sum(given.get("index") or [], ())))
    if len(shape) < len(x):
        return [axis for d, axis in enumerate(x) if d not in moved]
    return [axes.new(shape[d], pinned=True) if d in moved else axis for d, axis in enumerate(x)]


def indexing(axes: Axes, given: Mapping[str, Any], shape: Shape) -> Result | None:
    """Picking by tensors of indices along neighbouring axes, the places of which the indices' own axes take."""
    x, indices = given["self"], given["indices"]
    moved = [d for d, index in enumerate(indices) if index is not None]
    if moved != list(range(moved[0], moved[-1] + 1)):
        return None
    opaque(axes, ([x[d] for d in moved], indices), None)
    before, after = x[: moved[0]], x[moved[-1] + 1 :]
    return [*before, *_pinned(axes, shape[len(before) : len(shape) - len(after)]), *after]


def constant(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    """A tensor of equal entries may be permuted as whatever it meets."""
    return [axes.new(size) for size in shape]


def bilinear(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    one, other, weight, bias = given["input1"], given["input2"], given["weight"], given.get("bias")
    axes.join(one[-1], weight[1])
    axes.join(other[-1], weight[2])
    if bias:
        axes.join(bias[0], weight[0])
    return [*_broadcast(axes, [one[:-1], other[:-1]], shape[:-1]), weight[0]]


def same(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    return next(iter(given.values()))


def pointwise(axes: Axes, given: Mapping[str, Any], shape: Shape) -> list[Axis]:
    return _broadcast(axes, [value for value in given.values() if is_axes(value)], shape)


def opaque(axes: Axes, given: Any, shape: Shape) -> Any:
    """Order matters along every axis: of all tensors, wherever among the arguments they are, and of the results."""
    for x in tensors_in(given):
        axes.pin(sum(x, ()))
    if isinstance(shape, list):
        return [opaque(axes, (), one) for one in shape]
    return None if shape is None else _pinned(axes, shape)


def tie(axes: Axes, one: list[Axis], other: list[Axis]) -> None:
    """Two tensors of one shape have one order."""
    for a, b in zip(one, other, strict=True):
        axes.join(a, b)


def tensors_in(value: Any) -> Iterator[list[Axis]]:
    if is_axes(value):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(one)


def fits(axes: Axes, result: Any, shape: Shape) -> bool:
    """Whether a rule's result is one for this shape."""
    if isinstance(shape, list):
        same_length = isinstance(result, list | tuple) and len(result) == len(shape)
        return same_length and all(fits(axes, one, own) for one, own in zip(result, shape, strict=True))
    return shape is None or (is_axes(result) and [_size(axes, axis) for axis in result] == list(shape))


def is_axes(value: object) -> bool:
    """Whether a value stands for a tensor: the only lists of tuples there are."""
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
    partial(pool, 1): "max_pool1d avg_pool1d adaptive_avg_pool1d "
    "upsample_nearest1d _upsample_nearest_exact1d upsample_linear1d",
    partial(pool, 2): "max_pool2d avg_pool2d adaptive_avg_pool2d "
    "upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d",
    partial(pool, 3): "max_pool3d avg_pool3d adaptive_avg_pool3d "
    "upsample_nearest3d _upsample_nearest_exact3d upsample_trilinear3d",
    padding: "pad constant_pad_nd",
    reshape: "view reshape flatten unflatten unsqueeze unsqueeze_ squeeze squeeze_ _unsafe_view",
    expansion: "expand expand_as",
    transpose: "transpose transpose_ t t_ permute swapdims swapdims_",
    reduction: "mean sum nansum prod any all count_nonzero amax amin var std norm linalg_vector_norm logsumexp",
    several: "var_mean std_mean aminmax",
    extremes: "max min",
    ordered: "topk sort argsort argmax argmin median mode kthvalue index_select roll flip",
    matmul: "matmul mm bmm mv dot vdot",
    embedding: "embedding",
    along_one_axis: "select slice narrow",
    pieces: "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk unbind",
    indexing: "index",
    constant: "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty",
    bilinear: "bilinear",
    concatenation: "cat concat",
    pointwise: "_weight_norm where copy_ masked_fill masked_fill_ complex polar",  # a norm of v has no order
    same: "fill_ zero_ dropout dropout_ feature_dropout alpha_dropout contiguous clone detach detach_ alias lift_fresh "
    "lift_fresh_copy to type_as _to_copy softmax _softmax _safe_softmax log_softmax _log_softmax real imag conj "
    "resolve_conj resolve_neg",
}
RULES: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}
JOINING: set[Rule | None] = {
    *(linear, convolution, transposed_convolution, channel_wise, group_norm, matmul, embedding, bilinear, pointwise),
}
"""Rules that pin what they tie to something pinned, such as the input: no news."""
