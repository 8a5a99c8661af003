"""Slow, obvious versions of what the library does fast. They share no code with it beyond the data."""

from __future__ import annotations

import copy
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ticketlab.batches import noise_seed
from ticketlab.data import Task, batch_indices, crop_flip
from ticketlab.engine.recipe import Recipe


def train_alone(
    model: nn.Module,
    masks: dict[str, Tensor],
    task: Task,
    recipe: Recipe,
    order_seed: int,
    first_step: int = 0,
    frozen: bool = False,
    learning_rate: float | None = None,
    copies: bool = True,
    spared: tuple[str, ...] = (),
    noise: bool = False,
    fused: bool = False,
) -> nn.Module:
    """A plain PyTorch loop over one network: masks on weights and gradients, an unfused optimizer.

    ``spared`` are the names of the parameters without weight decay, for a recipe that does not decay all. With
    ``noise``, the global generators are seeded before each step.
    """
    net = (copy.deepcopy(model) if copies else model).train()
    named = dict(net.named_parameters())
    dead = {name: named[name].detach().clone()[~mask] * float(frozen) for name, mask in masks.items()}
    with torch.no_grad():
        for name, mask in masks.items():
            named[name][~mask] = dead[name]
    options = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay, "foreach": False, "fused": fused}
    groups = [
        {"params": [p for n, p in named.items() if n not in spared]},
        {"params": [named[n] for n in spared], "weight_decay": 0.0},
    ]
    if callable(recipe.optimizer):
        optimizer = recipe.optimizer(list(named.values()))
    elif recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=recipe.nesterov, **options)
    elif recipe.optimizer == "adam":
        optimizer = torch.optim.Adam(groups, **options)
    else:
        optimizer = torch.optim.AdamW(groups, **options)
    for step in range(first_step, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step) if learning_rate is None else learning_rate
        index = batch_indices(len(task.train), recipe.batch_size, order_seed, step)
        x, y = task.train.x[index], task.train.y[index]
        if task.augmentation == "crop_flip":
            x = crop_flip(x, order_seed, step)
        if noise:
            torch.manual_seed(noise_seed(order_seed, step))
            np.random.seed(noise_seed(order_seed, step))
            random.seed(noise_seed(order_seed, step))
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            outputs = net(x)
        outputs = outputs.float() if recipe.precision == "bfloat16" else outputs
        F.cross_entropy(outputs, y, label_smoothing=recipe.label_smoothing).backward()
        for name, mask in masks.items():
            if named[name].grad is not None:  # None: this pass has not used it
                named[name].grad[~mask] = 0.0
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(net.parameters(), recipe.clip_norm)
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                named[name][~mask] = dead[name]
    return net


@torch.no_grad()
def loss_and_error(model: nn.Module, x: Tensor, y: Tensor, copies: bool = True) -> tuple[float, float]:
    """One example at a time, in evaluation mode."""
    net = (copy.deepcopy(model) if copies else model).eval()
    losses, wrong = [], 0
    for one, label in zip(x, y, strict=True):
        logits = net(one[None].clone())[0].double()
        losses.append(float(torch.logsumexp(logits, 0) - logits[label]))
        wrong += int(logits.argmax() != label)
    return sum(losses) / len(losses), wrong / len(y)


def prune_sorted(masks: dict[str, Tensor], scores: dict[str, Tensor], n_remove: int) -> dict[str, Tensor]:
    """Remove the least-scored live weights one by one; of equal scores the later one goes first."""
    live = [
        (float(scores[name].flatten()[i]), -layer, -i, name)
        for layer, name in enumerate(masks)
        for i in range(masks[name].numel())
        if masks[name].flatten()[i]
    ]
    new = {name: mask.clone() for name, mask in masks.items()}
    for _, _, negative, name in sorted(live)[:n_remove]:
        new[name].view(-1)[-negative] = False
    return new
