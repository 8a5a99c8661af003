"""Slow, obvious versions of the pruning criteria: copies of modules, loops over examples, plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Named = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def network(model: nn.Module | Callable[[], nn.Module], masks: Named) -> nn.Module:
    """A copy in evaluation mode, pruned weights at zero; a fresh module where hooks or closures forbid a copy."""
    net = (copy.deepcopy(model) if isinstance(model, nn.Module) else model()).eval()
    named = dict(net.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            named[name][~mask] = 0.0
    return net


def weights(net: nn.Module, masks: Named) -> list[Tensor]:
    named = dict(net.named_parameters())
    return [named[name] for name in masks]


def collect(masks: Named, scores: list[Tensor]) -> Named:
    return {name: score.detach() for name, score in zip(masks, scores, strict=True)}


def snip(model: nn.Module, masks: Named, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy) -> Named:
    net = network(model, masks)
    loss(net(x), y).backward()
    return collect(masks, [(w.grad * w).abs() for w in weights(net, masks)])


def grasp(
    model: nn.Module, masks: Named, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy, temperature: float = 200
) -> Named:
    net = network(model, masks)
    some = weights(net, masks)
    gradient = torch.autograd.grad(loss(net(x) / temperature, y), some, create_graph=True)
    sum((g * g.detach()).sum() for g in gradient).backward()
    return collect(masks, [w * w.grad for w in some])


def synflow(model: nn.Module, masks: Named, x: Tensor) -> Named:
    net = network(model, masks).double()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            tensor.copy_(tensor.abs() * (not name.endswith(("bias", "running_mean"))))
    net(torch.ones(1, *x.shape[1:], dtype=torch.float64)).sum().backward()
    return collect(masks, [(w.grad * w).abs() for w in weights(net, masks)])


def hessian_diagonal(model: nn.Module, masks: Named, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy) -> Named:
    """One weight after another, differentiated twice."""
    net = network(model, masks)
    some = weights(net, masks)
    gradient = torch.autograd.grad(loss(net(x), y), some, create_graph=True)
    diagonal = [torch.zeros_like(w) for w in some]
    for w, g, h in zip(some, gradient, diagonal, strict=True):
        for i in range(w.numel() if g.requires_grad else 0):
            second = torch.autograd.grad(g.flatten()[i], w, retain_graph=True, allow_unused=True)[0]
            h.view(-1)[i] = 0 if second is None else second.flatten()[i]
    return collect(masks, diagonal)


def gauss_newton_diagonal(
    model: nn.Module, masks: Named, x: Tensor, y: Tensor | None = None, loss: Loss = F.cross_entropy
) -> Named:
    """J^T H J, from the Jacobian of each example and the Hessian of its loss in its outputs written out."""
    net = network(model, masks)
    some = weights(net, masks)
    diagonal = [torch.zeros_like(w) for w in some]
    labels = torch.zeros(len(x), dtype=torch.int64) if y is None else y  # cross-entropy: they play no part
    for one, label in zip(x, labels, strict=True):
        outputs = net(one[None])[0]
        of_example = partial(_of_one, loss, label, outputs.shape)
        curvature = torch.autograd.functional.hessian(of_example, outputs.detach().flatten())
        rows = [torch.autograd.grad(output, some, retain_graph=True) for output in outputs.flatten()]
        for h, *jacobian in zip(diagonal, *rows, strict=True):
            j = torch.stack(jacobian)  # [output, *weight]
            h.add_(torch.einsum("c...,cd,d...->...", j, curvature, j), alpha=1 / len(x))
    return collect(masks, diagonal)


def _of_one(loss: Loss, label: Tensor, shape: torch.Size, flat: Tensor) -> Tensor:
    return loss(flat.view(1, *shape), label[None])


def fisher_diagonal(model: nn.Module, masks: Named, x: Tensor, y: Tensor, loss: Loss = F.cross_entropy) -> Named:
    net = network(model, masks)
    some = weights(net, masks)
    diagonal = [torch.zeros_like(w) for w in some]
    for one, label in zip(x, y, strict=True):
        for h, g in zip(diagonal, torch.autograd.grad(loss(net(one[None]), label[None]), some), strict=True):
            h.add_(g**2, alpha=1 / len(x))
    return collect(masks, diagonal)


def above_both_percentiles(one: Tensor, other: Tensor, n_keep: int) -> Tensor:
    """Bisection for the percentile that leaves ``n_keep`` above it in both; the scores have no ties."""

    def above(percentile: float) -> Tensor:
        thresholds = (torch.quantile(scores, percentile, interpolation="lower") for scores in (one, other))
        return (one > next(thresholds)) & (other > next(thresholds))

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if int(above(middle).sum()) > n_keep else (low, middle)
    return above(high)
