"""Apply permutations of hidden units to parameters, buffers and masks, and hold the function against the old one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ticketlab.errors import Refused
from ticketlab.functional import apply
from ticketlab.permutation.groups import Factors, Groups, Permutations
from ticketlab.seeds import stream


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


@torch.no_grad()
def assert_same_function(
    model: nn.Module,
    a: tuple[Mapping[str, Tensor], Mapping[str, Tensor] | None],
    b: tuple[Mapping[str, Tensor], Mapping[str, Tensor] | None],
    x: Tensor,
    *,
    rtol: float | None = None,
) -> None:
    """Raise unless two networks compute the same function on ``x``, up to the rounding of their dtype.

    Args:
        model: Lends its forward pass.
        a: Parameters (times their mask) and buffers, one network or a stack; buffers None: the model's own.
        b: The other, such as the first one permuted.
        x: Inputs [n, ...].
        rtol: Largest difference allowed, relative to the largest output; None: 1e-9 in float64, 1e-4 below.

    Raises:
        Refused: They differ; the permutation is then no symmetry of the network.
    """
    f, g = (apply(model, dict(params), x, buffers=buffers) for params, buffers in (a, b))
    allowed = rtol if rtol is not None else 1e-9 if f.dtype == torch.float64 else 1e-4
    gap, scale = float((f - g).abs().max()), float(f.abs().max())
    if not gap <= allowed * max(scale, torch.finfo(f.dtype).tiny):
        raise Refused(
            f"a permuted network must compute the same function: outputs differ by {gap:.3g} at a scale of "
            f"{scale:.3g}. An operation of the model depends on the order of its hidden units; report its name."
        )


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
