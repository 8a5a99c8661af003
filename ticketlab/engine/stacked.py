"""All replicas as one network, under vmap."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ticketlab.data import Task
from ticketlab.engine.loop import replica
from ticketlab.engine.optimizer import clipping, make_optimizer
from ticketlab.engine.recipe import Recipe
from ticketlab.engine.start import Start
from ticketlab.engine.step import (
    Advance,
    autocast,
    batch,
    batches,
    descend,
    objective,
    orders,
    training_loss,
    unrounded,
)
from ticketlab.engine.trainable import copied, put
from ticketlab.engine.watch import put_back
from ticketlab.probing import close
from ticketlab.shown import as_line, as_table
from ticketlab.state import Masks, State, stack


@dataclass(frozen=True)
class Stacked:
    """All replicas as one network."""

    leaves: dict[str, Tensor]
    """Parameters [replica, ...], those of the stack."""
    pruned: Sequence[tuple[Tensor, Tensor]]
    """Weights of it, and their masks in the same dtype."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """(inputs, targets), [replica, batch, ...] -> the sum of mean losses: gradients do not mix."""
    clip: Callable[[], None] | None

    __repr__, _repr_html_ = as_line, as_table


def stacked(
    model: nn.Module, live: State, masks: Masks, starts: Sequence[Start], task: Task, recipe: Recipe
) -> Stacked:
    leaves = {n: live.params[n].detach().requires_grad_(p.requires_grad) for n, p in model.named_parameters()}
    pruned = [(leaves[n], m.to(leaves[n].dtype)) for n, m in masks.items()]
    clip = clipping(recipe, [p for p in leaves.values() if p.requires_grad], stacked=True)
    net = copied(model)
    assert net is not None
    net.train()
    put(net, *starts[0].begun.clone())  # on the device, in the dtype
    forward = vmap(lambda tensors, x: functional_call(net, tensors, (x,)))
    losses = vmap(objective(task, recipe).mean)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with autocast(recipe, task.device, cache_enabled=False):  # a cache would hold what vmap wraps
            outputs = forward({**leaves, **live.buffers}, x)
        return losses(unrounded(recipe, outputs), y).sum()

    return Stacked(leaves, pruned, loss, clip)


def vmapped(
    model: nn.Module, live: State, masks: Masks, starts: Sequence[Start], task: Task, recipe: Recipe
) -> Advance:
    """All replicas in one batched forward and backward pass; one optimizer on the stacked tensors."""
    whole = stacked(model, live, masks, starts, task, recipe)
    optimizer = make_optimizer(recipe, model, whole.leaves)
    seeds = [start.order_seed for start in starts]

    def advance(steps: range) -> None:
        indices = orders(task, recipe, seeds, steps)
        for step, index in zip(steps, indices.transpose(0, 1), strict=True):
            loss = whole.loss(*batches(task, index, starts, step))
            descend(optimizer, whole.pruned, loss, recipe.learning_rate_at(step), whole.clip)

    return sparing(live, advance, optimizer)


def sparing(
    live: State, advance: Callable[[range], None], optimizer: torch.optim.Optimizer, how: str = "vmap"
) -> Advance:
    """Of a stack that moves as one: replicas that have stopped are put back."""
    replicas = range(len(next(iter(live.params.values()))))

    def spared(steps: range, alive: Sequence[int]) -> None:
        stopped = sorted(set(replicas) - set(alive))
        kept = live.select(stopped) if stopped else None
        advance(steps)
        if kept is not None:
            put_back(live, stopped, kept)

    return Advance(spared, [optimizer], how)


def why_not_vmap(model: nn.Module, live: State, starts: Sequence[Start], task: Task, recipe: Recipe) -> str | None:
    """The first batch both ways, in the dtype of the weights: gradients and buffers must agree but for rounding."""
    sound = [r for r in range(len(starts)) if all(p[r].isfinite().all() for p in live.params.values())]
    live, starts = live.select(sound), [starts[r] for r in sound]  # of NaN all is equal to all
    if not starts:
        return "no weights are finite"
    recipe = replace(recipe, precision="float32")
    alone, mapped = live.clone(), live.clone()
    index = orders(task, recipe, [start.order_seed for start in starts], range(1))[:, 0]
    gradients = []
    for r, start in enumerate(starts):
        one = replica(model, alone, {}, start, r, recipe, own=True)
        training_loss(one.net, *batch(task, index[r], start.order_seed, 0), task, recipe).backward()
        one._keep()
        gradients.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in one.net.named_parameters()})
    expected = stack(gradients)
    try:
        with warnings.catch_warnings():  # of operations without a rule: nothing comes of this attempt but a yes or no
            warnings.simplefilter("ignore")
            whole = stacked(model, mapped, {}, starts, task, recipe)
            whole.loss(*batches(task, index, starts, 0)).backward()
    except Exception as error:  # whatever an operation without a rule raises
        return str(error).strip().splitlines()[0]
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in whole.leaves.items()}
    steepest = max((float(g.abs().max()) for g in expected.values() if g.numel()), default=0.0)
    # A gradient that is zero but for rounding, as of the biases of keys, is no reason.
    near = {n: float((g - expected[n]).abs().max()) <= 1e-6 * steepest for n, g in found.items() if g.numel()}
    wrong = [n for n, g in found.items() if not near.get(n, True) and not close(g, expected[n])]
    wrong += [n for n, b in mapped.buffers.items() if not close(b.double(), alone.buffers[n].double())]
    return f"{wrong[:3]} differ from those of a loop" if wrong else None
