"""What a training step descends, and in which arithmetic."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ticketlab.data import Task
from ticketlab.engine.recipe import Recipe
from ticketlab.losses import Loss


def training_loss(net: nn.Module, x: Tensor, y: Tensor, task: Task, recipe: Recipe) -> Tensor:
    """The loss of a batch: the forward pass in the recipe's precision, the loss itself in the dtype of the weights."""
    with autocast(recipe, x.device):
        outputs = net(x)
    return objective(task, recipe).mean(unrounded(recipe, outputs), y)


def objective(task: Task, recipe: Recipe) -> Loss:
    """What is descended; what is evaluated is the task's plain loss."""
    return task.objective.smoothed(recipe.label_smoothing)


def autocast(recipe: Recipe, device: torch.device, cache_enabled: bool = True) -> AbstractContextManager[Any]:
    """Where the forward pass of a training step is computed."""
    if recipe.precision != "bfloat16":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=cache_enabled)


def unrounded(recipe: Recipe, outputs: Tensor) -> Tensor:
    """Outputs in the dtype that the loss is computed in."""
    return outputs.float() if recipe.precision == "bfloat16" else outputs
