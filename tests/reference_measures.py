"""Slow, obvious versions of the measures. They share no code with the library beyond the data."""

from __future__ import annotations

import copy

import torch
from reference import loss_and_error
from torch import Tensor, nn


def batchnorm_anew(model: nn.Module, x: Tensor, batch_size: int = 500) -> nn.Module:
    """Running statistics by torch's own cumulative average (``momentum=None``) over whole batches."""
    net = copy.deepcopy(model).eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    size = min(batch_size, len(x))
    with torch.no_grad():
        for first in range(0, len(x) - size + 1, size):
            net(x[first : first + size])
    return net.eval()


def network_between(one: nn.Module, two: nn.Module, masks: dict[str, Tensor], alpha: float) -> nn.Module:
    """A copy at (1 - alpha) one + alpha two, floating buffers too, pruned weights at zero."""
    net, ends = copy.deepcopy(one), (one.state_dict(), two.state_dict())
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():
                first, second = ends[0][name], ends[1][name]
                between = (1 - alpha) * first + alpha * second
                tensor.copy_(torch.where(first == second, first, between))  # infinite ones too
        for name, mask in masks.items():
            net.get_parameter(name)[~mask] = 0.0
    return net


def path_alone(
    one: nn.Module,
    two: nn.Module,
    task: object,
    alphas: list[float],
    *,
    masks: dict[str, Tensor] | None = None,
    recalibrate: bool = True,
    split: str = "test",
) -> tuple[list[float], list[float]]:
    """Loss and error at each alpha, one network and one example at a time."""
    data = getattr(task, split)
    losses, errors = [], []
    for alpha in alphas:
        net = network_between(one, two, masks or {}, alpha)
        net = batchnorm_anew(net, task.train.x) if recalibrate else net  # type: ignore[attr-defined]
        loss, error = loss_and_error(net, data.x, data.y)
        losses.append(loss)
        errors.append(error)
    return losses, errors
