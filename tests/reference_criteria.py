"""Slow, obvious versions of the pruning criteria: copies of modules, loops over examples, plain autograd."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Named = dict[str, Tensor]


def network(model: nn.Module, masks: Named) -> nn.Module:
    """A copy in evaluation mode, pruned weights at zero."""
    net = copy.deepcopy(model).eval()
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


def snip(model: nn.Module, masks: Named, x: Tensor, y: Tensor) -> Named:
    net = network(model, masks)
    F.cross_entropy(net(x), y).backward()
    return collect(masks, [(w.grad * w).abs() for w in weights(net, masks)])


def grasp(model: nn.Module, masks: Named, x: Tensor, y: Tensor) -> Named:
    net = network(model, masks)
    some = weights(net, masks)
    gradient = torch.autograd.grad(F.cross_entropy(net(x) / 200, y), some, create_graph=True)
    sum((g * g.detach()).sum() for g in gradient).backward()
    return collect(masks, [w * w.grad for w in some])


def synflow(model: nn.Module, masks: Named, x: Tensor) -> Named:
    net = network(model, masks).double()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            tensor.copy_(tensor.abs() * (not name.endswith(("bias", "running_mean"))))
    net(torch.ones(1, *x.shape[1:], dtype=torch.float64)).sum().backward()
    return collect(masks, [(w.grad * w).abs() for w in weights(net, masks)])


def hessian_diagonal(model: nn.Module, masks: Named, x: Tensor, y: Tensor) -> Named:
    """One weight after another, differentiated twice."""
    net = network(model, masks)
    some = weights(net, masks)
    gradient = torch.autograd.grad(F.cross_entropy(net(x), y), some, create_graph=True)
    diagonal = [torch.zeros_like(w) for w in some]
    for w, g, h in zip(some, gradient, diagonal, strict=True):
        for i in range(w.numel()):
            h.view(-1)[i] = torch.autograd.grad(g.flatten()[i], w, retain_graph=True)[0].flatten()[i]
    return collect(masks, diagonal)


def gauss_newton_diagonal(model: nn.Module, masks: Named, x: Tensor) -> Named:
    """J^T (diag(p) - p p^T) J, from the Jacobian of each example written out."""
    net = network(model, masks)
    some = weights(net, masks)
    diagonal = [torch.zeros_like(w) for w in some]
    for one in x:
        logits = net(one[None])[0]
        p = logits.softmax(0).detach()
        curvature = torch.diag(p) - torch.outer(p, p)
        rows = [torch.autograd.grad(logit, some, retain_graph=True) for logit in logits]
        for h, *jacobian in zip(diagonal, *rows, strict=True):
            j = torch.stack(jacobian)  # [class, *weight]
            h.add_(torch.einsum("c...,cd,d...->...", j, curvature, j), alpha=1 / len(x))
    return collect(masks, diagonal)


def fisher_diagonal(model: nn.Module, masks: Named, x: Tensor, y: Tensor) -> Named:
    net = network(model, masks)
    some = weights(net, masks)
    diagonal = [torch.zeros_like(w) for w in some]
    for one, label in zip(x, y, strict=True):
        for h, g in zip(diagonal, torch.autograd.grad(F.cross_entropy(net(one[None]), label[None]), some), strict=True):
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
