"""A training step: its batch, what it descends, in which arithmetic, and the descent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ticketlab.batches import batch_orders, crop_flip_draws, crop_flipped
from ticketlab.data import Task
from ticketlab.engine import ranks
from ticketlab.engine.recipe import Recipe
from ticketlab.engine.start import Start
from ticketlab.losses import Loss
from ticketlab.shown import as_line, as_table


@dataclass(frozen=True)
class Advance:
    """What moves a stack through a range of steps."""

    run: Callable[[range, Sequence[int]], None]
    """(steps, replicas still alive)."""
    optimizers: Sequence[torch.optim.Optimizer]
    """All that has a state, in an order that does not change."""
    how: str
    """The way that was taken: loop, vmap, recorded loop or recorded stack."""

    __repr__, _repr_html_ = as_line, as_table

    def __call__(self, steps: range, alive: Sequence[int]) -> None:
        self.run(steps, alive)


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


def orders(task: Task, recipe: Recipe, order_seeds: Sequence[int], steps: range) -> Tensor:
    """Indices of the batches of many steps, moved to the device at once: [replica, step, batch]."""
    each = [batch_orders(len(task.train), recipe.batch_size, seed, steps) for seed in order_seeds]
    return torch.stack(each).to(task.device)


def batch(task: Task, index: Tensor, order_seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets: of several processes that train together, this one's share of them."""
    part = ranks.share(len(index))
    x, y = task.train.x[index[part]], task.train.y[index[part]]
    if task.augmentation == "crop_flip":
        x = crop_flipped(x, crop_flip_draws(len(index), order_seed, step)[:, part].to(x.device))
    return x, y


def batches(task: Task, index: Tensor, starts: Sequence[Start], step: int) -> tuple[Tensor, Tensor]:
    """Of every replica: [replica, batch, ...]."""
    each = [batch(task, i, start.order_seed, step) for i, start in zip(index, starts, strict=True)]
    x, y = (torch.stack(tensors) for tensors in zip(*each, strict=True))
    return x, y


def descend(
    optimizer: torch.optim.Optimizer,
    pruned: Sequence[tuple[Tensor, Tensor]],
    loss: Tensor,
    learning_rate: float,
    clip: Callable[[], None] | None = None,
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    ranks.add_gradients(optimizer)
    for weight, mask in pruned:
        if weight.grad is not None:  # None: the forward pass does not use this weight
            weight.grad.mul_(mask)
    if clip is not None:
        clip()
    optimizer.step()
