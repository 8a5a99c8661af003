"""Dynamic sparse training one weight at a time, in plain Python; shares no code with the library beyond the data."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ticketlab.data import Task, batch_indices
from ticketlab.engine.recipe import Recipe


def drop_grow(mask: Tensor, weight: Tensor, scores: Tensor, drop_fraction: float) -> Tensor:
    """Sort lists of indices; of equal scores the lower index wins."""
    live = [i for i, m in enumerate(mask.flatten().tolist()) if m]
    n_drop = math.floor(len(live) * drop_fraction)
    w, g = weight.flatten().tolist(), scores.flatten().tolist()
    strongest = sorted(live, key=lambda i: (-abs(w[i]), i))
    stay = strongest[: len(live) - n_drop]
    others = sorted((i for i in range(mask.numel()) if i not in set(stay)), key=lambda i: (-g[i], i))
    new = torch.zeros(mask.numel(), dtype=torch.bool)
    for i in stay + others[:n_drop]:
        new[i] = True
    return new.view_as(mask)


class Adam:
    """Kingma & Ba's algorithm 1 on one tensor, moments in the open."""

    def __init__(self, weight: Tensor):
        self.m, self.v, self.t = torch.zeros_like(weight), torch.zeros_like(weight), 0

    def change(self, gradient: Tensor, rate: float) -> Tensor:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        return -rate * (self.m / (1 - 0.9**self.t)) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8)

    def forget(self, where: Tensor) -> None:
        self.m[where], self.v[where] = 0.0, 0.0


class Momentum:
    """Heavy ball on one tensor."""

    def __init__(self, weight: Tensor):
        self.b = torch.zeros_like(weight)

    def change(self, gradient: Tensor, rate: float) -> Tensor:
        self.b = 0.9 * self.b + gradient
        return -rate * self.b

    def forget(self, where: Tensor) -> None:
        self.b[where] = 0.0


def train_rigl_alone(
    model: nn.Module,
    masks: dict[str, Tensor],
    task: Task,
    recipe: Recipe,
    order_seed: int,
    every: int,
    alpha: float,
    until: float,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """One network by RigL with an optimizer written out; returns it with its last masks."""
    net = copy.deepcopy(model).train()
    masks = {name: mask.clone() for name, mask in masks.items()}
    named = dict(net.named_parameters())
    optimizers = {name: (Adam if recipe.optimizer == "adam" else Momentum)(p.detach()) for name, p in named.items()}
    end = until * recipe.steps
    for name, mask in masks.items():
        named[name].data[~mask] = 0.0
    for step in range(recipe.steps):
        index = batch_indices(len(task.train), recipe.batch_size, order_seed, step)
        net.zero_grad()
        F.cross_entropy(net(task.train.x[index]), task.train.y[index]).backward()
        if step > 0 and step % every == 0 and step <= end:
            fraction = alpha / 2 * (1 + math.cos(math.pi * step / end))
            for name, mask in masks.items():
                new = drop_grow(mask, named[name].detach(), named[name].grad.abs(), fraction)
                named[name].data[~new | ~mask] = 0.0
                optimizers[name].forget(~new | ~mask)
                masks[name] = new
            continue
        for name, p in named.items():
            gradient = p.grad * masks[name] if name in masks else p.grad
            p.data += optimizers[name].change(gradient, recipe.learning_rate_at(step))
    return net, masks
