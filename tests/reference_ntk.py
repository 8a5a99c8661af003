"""The Jacobian by its definition: plain autograd on a model of its own, one call for each example and output."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def one_gradient_at_a_time(
    model: nn.Module, params: Mapping[str, Tensor], x: Tensor, live: Mapping[str, Tensor] | None = None
) -> Tensor:
    """J [n, out, k] of a model that is used up: it holds ``params`` afterwards."""
    own = dict(model.eval().named_parameters())
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(params[name])
    live = (
        {n: torch.ones_like(p, dtype=torch.bool) for n, p in own.items() if p.requires_grad} if live is None else live
    )
    rows = []
    for example in x:
        for value in model(example[None].clone()).flatten():
            grads = torch.autograd.grad(
                value, [own[n] for n in live], retain_graph=True, allow_unused=True, materialize_grads=True
            )
            rows.append(torch.cat([grad.to_dense()[mask] for grad, mask in zip(grads, live.values(), strict=True)]))
    return torch.stack(rows).view(len(x), -1, len(rows[0]))


def plain_kernel(build: Callable[[], nn.Module], params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """J J' as [n, out, n, out] of a fresh model, in every trainable parameter."""
    rows = one_gradient_at_a_time(build(), params, x)
    return torch.einsum("nok,mpk->nomp", rows, rows)
