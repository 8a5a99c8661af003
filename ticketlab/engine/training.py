"""The one training loop: R replicas of one architecture, each with its own start, mask and batch order.

The data set lies on the device as tensors, an optimizer of torch.optim works in place on the stacked
weights, and a pruned weight stays where it starts, at zero or ``frozen`` at its own value, because its
gradient is masked: SGD and Adam with zero gradient and zero state leave a weight where it is. Weight decay
leaves a zero where it is too, but nothing else, so the two exclude each other. How the stack is computed
(a loop over replicas, a thread each, or ``vmap``) is chosen in ``functional.resolve``; the numbers are the same.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from threading import Lock
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from tqdm import tqdm

from ticketlab.data import Task, batch_indices, crop_flip
from ticketlab.engine.dynamic import Dynamics, validate
from ticketlab.engine.recipe import Recipe
from ticketlab.engine.watch import Watch, put_back
from ticketlab.errors import Refused
from ticketlab.functional import Execution, masked, n_replicas, resolve
from ticketlab.state import Masks, State, select


@dataclass(frozen=True)
class Outcome:
    """What training leaves. Tensors have the replica axis first; tables have a ``replica`` column."""

    end: State
    snapshots: dict[int, State]
    """The networks after so many steps of the whole schedule."""
    metrics: pd.DataFrame
    """One row a replica: loss and error on every split at the end and at the early-stop step."""
    curves: pd.DataFrame
    """replica, step, loss_nats, error on the validation set."""
    wall_seconds: float
    masks: Masks
    """As given, or where ``dynamics`` have moved them; of a diverged replica, at its last finite evaluation."""


Advance = Callable[[range, Sequence[int]], None]


def train(
    model: nn.Module,
    start: State,
    masks: Masks,
    task: Task,
    recipe: Recipe,
    order_seeds: Sequence[int],
    *,
    first_step: int = 0,
    snapshot_steps: Sequence[int] = (),
    frozen: Sequence[bool] | None = None,
    learning_rates: Sequence[float | None] | None = None,
    dynamics: Sequence[Dynamics | None] | None = None,
    execution: Execution = "auto",
    description: str = "train",
    progress: bool = True,
) -> Outcome:
    """Train R replicas from ``first_step`` to ``recipe.steps`` with fresh optimizer state.

    Schedule and batch order go on from ``first_step``: replica r takes at step t the batch that
    ``order_seeds[r]`` gives to step t. A replica whose validation loss turns non-finite is reported by a
    warning, put back to its last finite evaluation and left there; the others are not touched.

    Where replicas have rates or dynamics of their own, each has its own optimizer too: such a stack is trained by
    the loop and never by ``vmap``.

    Args:
        model: The architecture; its own weights, buffers and mode are not used or changed.
        start: Stacked parameters and buffers, on the task's device.
        masks: Stacked, True = kept.
        task: Data on one device.
        recipe: Optimizer, schedule, batch size.
        order_seeds: R seeds of batch orders.
        first_step: The rewind step k.
        snapshot_steps: Steps in [first_step, steps] at which the networks are kept.
        frozen: For each replica, whether pruned weights stay at their values in ``start`` instead of becoming
            zero (Zhou et al. 2019); none when None.
        learning_rates: For each replica, a constant rate in place of the recipe's schedule, as in fine-tuning
            at the final rate, or None; none when None.
        dynamics: For each replica, how its mask moves while it trains (RigL, SET, gradual pruning), or None
            where it stays; all stay when None. The early-stop network has the mask of its own step.
        execution: How the stack is computed.
        description: Label of the progress bar.
        progress: Show a progress bar where the output is a terminal.

    Raises:
        Refused: Shapes or lengths that do not fit, steps or rates out of range, frozen weights under weight
            decay or beside dynamics, which would move them, ``vmap`` where the loop is needed, or a model that
            draws from a global generator as it trains, such as by dropout: no seed of ours reaches it.
    """
    _check(model, start, masks, recipe, order_seeds, first_step, snapshot_steps)
    _check_each(masks, recipe, order_seeds, frozen, learning_rates, dynamics, execution)
    _refuse_draws(model, start, task, recipe)
    began = time.perf_counter()
    live = State(masked(start.params, masks), start.buffers).clone()
    masks = {name: mask.clone() for name, mask in masks.items()}
    if frozen and any(frozen):
        kept = [r for r, stays in enumerate(frozen) if stays]
        put_back(live, kept, start.select(kept))
    if _own_optimizers(learning_rates, dynamics):
        advance = _loop(model, live, masks, task, recipe, order_seeds, learning_rates, dynamics)
    else:
        make = {"loop": _loop, "vmap": _vmap}[resolve(execution, model, task.device, len(order_seeds))]
        advance = make(model, live, masks, task, recipe, order_seeds)
    watch = Watch(model, live, masks, task, execution)
    snapshots = {first_step: live.clone()} if first_step in snapshot_steps else {}
    looks = {*range(0, recipe.steps, recipe.eval_every), recipe.steps}
    stops = sorted(step for step in looks | set(snapshot_steps) if step > first_step)
    hidden = None if progress else True  # None: tqdm hides itself where the output is not a terminal
    with tqdm(total=recipe.steps - first_step, desc=description, unit="step", disable=hidden) as bar:
        for begin, end in pairwise([first_step, *stops]):
            advance(range(begin, end), watch.alive)
            if end in looks:
                watch.look(end)
            if end in snapshot_steps:
                snapshots[end] = live.clone()
            bar.update(end - begin)
    metrics, curves = watch.metrics(), pd.DataFrame(watch.rows)
    return Outcome(live, snapshots, metrics, curves, time.perf_counter() - began, masks)


def _check(
    model: nn.Module,
    start: State,
    masks: Masks,
    recipe: Recipe,
    order_seeds: Sequence[int],
    first_step: int,
    snapshot_steps: Sequence[int],
) -> None:
    replicas = n_replicas(model, start.params)
    if replicas is None or replicas != len(order_seeds):
        raise Refused(
            f"start must be stacked with one replica for each order seed: got {replicas or 'no'} replica axis "
            f"for {len(order_seeds)} seeds. Stack networks with functional.stack_states."
        )
    if not 0 <= first_step < recipe.steps:
        raise Refused(f"the first step must lie in [0, {recipe.steps}), before training ends: got {first_step}.")
    outside = [s for s in snapshot_steps if not first_step <= s <= recipe.steps]
    if outside:
        raise Refused(f"snapshot steps must lie in [{first_step}, {recipe.steps}]: got {outside}.")
    wrong = [n for n, m in masks.items() if n not in start.params or m.shape != start.params[n].shape]
    if wrong:
        raise Refused(f"masks must be stacked like the parameters: {wrong} are not.")


def _refuse_draws(model: nn.Module, start: State, task: Task, recipe: Recipe) -> None:
    """Raise where a forward pass in training mode draws from a global generator, and leave that as it was."""
    found = [name or "the model" for name, m in model.named_modules() if _dropout(m) > 0]
    if found:
        raise Refused(
            f"dropout draws from a global generator and cannot be replayed: set its probability to 0 in {found}."
        )
    net = copy.deepcopy(model).to(task.device).train()
    params, buffers = start.select(0).clone()
    cuda = [task.device] if task.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=cuda):
        before = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda)]
        functional_call(net, {**params, **buffers}, (task.train.x[: recipe.batch_size],))
        after = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda)]
    if not all(map(torch.equal, before, after)):
        raise Refused(
            "the model draws from a global generator as it trains, which cannot be replayed: its forward pass advanced "
            "the generator's state. Leave out dropout and other noise, or draw it from a generator of the model's own."
        )


def _dropout(module: nn.Module) -> float:
    """The probability that a module drops something with, 0 where it has none."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    return float(module.dropout) if isinstance(module, nn.MultiheadAttention | nn.RNNBase) else 0.0


