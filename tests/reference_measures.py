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


def network_between(
    model: nn.Module, params_a: dict[str, Tensor], params_b: dict[str, Tensor], masks: dict[str, Tensor], alpha: float
) -> nn.Module:
    """A copy of the model at (1 - alpha) a + alpha b, pruned weights at zero; its buffers are the model's."""
    net = copy.deepcopy(model)
    with torch.no_grad():
        for name, param in net.named_parameters():
            param.copy_((1 - alpha) * params_a[name] + alpha * params_b[name])
            if name in masks:
                param[~masks[name]] = 0.0
    return net


def path_alone(
    model: nn.Module,
    params_a: dict[str, Tensor],
    params_b: dict[str, Tensor],
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
        net = network_between(model, params_a, params_b, masks or {}, alpha)
        net = batchnorm_anew(net, task.train.x) if recalibrate else net  # type: ignore[attr-defined]
        loss, error = loss_and_error(net, data.x, data.y)
        losses.append(loss)
        errors.append(error)
    return losses, errors
