"""A training step as a CUDA graph, so that a GPU does not wait for Python.

A small network leaves a GPU idle while its kernels are launched one by one. Here the whole step of a replica (batch,
augmentation, forward, backward, mask, clipping, optimizer) is recorded once and replayed on a stream of its own, beside
those of the other replicas: the very kernels of the loop, at about the speed of the GPU. What changes from step to step
lies on the device in a `Feed` of many steps; a counter on the device says which one is next. Where products with
matrices are all there is to a network, the step of the whole stack is one recording.

Leans on what the loop ensures: a module that stands on its own, no draws in its forward pass, no state but parameters
and buffers. Whatever cannot be recorded, or gives other weights than eager steps, is left to the loop.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ticketlab.batches import batch_orders, crop_flip_draws, crop_flipped
from ticketlab.data import Task
from ticketlab.engine.recipe import Recipe
from ticketlab.shown import as_line, as_table

AHEAD = 100  # steps whose indices, draws and rates lie on the device at a time
NEAR = 0.1  # of the change that two steps make; a recording that leaves something out differs by about 1


@dataclass(frozen=True)
class Feed:
    """What steps differ in, on one device."""

    order: Tensor
    """Indices of the batches, [step, replica, batch]."""
    draws: Tensor
    """Of the augmentation, [step, 3, replica, batch, 1]; [step, 0] without one."""
    rate: Tensor
    """Learning rates, [step]."""

    __repr__, _repr_html_ = as_line, as_table

    @classmethod
    def of(cls, task: Task, recipe: Recipe, order_seeds: Sequence[int], rate: float | None, steps: range) -> Feed:
        """Those of the loop: functions of the seeds and the step alone. At most `AHEAD` steps, filled up to as many."""
        n, batch, distinct = len(task.train), recipe.batch_size, set(order_seeds)
        orders = {seed: batch_orders(n, batch, seed, steps) for seed in distinct}
        order, draws = torch.stack([orders[seed] for seed in order_seeds], 1), torch.empty(len(steps), 0)
        if task.augmentation == "crop_flip":
            drawn = {seed: torch.stack([crop_flip_draws(batch, seed, step) for step in steps]) for seed in distinct}
            draws = torch.stack([drawn[seed] for seed in order_seeds], 2)
        rates = torch.tensor([recipe.learning_rate_at(step) if rate is None else rate for step in steps])
        rest = AHEAD - len(steps)
        return cls(*(torch.cat([part, part[-1:].expand(rest, *part.shape[1:])]) for part in (order, draws, rates)))

    def to(self, device: torch.device) -> Feed:
        return Feed(*(getattr(self, field.name).to(device) for field in fields(self)))


class Graph:
    """A step of a replica, or of a whole stack, recorded.

    Args:
        tensors: Gives the parameters and buffers that are trained.
        pruned: Weights, and their masks in the same dtype.
        optimizer: Makes the optimizer from a learning rate on the device.
        feed: The feed of the steps of a range.
        task: On a CUDA device.
        loss: (inputs, targets) -> what is descended; of a stack, both with the replica axis first.
        clip: Scales gradients down, behind the mask.
    """

    def __init__(
        self,
        tensors: Callable[[], list[Tensor]],
        pruned: Sequence[tuple[Tensor, Tensor]],
        optimizer: Callable[[Tensor], torch.optim.Optimizer],
        feed: Callable[[range], Feed],
        task: Task,
        loss: Callable[[Tensor, Tensor], Tensor],
        clip: Callable[[], None] | None = None,
    ) -> None:
        self.tensors, self.pruned, self.task, self.make_feed = tensors, pruned, task, feed
        self.loss, self.clip = loss, clip
        self.feed = feed(range(1)).to(task.device)
        self.next = torch.zeros(1, dtype=torch.int64, device=task.device)  # the row of the feed
        self.rate = torch.zeros((), device=task.device)
        self.optimizer = optimizer(self.rate)
        self.stream = torch.cuda.Stream(task.device)
        self.graph, self.layout = torch.cuda.CUDAGraph(), torch.contiguous_format

    def record(self) -> bool:
        """Record a step; whether replaying it gives what eager steps give. Weights and buffers stay as they are.

        Images of one network lie channels last, as convolutions of a GPU want them, unless its forward pass cannot
        take them so.
        """
        images = self.task.train.x.ndim == 4 and self.feed.order.shape[1] == 1
        return any(self._record(layout) for layout in (torch.channels_last, torch.contiguous_format)[not images :])

    def _record(self, layout: torch.memory_format) -> bool:
        self.layout, self.graph = layout, torch.cuda.CUDAGraph()
        known = [t.detach().clone() for t in self.tensors()]
        places = [t.data_ptr() for t in self.tensors()]
        here = torch.cuda.current_stream(self.task.device)
        self.stream.wait_stream(here)
        try:
            with torch.cuda.stream(self.stream):
                self.load(range(2))
                self._step()
                with _never_waiting():
                    self._step()
                eager = [t.detach().clone() for t in self.tensors()]
                self._restore(known)
        except RuntimeError:  # a forward pass that waits for the device, or does not take this layout
            self._restore(known)
            return False
        try:
            with torch.cuda.graph(self.graph, stream=self.stream):
                self._step()
        except RuntimeError:
            self._restore(known)
            _end_recording(self.task.device)
            return False
        if [t.data_ptr() for t in self.tensors()] != places:  # a buffer was put in another's place
            return False
        with torch.cuda.stream(self.stream):
            self.load(range(2))
            self.graph.replay()
            self.graph.replay()
            same = _same_change(known, eager, [t.detach() for t in self.tensors()])
            self._restore(known)
        here.wait_stream(self.stream)
        return same

    def load(self, steps: range) -> None:
        """The feed of at most `AHEAD` steps, behind whatever this stream still has to do."""
        ahead = self.make_feed(steps)
        with torch.cuda.stream(self.stream):
            for field in fields(Feed):
                getattr(self.feed, field.name).copy_(getattr(ahead, field.name), non_blocking=True)
            self.next.zero_()

    def replay(self) -> None:
        with torch.cuda.stream(self.stream):
            self.graph.replay()

    def _step(self) -> None:
        index, draws, rate = (getattr(self.feed, f.name).index_select(0, self.next)[0] for f in fields(Feed))
        index = index.squeeze(0)  # [batch] for one network, [replica, batch] for a stack
        x, y = self.task.train.x[index], self.task.train.y[index]
        if draws.numel():
            x = crop_flipped(x.flatten(0, -4), draws.flatten(1, -2)).view(x.shape)
        loss = self.loss(x.contiguous(memory_format=self.layout), y)
        self.rate.copy_(rate)
        self.optimizer.zero_grad()
        loss.backward()
        masked = [(weight.grad, mask) for weight, mask in self.pruned if weight.grad is not None]
        if masked:
            torch._foreach_mul_(*map(list, zip(*masked, strict=True)))
        if self.clip is not None:
            self.clip()
        self.optimizer.step()
        self.next.add_(1)

    @torch.no_grad()
    def _restore(self, known: Sequence[Tensor]) -> None:
        """Weights and buffers as they were, and an optimizer that has seen nothing."""
        for tensor, value in zip(self.tensors(), known, strict=True):
            tensor.copy_(value)
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()


@contextmanager
def _never_waiting() -> Iterator[None]:
    """What waits for the device raises: found here, before it can break off a recording."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _end_recording(device: torch.device) -> None:
    """A recording that broke off leaves the device's generator behind as if it went on; a whole one puts that right."""
    torch.cuda.synchronize(device)
    one = torch.zeros(1, device=device)
    with torch.cuda.device(device), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(device)):
        one.add_(1)


def _same_change(before: Sequence[Tensor], one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    """Whether two ways went from ``before`` to the same tensors, in all: rounding alone moves a tensor without a
    gradient, and kernels of a GPU do not round alike twice."""
    counts = [torch.equal(a, b) for a, b in zip(one, two, strict=True) if not a.is_floating_point()]
    triples = [t for t in zip(before, one, two, strict=True) if t[0].is_floating_point()]
    apart = sum(float((a - b).double().square().sum()) for _, a, b in triples)
    moved = sum(float((a - b).double().square().sum()) for b, a, _ in triples)
    return all(counts) and apart <= NEAR**2 * moved


def run(graphs: Sequence[Graph], steps: range) -> None:
    """Advance every replica by these steps, side by side."""
    for graph in graphs:
        graph.stream.wait_stream(torch.cuda.current_stream(graph.task.device))
    for begin in range(steps.start, steps.stop, AHEAD):
        part = range(begin, min(begin + AHEAD, steps.stop))
        for graph in graphs:
            graph.load(part)
        for _ in part:
            for graph in graphs:
                graph.replay()
    for graph in graphs:
        torch.cuda.current_stream(graph.task.device).wait_stream(graph.stream)