def _check_each(
    masks: Masks,
    recipe: Recipe,
    order_seeds: Sequence[int],
    frozen: Sequence[bool] | None,
    learning_rates: Sequence[float | None] | None,
    dynamics: Sequence[Dynamics | None] | None,
    execution: Execution,
) -> None:
    """What is given replica by replica."""
    for name, each in (("frozen", frozen), ("learning_rates", learning_rates), ("dynamics", dynamics)):
        if each is not None and len(each) != len(order_seeds):
            raise Refused(f"{name} must have an entry for each of {len(order_seeds)} replicas: got {len(each)}.")
    if frozen and any(frozen) and recipe.weight_decay:
        raise Refused(
            f"weight decay would move frozen weights: got {recipe.weight_decay}. Set weight_decay = 0, or freeze none."
        )
    wrong = [rate for rate in learning_rates or () if rate is not None and not 0 < rate < math.inf]
    if wrong:
        raise Refused(f"learning rates must be positive and finite, or None for the schedule: got {wrong}.")
    for r, moves in enumerate(dynamics or ()):
        if moves is not None:
            if frozen and frozen[r]:
                raise Refused(f"a mask that moves needs pruned weights at zero: replica {r} is frozen. Choose one.")
            validate(moves, select(masks, r), recipe.steps)
    if execution == "vmap" and _own_optimizers(learning_rates, dynamics):
        raise Refused("replicas with rates or dynamics of their own need the loop: leave execution at 'auto'.")


