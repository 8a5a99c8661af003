"""The one training loop: R replicas of one architecture, each with its own start, mask and batch order.

The data set lies on the device as tensors, an optimizer of torch.optim works in place on the stacked
weights, and a pruned weight stays exactly zero because its gradient is masked: with zero weight, zero
gradient and zero state, SGD, Adam and AdamW all leave it there. How the stack is computed (a loop over
replicas, a thread each, or ``vmap``) is chosen in ``functional.resolve``; the numbers are the same.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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

from ticketlab.data import Split, Task, batch_indices, crop_flip
from ticketlab.engine.recipe import Recipe
from ticketlab.functional import Execution, Masks, State, evaluate, masked, n_replicas, resolve


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
    execution: Execution = "auto",
    description: str = "train",
    progress: bool = True,
) -> Outcome:
    """Train R replicas from ``first_step`` to ``recipe.steps`` with fresh optimizer state.

    Schedule and batch order go on from ``first_step``: replica r takes at step t the batch that
    ``order_seeds[r]`` gives to step t. A replica whose validation loss turns non-finite is reported by a
    warning, put back to its last finite evaluation and left there; the others are not touched.

    Args:
        model: The architecture; its own weights, buffers and mode are not used or changed.
        start: Stacked parameters and buffers, on the task's device.
        masks: Stacked, True = kept.
        task: Data on one device.
        recipe: Optimizer, schedule, batch size.
        order_seeds: R seeds of batch orders.
        first_step: The rewind step k.
        snapshot_steps: Steps in [first_step, steps] at which the networks are kept.
        execution: How the stack is computed.
        description: Label of the progress bar.
        progress: Show a progress bar where the output is a terminal.

    Raises:
        ValueError: Shapes that do not fit, steps out of range, or a model with active dropout, whose
            random numbers no seed of ours reaches.
    """
    _check(model, start, masks, recipe, order_seeds, first_step, snapshot_steps)
    began = time.perf_counter()
    live = State(masked(start.params, masks), start.buffers).clone()
    make = {"loop": _loop, "vmap": _vmap}[resolve(execution, model, task.device, len(order_seeds))]
    advance = make(model, live, masks, task, recipe, order_seeds)
    watch = _Watch(model, live, task, execution)
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
    metrics = watch.metrics()
    return Outcome(live, snapshots, metrics, pd.DataFrame(watch.rows), time.perf_counter() - began)


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
        raise ValueError(
            f"start must be stacked with one replica for each order seed: got {replicas or 'no'} replica axis "
            f"for {len(order_seeds)} seeds. Stack networks with functional.stack_states."
        )
    if not 0 <= first_step < recipe.steps:
        raise ValueError(f"the first step must lie in [0, {recipe.steps}), before training ends: got {first_step}.")
    outside = [s for s in snapshot_steps if not first_step <= s <= recipe.steps]
    if outside:
        raise ValueError(f"snapshot steps must lie in [{first_step}, {recipe.steps}]: got {outside}.")
    wrong = [n for n, m in masks.items() if n not in start.params or m.shape != start.params[n].shape]
    if wrong:
        raise ValueError(f"masks must be stacked like the parameters: {wrong} are not.")
    if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules()):
        raise ValueError("dropout draws from a global generator and cannot be replayed: set p = 0 in every Dropout.")


def make_optimizer(recipe: Recipe, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The recipe's optimizer in its fused form: one pass over weights, gradients and state."""
    shared: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay, "fused": True}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(params, momentum=recipe.momentum, nesterov=recipe.nesterov, **shared)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer](params, **shared)


