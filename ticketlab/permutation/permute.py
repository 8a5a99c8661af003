"""Apply permutations of hidden units to parameters, buffers and masks, and hold the function against the old one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ticketlab.errors import Refused
from ticketlab.network import Network, network, output_shape
from ticketlab.probing import watching_generators
from ticketlab.seeds import stream

Factors = tuple[tuple[str | None, int], ...]
"""What one tensor axis is a row-major product of: (group, length), None where the order is fixed."""
Permutations = dict[str, Int[Tensor, "*replica units"]]
"""For each group, the old index of each new unit."""
Tensors = tuple[Mapping[str, Tensor], Mapping[str, Tensor] | None]
"""Parameters (times their masks) and buffers of one network or a stack: a State, or any pair. Buffers may be None where
the forward pass reads none."""


@dataclass(frozen=True)
class Groups:
    """The permutable groups of hidden units of one architecture."""

    sizes: dict[str, int]
    """Units of each group, named after the first layer that computes them; in the order of the forward pass."""
    axes: dict[str, tuple[Factors, ...]] = field(repr=False)
    """For every parameter and buffer, the factors of each of its axes; a tied tensor under each of its names."""
    refuted: tuple[str, ...] = ()
    """Groups that the rules gave and a trial did not confirm; they keep their order. A rule is at fault: report it."""

    def of(self, name: str) -> set[str]:
        """The groups that a tensor takes part in."""
        return {group for axis in self.axes[name] for group, _ in axis if group is not None}


def permute(groups: Groups, tensors: Mapping[str, Tensor], permutations: Permutations) -> dict[str, Tensor]:
    """pi(theta): every axis that a group runs along, reordered.

    New unit i is old unit ``permutations[group][i]``. One function for parameters, buffers and masks: names decide.

    Args:
        groups: Of the architecture.
        tensors: Some or all of its parameters, buffers or masks; stacked or not.
        permutations: Some or all of the groups', each [units], shared by a whole stack; or [replica, units], one for
            each replica of stacked tensors.

    Raises:
        Refused: Unknown names, other shapes, or an index that is not a permutation.
    """
    _check(groups, permutations)
    stacks = {tuple(p.shape[:-1]) for p in permutations.values()}
    if stacks - {()}:
        if len(stacks) > 1:
            raise Refused(f"permutations must all be [units] or all [replica, units]: got lead axes {stacks}.")
        ((replicas,),) = stacks
        lengths = {len(t) if is_stacked(groups, n, t) else None for n, t in tensors.items()}
        if lengths != {replicas}:
            raise Refused(f"tensors must have the {replicas} replicas of the permutations: got {lengths}.")
        parts = [
            permute(groups, {n: t[r] for n, t in tensors.items()}, {g: p[r] for g, p in permutations.items()})
            for r in range(replicas)
        ]
        return {name: torch.stack([part[name] for part in parts]) for name in tensors}
    new = {}
    for name, tensor in tensors.items():
        lead = int(is_stacked(groups, name, tensor))
        new[name] = tensor
        for dim, axis in enumerate(groups.axes[name]):
            if any(group in permutations for group, _ in axis):
                new[name] = new[name].index_select(lead + dim, _index(axis, permutations).to(tensor.device))
    return new


def is_stacked(groups: Groups, name: str, tensor: Tensor) -> bool:
    """Whether a tensor has a replica axis in front of those that its name is known to have."""
    if name not in groups.axes:
        raise Refused(f"tensors must be the traced model's parameters, buffers or masks: {name!r} is none of them.")
    shape = [_length(axis) for axis in groups.axes[name]]
    if list(tensor.shape) != shape and list(tensor.shape[1:]) != shape:
        raise Refused(f"{name!r} must have shape {shape}, or [replica, *{shape}]: got {list(tensor.shape)}.")
    return tensor.ndim > len(shape)


def random(groups: Groups, seed: int) -> Permutations:
    """A uniformly drawn permutation of every group."""
    generator = stream("permutation", seed)
    return {group: torch.randperm(size, generator=generator) for group, size in groups.sizes.items()}


def assert_same_function(model: nn.Module, a: Tensors, b: Tensors, x: Tensor, *, rtol: float | None = None) -> None:
    """Raise unless two networks compute the same function on ``x``, up to rounding.

    Both are computed in float64, parts that a model casts to less included, where its operations exist in float64.

    Args:
        model: Lends its forward pass.
        a: Parameters (times their masks) and buffers of one network or a stack: a State, or any pair; buffers may be
            None where the forward pass reads none.
        b: The other, such as the first one permuted.
        x: Inputs [n, ...].
        rtol: Largest difference allowed, relative to the largest output; None: 1e-9 in float64, below it the square
            root of the spacing of numbers at 1.

    Raises:
        Refused: They differ, and the permutation is no symmetry of the network; or outputs that are random or not
            finite, which nothing can be held against.
    """
    gap, scale, rounding = difference(model, a, b, x)
    if not gap <= (rounding if rtol is None else rtol) * scale:
        raise Refused(
            f"a permuted network must compute the same function: outputs differ by {gap:.3g} at a scale of "
            f"{scale:.3g}. An operation of the model depends on the order of its hidden units; report its name."
        )


@torch.no_grad()
def difference(model: nn.Module, a: Tensors, b: Tensors, x: Tensor) -> tuple[float, float, float]:
    """The largest difference between two networks' outputs, their largest entry, and what rounding may do to it.

    Raises:
        Refused: Tensors or inputs that do not fit the model; outputs of ``a`` that are random, or not finite.
    """
    nets = [
        network(model, params, x if buffers is None else None, buffers=buffers, finite=False)
        for params, buffers in (a, b)
    ]
    with watching_generators(x.device) as drawn:
        f, again, g = _outputs(nets, x)
        is_random = drawn()
    rounding = 1e-9 if f.dtype in _DOUBLE.values() else torch.finfo(f.dtype).eps ** 0.5
    scale = float(f.abs().masked_fill(f.isinf(), 0).max().clamp_min(torch.finfo(f.dtype).tiny))
    if not scale < torch.inf:
        raise Refused("outputs must be numbers to be compared: got NaN. Check x and the weights.")
    # Equal infinities, as of logits that are masked out, are equal.
    noise, gap = (float((f - other).abs().masked_fill(f == other, 0).max()) for other in (again, g))
    if is_random or not noise <= rounding * scale:
        raise Refused(
            "outputs must be the same twice to be compared: in evaluation mode they depend on chance. Give F.dropout "
            "its training=self.training, and take out what adds noise."
        )
    return gap, scale, rounding


def _outputs(nets: Sequence[Network], x: Tensor) -> tuple[Tensor, ...]:
    """Of the first network, of the first again, and of the second; in float64 where the model runs in it."""
    first, second = nets
    try:
        first, second = (replace(n, params=_double(n.params), buffers=_double(n.buffers)) for n in nets)
        with _Doubled():
            return tuple(net(_double(x), "loop") for net in (first, first, second))
    except Exception:  # whatever an operation raises that does not exist in float64
        first, second = nets
    try:
        return tuple(net(x, "loop") for net in (first, first, second))
    except Exception:
        output_shape(first, x)  # refuses by name what the model does not take
        raise


_DOUBLE = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32, torch.float64), torch.float64),
    **dict.fromkeys((torch.complex32, torch.complex64, torch.complex128), torch.complex128),
}


def _double(values: Any) -> Any:
    """Floating tensors, and the names of their dtypes, in double precision; anything else as it is."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(_DOUBLE.get(value.dtype, value.dtype))
        return _DOUBLE.get(value, value) if isinstance(value, torch.dtype) else value

    return tree_map(one, values)