def _own_optimizers(learning_rates: Sequence[float | None] | None, dynamics: Sequence[Dynamics | None] | None) -> bool:
    return any(each is not None for each in (*(learning_rates or ()), *(dynamics or ())))


def make_optimizer(recipe: Recipe, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The recipe's optimizer in its fused form: one pass over weights, gradients and state."""
    shared: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay, "fused": True}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(params, momentum=recipe.momentum, nesterov=recipe.nesterov, **shared)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer](params, **shared)


@dataclass(frozen=True)
class _Replica:
    """One network of the loop: its tensors are slices of the stack, its optimizer is its own."""

    forward: Callable[[tuple[Tensor, ...]], Tensor]
    pruned: list[tuple[Tensor, Tensor]]
    """Weights, and their masks in the same dtype, in the order of ``masks``."""
    masks: Masks
    optimizer: torch.optim.Optimizer
    order_seed: int
    learning_rate: float | None
    dynamics: Dynamics | None

    def run(self, task: Task, recipe: Recipe, steps: range) -> None:
        updates = self.dynamics.update_steps(recipe.steps) if self.dynamics else ()
        for step, index in zip(steps, _orders(task, recipe, [self.order_seed], steps)[0], strict=True):
            x, y = _batch(task, index, self.order_seed, step)
            loss = F.cross_entropy(self.forward((x,)), y)
            if step in updates:
                self._move_masks(loss, step, recipe.steps)
            else:
                rate = recipe.learning_rate_at(step) if self.learning_rate is None else self.learning_rate
                _descend(self.optimizer, self.pruned, loss, rate)

    def _move_masks(self, loss: Tensor, step: int, steps: int) -> None:
        """In place of a descent. What does not stay has neither weight nor optimizer state from here on."""
        assert self.dynamics is not None
        self.optimizer.zero_grad()
        loss.backward()
        for (name, old), (weight, mask) in zip(self.masks.items(), self.pruned, strict=True):
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad  # None: not used
            new = self.dynamics.next_mask(name, old, weight.detach(), gradient, step, steps)
            # .data: a detached slice shares the stack's version counter, and a backward pass may run beside us
            for tensor in (weight.data, *self.optimizer.state[weight].values()):
                if isinstance(tensor, Tensor) and tensor.shape == weight.shape:  # Adam's step counter is a scalar
                    tensor.mul_(new & old)
            old.copy_(new)
            mask.copy_(new)


