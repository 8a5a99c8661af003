"""Each replica by itself, a real copy of the module, as in a plain PyTorch loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from ticketlab.batches import noise_seed
from ticketlab.data import Task
from ticketlab.engine import ranks
from ticketlab.engine.optimizer import clipping, make_optimizer
from ticketlab.engine.recipe import Recipe
from ticketlab.engine.start import Start
from ticketlab.engine.step import Advance, batch, descend, orders, training_loss
from ticketlab.engine.trainable import copied, put
from ticketlab.errors import Refused
from ticketlab.lending import lent, recurrence_as_products
from ticketlab.seeds import seed_generators
from ticketlab.shown import as_line, as_table
from ticketlab.state import Masks, State, select


@dataclass(frozen=True)
class Replica:
    """One network of the loop: its tensors are slices of the stack, its optimizer is its own."""

    net: nn.Module
    slices: State
    own: bool
    """Whether ``net`` is a copy of its own, or the user's module, lent to one replica at a time."""
    pruned: Sequence[tuple[Tensor, Tensor]]
    """Weights, and their masks in the same dtype, in the order of ``masks``."""
    masks: Masks
    optimizer: torch.optim.Optimizer
    clip: Callable[[], None] | None
    start: Start
    draws: bool
    """Whether the global generators are seeded before each step."""

    __repr__, _repr_html_ = as_line, as_table

    def run(self, task: Task, recipe: Recipe, steps: range) -> None:
        dynamics, seed = self.start.dynamics, self.start.order_seed
        updates = dynamics.update_steps(recipe.steps) if dynamics else ()
        with self._holding(), self._reproducible(task.device):
            for step, index in zip(steps, orders(task, recipe, [seed], steps)[0], strict=True):
                if self.draws:
                    seed_generators(ranks.own_seed(noise_seed(seed, step)), task.device)
                x, y = batch(task, index, seed, step)
                value = training_loss(self.net, x, y, task, recipe)
                if ranks.size() > 1:
                    value = value * ranks.weight(len(index))
                if step in updates:
                    self._move_masks(value, step, recipe.steps)
                else:
                    own_rate = self.start.learning_rate
                    rate = recipe.learning_rate_at(step) if own_rate is None else own_rate
                    descend(self.optimizer, self.pruned, value, rate, self.clip)
                    if callable(recipe.optimizer):
                        self._pin()
            self._keep()
        ranks.average(self.slices.buffers.values())

    def _holding(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.own else lent(self.net, *self.slices, training=True)

    def _reproducible(self, device: torch.device) -> AbstractContextManager[Any]:
        """The fused recurrent layers of accelerators draw from a state of their own, which no seed reaches."""
        drops = self.draws and any(isinstance(m, nn.RNNBase) and m.dropout > 0 for m in self.net.modules())
        return recurrence_as_products(self.net, device) if drops else nullcontext()

    @torch.no_grad()
    def _keep(self) -> None:
        """A forward pass may write into a buffer or parameter, or put another tensor in its place."""
        known = self.slices.params | self.slices.buffers
        for name, tensor in (*self.net.named_parameters(), *self.net.named_buffers()):
            kept = known.get(name)
            if kept is None or kept.shape != tensor.shape:
                raise Refused(f"buffers must keep their names and shapes in training: {name!r} has {tensor.shape} now.")
            if kept.data_ptr() != tensor.data_ptr():
                kept.copy_(tensor)

    @torch.no_grad()
    def _pin(self) -> None:
        """An optimizer of a user's own may move weights without gradient: pruned ones go back to where they started."""
        for (name, mask), (weight, _) in zip(self.masks.items(), self.pruned, strict=True):
            if self.start.frozen:
                weight.data.copy_(torch.where(mask, weight, self.start.state.params[name]))
            else:
                weight.data.masked_fill_(~mask, 0)

    def _move_masks(self, loss: Tensor, step: int, steps: int) -> None:
        """In place of a descent. What does not stay has neither weight nor optimizer state from here on."""
        assert self.start.dynamics is not None
        self.optimizer.zero_grad()
        loss.backward()
        ranks.add_gradients(self.optimizer)
        for (name, old), (weight, mask) in zip(self.masks.items(), self.pruned, strict=True):
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad  # None: not used
            new = self.start.dynamics.next_mask(name, old, weight.detach(), gradient, step, steps)
            # .data: a detached slice shares the stack's version counter, and a backward pass may run beside us
            for tensor in (weight.data, *self.optimizer.state[weight].values()):
                if isinstance(tensor, Tensor) and tensor.shape == weight.shape:  # Adam's step counter is a scalar
                    tensor.mul_(new & old)
            old.copy_(new)
            mask.copy_(new)


def replica(
    model: nn.Module, live: State, masks: Masks, start: Start, r: int, recipe: Recipe, own: bool, draws: bool = False
) -> Replica:
    slices = State(*({n: t[r].detach() for n, t in part.items()} for part in live))
    net = copied(model) if own else model
    assert net is not None
    if own:
        net.train()
        put(net, *slices)
    weights = dict(net.named_parameters())
    pruned = [(weights[n], m[r].to(slices.params[n].dtype)) for n, m in masks.items()]
    with nullcontext() if own else lent(net, *slices, training=True):  # the dtype and device decide what can be fused
        optimizer = make_optimizer(recipe, net, weights)
    clip = clipping(recipe, [p for p in weights.values() if p.requires_grad])
    return Replica(net, slices, own, pruned, select(masks, r), optimizer, clip, start, draws)


def loop(
    model: nn.Module,
    live: State,
    masks: Masks,
    starts: Sequence[Start],
    task: Task,
    recipe: Recipe,
    copies: bool,
    draws: bool = False,
    steady: bool = False,
) -> Advance:
    """Each replica by itself on its slice of the stack; on a CPU a thread works on one replica at a time.

    Where training draws from the global generators, which all threads share, one replica trains at a time. ``steady``:
    on one thread, however many there are, so that its sums do not depend on how many replicas share them.
    """
    replicas = [replica(model, live, masks, start, r, recipe, copies, draws) for r, start in enumerate(starts)]
    busy = [Lock() for _ in starts]

    def run(r: int, steps: range) -> None:
        with busy[r]:  # its earlier steps, begun before in another thread, come first
            replicas[r].run(task, recipe, steps)

    def advance(steps: range, alive: Sequence[int]) -> None:
        cores = torch.get_num_threads()
        at_once = cores if task.device.type == "cpu" and copies and not draws and ranks.size() == 1 else 1
        workers = max(1, min(at_once, len(alive)))
        # Cut so that every thread gets as many parts: five replicas on two threads would leave one idle.
        size = -(-len(steps) // (workers // math.gcd(workers, len(alive) or 1)))
        parts = [(r, steps[i : i + size]) for i in range(0, len(steps), size) for r in alive]
        with _threads(1 if steady else cores // workers) as begin:
            if workers == 1:
                for part in parts:
                    run(*part)
                return
            with ThreadPoolExecutor(workers, initializer=begin) as pool:
                list(pool.map(run, *zip(*parts, strict=True)))

    return Advance(advance, [one.optimizer for one in replicas], "loop")


@contextmanager
def _threads(each: int) -> Iterator[Callable[[], None]]:
    """So many for what is computed here; yields what asks for as many in another thread."""
    before = torch.get_num_threads()
    if each != before:
        torch.set_num_threads(each)
    try:
        yield lambda: torch.set_num_threads(each)
    finally:
        torch.set_num_threads(before)  # threads made later start from the last value set anywhere