def _loop(
    model: nn.Module, live: State, masks: Masks, task: Task, recipe: Recipe, order_seeds: Sequence[int]
) -> Advance:
    """Each replica by itself on its slice of the stack; on a CPU a thread works on one replica at a time."""
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    replicas = []
    for r, seed in enumerate(order_seeds):
        # A leaf shares the storage of its slice, so the optimizer writes into the stack.
        leaves = {n: p[r].detach().requires_grad_(n in trainable) for n, p in live.params.items()}
        pruned = [(leaves[n], m[r].to(leaves[n].dtype)) for n, m in masks.items()]
        optimizer = make_optimizer(recipe, [leaves[n] for n in trainable])
        net = copy.deepcopy(model).to(task.device).train()  # functional_call swaps tensors: a module each
        forward = partial(functional_call, net, {**leaves, **{n: b[r] for n, b in live.buffers.items()}})
        replicas.append((forward, pruned, optimizer, seed))

    busy = [Lock() for _ in order_seeds]

    def run(r: int, steps: range) -> None:
        forward, pruned, optimizer, seed = replicas[r]
        with busy[r]:  # its earlier steps, begun before in another thread, come first
            for step, index in zip(steps, _orders(task, recipe, [seed], steps)[0], strict=True):
                x, y = _batch(task, index, seed, step)
                _descend(optimizer, pruned, F.cross_entropy(forward((x,)), y), recipe.learning_rate_at(step))

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
        frozen = sorted(set(range(len(order_seeds))) - set(alive))
        kept = live.select(frozen) if frozen else None
        orders = _orders(task, recipe, order_seeds, steps)
        for step, index in zip(steps, orders.transpose(0, 1), strict=True):
            batches = [_batch(task, i, seed, step) for i, seed in zip(index, order_seeds, strict=True)]
            x, y = (torch.stack(tensors) for tensors in zip(*batches, strict=True))  # [replica, batch, ...]
            logits = forward({**leaves, **live.buffers}, x)  # [replica, batch, classes]
            # A sum over replicas of means over batches: gradients do not mix.
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / recipe.batch_size
            _descend(optimizer, pruned, loss, recipe.learning_rate_at(step))
        if kept is not None:
            _put_back(live, frozen, kept)

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


@torch.no_grad()
def _put_back(live: State, replicas: Sequence[int], kept: State) -> None:
    for part, saved in zip(live, kept, strict=True):
        for name, tensor in part.items():
            tensor[list(replicas)] = saved[name]


@dataclass
class _Watch:
    """Evaluation during training: validation curves, the early-stop network, and who is still finite."""

    model: nn.Module
    live: State
    task: Task
    execution: Execution
    rows: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        replicas = len(next(iter(self.live.params.values())))
        self.alive = list(range(replicas))
        self.last, self.best = self.live.clone(), self.live.clone()
        self.best_loss = [math.inf] * replicas
        self.best_step: list[int | None] = [None] * replicas
        self.diverged_step: list[int | None] = [None] * replicas

    def look(self, step: int) -> None:
        loss, error = self._evaluate(self.live, self.task.validation)
        for r in list(self.alive):
            if not math.isfinite(loss[r]):
                self._freeze(r, step)
                continue
            self.rows.append({"replica": r, "step": step, "loss_nats": loss[r], "error": error[r]})
            if loss[r] < self.best_loss[r]:
                self.best_loss[r], self.best_step[r] = loss[r], step
                _put_back(self.best, [r], self.live.select([r]))
        self.last = self.live.clone()

    def metrics(self) -> pd.DataFrame:
        replicas = range(len(self.best_loss))
        steps = {"early_stop_step": self.best_step, "diverged_step": self.diverged_step}
        table = pd.DataFrame({"replica": replicas, **steps}).astype(dict.fromkeys(steps, "Int64"))
        splits = {"train": self.task.train, "validation": self.task.validation, "test": self.task.test}
        for name, split in splits.items():
            table[f"{name}_loss_nats"], table[f"{name}_error"] = self._evaluate(self.live, split)
        for name in ("validation", "test"):
            loss, error = self._evaluate(self.best, splits[name])
            table[f"early_stop_{name}_loss_nats"], table[f"early_stop_{name}_error"] = loss, error
        # A training that diverged has no result, whatever its last finite weights score.
        results = [c for c in table if c.endswith(("_nats", "_error"))]
        table.loc[table["diverged_step"].notna(), results] = math.nan
        return table

    def _freeze(self, r: int, step: int) -> None:
        _put_back(self.live, [r], self.last.select([r]))
        self.alive.remove(r)
        self.diverged_step[r] = step
        warnings.warn(
            f"replica {r} has a non-finite validation loss at step {step}: it is frozen at its last finite "
            "evaluation and its results are NaN. Lower the learning rate or warm it up.",
            RuntimeWarning,
            stacklevel=3,
        )

    def _evaluate(self, state: State, split: Split) -> tuple[list[float], list[float]]:
        loss, error = evaluate(
            self.model, state.params, split.x, split.y, buffers=state.buffers, execution=self.execution
        )
        return loss.tolist(), error.tolist()