def _loop(
    model: nn.Module,
    live: State,
    masks: Masks,
    task: Task,
    recipe: Recipe,
    order_seeds: Sequence[int],
    learning_rates: Sequence[float | None] | None = None,
    dynamics: Sequence[Dynamics | None] | None = None,
) -> Advance:
    """Each replica by itself on its slice of the stack; on a CPU a thread works on one replica at a time."""
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    replicas = []
    nothing: list[None] = [None] * len(order_seeds)
    for r, each in enumerate(zip(order_seeds, learning_rates or nothing, dynamics or nothing, strict=True)):
        # A leaf shares the storage of its slice, so the optimizer writes into the stack.
        leaves = {n: p[r].detach().requires_grad_(n in trainable) for n, p in live.params.items()}
        pruned = [(leaves[n], m[r].to(leaves[n].dtype)) for n, m in masks.items()]
        optimizer = make_optimizer(recipe, [leaves[n] for n in trainable])
        net = copy.deepcopy(model).to(task.device).train()  # functional_call swaps tensors: a module each
        forward = partial(functional_call, net, {**leaves, **{n: b[r] for n, b in live.buffers.items()}})
        replicas.append(_Replica(forward, pruned, select(masks, r), optimizer, *each))

    busy = [Lock() for _ in order_seeds]

    def run(r: int, steps: range) -> None:
        with busy[r]:  # its earlier steps, begun before in another thread, come first
            replicas[r].run(task, recipe, steps)

    def advance(steps: range, alive: Sequence[int]) -> None:
        cores = torch.get_num_threads() if task.device.type == "cpu" else 1
        workers = max(1, min(cores, len(alive)))
        if workers == 1:
            for r in alive:
                run(r, steps)
            return
        # Cut so that every thread gets as many parts: five replicas on two threads would leave one idle.
        size = -(-len(steps) // (workers // math.gcd(workers, len(alive))))
        parts = [(r, steps[i : i + size]) for i in range(0, len(steps), size) for r in alive]
        try:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(cores // workers,)) as pool:
                list(pool.map(run, *zip(*parts, strict=True)))
        finally:
            torch.set_num_threads(cores)  # threads made later start from the last value set anywhere

    return advance


def _vmap(
    model: nn.Module, live: State, masks: Masks, task: Task, recipe: Recipe, order_seeds: Sequence[int]
) -> Advance:
    """All replicas in one batched forward and backward pass; one optimizer on the stacked tensors."""
    net = copy.deepcopy(model).to(task.device).train()
    leaves = {n: live.params[n].detach().requires_grad_(p.requires_grad) for n, p in model.named_parameters()}
    pruned = [(leaves[n], m.to(leaves[n].dtype)) for n, m in masks.items()]
    optimizer = make_optimizer(recipe, [p for p in leaves.values() if p.requires_grad])
    forward = vmap(lambda tensors, x: functional_call(net, tensors, (x,)))

    def advance(steps: range, alive: Sequence[int]) -> None:
        stopped = sorted(set(range(len(order_seeds))) - set(alive))
        kept = live.select(stopped) if stopped else None
        orders = _orders(task, recipe, order_seeds, steps)
        for step, index in zip(steps, orders.transpose(0, 1), strict=True):
            batches = [_batch(task, i, seed, step) for i, seed in zip(index, order_seeds, strict=True)]
            x, y = (torch.stack(tensors) for tensors in zip(*batches, strict=True))  # [replica, batch, ...]
            logits = forward({**leaves, **live.buffers}, x)  # [replica, batch, classes]
            # A sum over replicas of means over batches: gradients do not mix.
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / recipe.batch_size
            _descend(optimizer, pruned, loss, recipe.learning_rate_at(step))
        if kept is not None:
            put_back(live, stopped, kept)

    return advance


def _orders(task: Task, recipe: Recipe, order_seeds: Sequence[int], steps: range) -> Tensor:
    """Indices of the batches of many steps, moved to the device at once: [replica, step, batch]."""
    batch = partial(batch_indices, len(task.train), recipe.batch_size)
    return torch.stack([torch.stack([batch(seed, step) for step in steps]) for seed in order_seeds]).to(task.device)


def _batch(task: Task, index: Tensor, order_seed: int, step: int) -> tuple[Tensor, Tensor]:
    x = task.train.x[index]
    return crop_flip(x, order_seed, step) if task.augmentation == "crop_flip" else x, task.train.y[index]


def _descend(
    optimizer: torch.optim.Optimizer, pruned: Sequence[tuple[Tensor, Tensor]], loss: Tensor, learning_rate: float
) -> None:
    optimizer.param_groups[0]["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    for weight, mask in pruned:
        if weight.grad is not None:  # None: the forward pass does not use this weight
            weight.grad.mul_(mask)
    optimizer.step()
