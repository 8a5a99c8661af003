"""The product with the kernel by two backward passes per block of examples: no row of the Jacobian is made."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ticketlab.derivatives import pullback
from ticketlab.errors import Refused
from ticketlab.ntk.problem import Problem


def twice(problem: Problem, weights: Mapping[str, Tensor], blocks: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    """J (J' v) by two derivatives; None where autograd lacks the second, or it is not the adjoint of the first."""
    inner, live = list(weights.values()), [problem.live.get(name) for name in weights]

    def pull(x: Tensor, part: Tensor, twice: bool = False) -> tuple[Tensor, ...]:
        return pullback(problem.forward(x), inner, part, create_graph=twice)

    def push(x: Tensor, part: Tensor) -> Tensor:
        u = torch.zeros_like(part, requires_grad=True)
        pairs = [(g, step) for g, step in zip(pull(x, u, True), steps, strict=True) if g.requires_grad]
        along = [(g * step).sum() for g, step in pairs]
        return pullback(torch.stack(along).sum(), [u])[0] if along else torch.zeros_like(part)

    try:
        steps = [torch.zeros_like(weight) for weight in inner]
        for x, part in blocks:
            for step, mask, gradient in zip(steps, live, pull(x, part), strict=True):
                step.add_(0 if mask is None else gradient * mask)
        found = torch.cat([push(x, part) for x, part in blocks])
    except (RuntimeError, Refused):
        return None
    vector = torch.cat([part for _, part in blocks])
    gap = (found * vector).sum() - torch.stack([step.square().sum() for step in steps]).sum()
    rounding = torch.finfo(found.dtype).eps ** (1 / 3) * found.norm() * vector.norm()
    return found.flatten() if gap.abs() <= rounding else None