class _Doubled(TorchDispatchMode):
    """Double precision wherever a forward pass asks for less: a difference that is left is not rounding."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda v: v if isinstance(v, Tensor) else _double(v), (args, kwargs or {}))
        result = func(*args, **kwargs)
        is_new = isinstance(result, Tensor) and not any(isinstance(v, Tensor) for v in tree_leaves((args, kwargs)))
        return _double(result) if is_new else result


def _length(axis: Factors) -> int:
    length = 1
    for _, size in axis:
        length *= size
    return length


def _index(axis: Factors, permutations: Permutations) -> Tensor:
    """Old positions along one axis, from the permutations of its factors."""
    index = torch.zeros(1, dtype=torch.long)
    for group, size in axis:
        own = permutations[group].cpu() if group in permutations else torch.arange(size)
        index = (index[:, None] * size + own).flatten()
    return index


def _check(groups: Groups, permutations: Permutations) -> None:
    for group, permutation in permutations.items():
        if group not in groups.sizes:
            raise Refused(f"permutations must be of the groups {list(groups.sizes)}: got {group!r}.")
        size = groups.sizes[group]
        expected = torch.arange(size, device=permutation.device).expand((*permutation.shape[:-1], size))
        if permutation.shape[-1:] != (size,) or not torch.equal(permutation.sort(-1).values, expected):
            raise Refused(f"permutations[{group!r}] must order the indices 0 to {size - 1}: got {permutation}.")
