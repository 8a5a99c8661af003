"""The one training loop: R replicas of one architecture, each from its own `Start`.

The data set lies on the device as tensors. A replica is a real copy of the module whose parameters and buffers *are*
its slice of the stack, so that whatever works in a plain PyTorch loop works here; on a CPU each has a thread. A pruned
weight stays where it starts, at zero or ``frozen`` at its own value, because its gradient is masked: SGD and Adam with
zero gradient and zero state leave a weight where it is. Weight decay leaves a zero where it is, but nothing else, so
the two exclude each other. ``vmap`` is an optimisation, used where its gradients are those of the loop.
On a GPU a step of the loop is a CUDA graph where it can be one (``graphed``).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from threading import Lock
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from tqdm import tqdm

from ticketlab import masks as mask_ops
from ticketlab.batches import batch_orders, noise_seed
from ticketlab.data import Task, crop_flip
from ticketlab.engine import graphed
from ticketlab.engine.checkpoint import Checkpoints, put_in, taken
from ticketlab.engine.dynamic.moves import Dynamics
from ticketlab.engine.optimizer import clipping, make_optimizer
from ticketlab.engine.recipe import Recipe
from ticketlab.engine.step import autocast, objective, training_loss, unrounded
from ticketlab.engine.trainable import check, copied, probed, put
from ticketlab.engine.watch import OnEval, Watch, put_back
from ticketlab.errors import Refused
from ticketlab.lending import lent, recurrence_as_products
from ticketlab.network import Execution, network, of_matrices, resolve
from ticketlab.precision import float32_arithmetic
from ticketlab.probing import close, watching_generators
from ticketlab.seeds import seed_generators
from ticketlab.shown import as_line, as_table
from ticketlab.state import Masks, State, select, stack, stack_states


@dataclass(frozen=True)
class Start:
    """What is trained: one replica."""

    state: State
    """Parameters and buffers of one network, on the task's device."""
    masks: Masks
    """True = trained; empty: nothing is pruned."""
    order_seed: int
    """Seed of the batch order."""
    frozen: bool = False
    """Pruned weights keep the values in ``state`` and count in the forward pass; otherwise they are zero."""
    learning_rate: float | None = None
    """Constant rate in place of the recipe's schedule."""
    dynamics: Dynamics | None = None
    """How the mask moves in training (RigL, SET, gradual pruning); None: it stays."""

    __repr__, _repr_html_ = as_line, as_table

    @property
    def begun(self) -> State:
        """What is trained from: pruned weights zero, unless they are frozen at their values."""
        return self.state if self.frozen else State(mask_ops.masked(self.state.params, self.masks), self.state.buffers)

    @property
    def apart(self) -> bool:
        """Whether it needs an optimizer of its own."""
        return self.learning_rate is not None or self.dynamics is not None


@dataclass(frozen=True)
class Outcome:
    """What training leaves. Tensors have the replica axis first; tables have a ``replica`` column."""

    end: State
    snapshots: dict[int, State]
    """The networks after so many steps of the whole schedule."""
    metrics: pd.DataFrame
    """One row per replica: loss and error on every split at the end and at the early-stop step."""
    curves: pd.DataFrame
    """replica, step, loss_nats, error on the validation set."""
    wall_seconds: float
    masks: Masks
    """As given, or where dynamics have moved them; of a diverged replica, at its last finite evaluation."""

    __repr__, _repr_html_ = as_line, as_table


@dataclass(frozen=True)
class Advance:
    """What moves a stack through a range of steps."""

    run: Callable[[range, Sequence[int]], None]
    """(steps, replicas still alive)."""
    optimizers: Sequence[torch.optim.Optimizer]
    """All that has a state, in an order that does not change."""

    __repr__, _repr_html_ = as_line, as_table

    def __call__(self, steps: range, alive: Sequence[int]) -> None:
        self.run(steps, alive)


PIECE = 500  # steps after which a checkpoint may be taken


@torch.enable_grad()
def train(
    model: nn.Module,
    starts: Sequence[Start],
    task: Task,
    recipe: Recipe,
    *,
    first_step: int = 0,
    snapshot_steps: Sequence[int] = (),
    execution: Execution = "auto",
    progress: bool | str = True,
    on_eval: OnEval | None = None,
    checkpoints: Checkpoints | None = None,
) -> Outcome:
    """Train R replicas from ``first_step`` to ``recipe.steps`` with fresh optimizer state.

    Schedule and batch order go on from ``first_step``: at step t a replica takes the batch that its order seed gives to
    step t. A replica whose validation loss or weights turn non-finite is reported by a warning, put back to its last
    finite evaluation and left there; one that starts non-finite is not trained. The others are not touched.

    Where the forward pass draws from a global generator (dropout, stochastic depth), the generators are seeded before
    each step by `batches.noise_seed` of order seed and step, and put back afterwards. They are shared by threads, so
    that on a CPU such replicas train one at a time; ``vmap`` is not used.

    Args:
        model: The architecture; its own weights, buffers and mode are not used or changed.
        starts: One per replica, all with masks of the same names. Replicas with rates or dynamics of their own are
            trained by the loop.
        task: Data on one device, and the loss.
        recipe: Optimizer, schedule, batch size, precision of a step; evaluation is in true float32.
        first_step: The rewind step k.
        snapshot_steps: Steps in [first_step, steps] at which the networks are kept.
        execution: How the stack is computed; ``auto`` takes ``vmap`` where it pays and gives what the loop gives.
        progress: Show a progress bar where the output is a terminal; a string is its label.
        on_eval: Called with (step, rows) after each look at the validation set, a row per replica still alive.
        checkpoints: Where to leave one from time to time, and to go on from the last, to the same bits. None is left
            of an optimizer of a user's own or of masks that move.

    Raises:
        Refused: Shapes that do not fit, steps or rates out of range, frozen weights under weight decay or beside
            dynamics, which would move them, ``vmap`` where it does not follow, outputs that do not fit the task or, in
            evaluation mode, depend on the rest of the batch or on chance.
    """
    check(model, starts, recipe, first_step, snapshot_steps)
    with float32_arithmetic(task.device):
        probe = probed(model, starts[0], task, recipe)
    began = saved = time.perf_counter()
    live, masks = stack_states([start.begun for start in starts]), stack([start.masks for start in starts])
    tf32 = recipe.precision == "tf32"
    with float32_arithmetic(task.device, tf32):
        advance = advancing(model, live, masks, starts, task, recipe, execution, probe.copies, probe.draws)
    watch = Watch(model, live, masks, task, execution, on_eval)
    watch.check(first_step)
    snapshots = {first_step: live.clone()} if first_step in snapshot_steps else {}
    looks = {*range(0, recipe.steps, recipe.eval_every), recipe.steps}
    done = first_step
    if callable(recipe.optimizer) or any(start.dynamics for start in starts):
        checkpoints = None
    if checkpoints is not None and (half := checkpoints.read(task.device, len(advance.optimizers))):
        put_in(half, watch, snapshots, advance.optimizers)
        done, began = int(half.state["step"]), began - float(half.state["seconds"])
    pieces = {*range(first_step, recipe.steps, PIECE)} if checkpoints is not None else set()
    stops = sorted(step for step in looks | set(snapshot_steps) | pieces if step > done)
    hidden = None if progress else True  # None: tqdm hides itself where the output is not a terminal
    label = progress if isinstance(progress, str) else "train"
    total = recipe.steps - first_step
    with tqdm(total=total, desc=label, unit="step", disable=hidden, initial=done - first_step) as bar:
        if probe.draws and task.device.type == "cpu" and len(starts) > 1:
            bar.set_postfix_str("one replica at a time: training draws from a global generator")
        for begin, end in pairwise([done, *stops]):
            # The caller's generators are put back.
            with watching_generators(task.device) as drawn, float32_arithmetic(task.device, tf32):
                advance(range(begin, end), watch.alive)
            _refuse_late_draws(drawn() and not probe.draws, begin, end)
            if end in looks:
                watch.look(end)
            if end in snapshot_steps:
                watch.check(end)
                snapshots[end] = watch.state()
            bar.update(end - begin)
            if checkpoints is not None and (now := time.perf_counter()) - saved > checkpoints.seconds:
                checkpoints.write(taken(end, now - began, watch, snapshots, advance.optimizers))
                saved = time.perf_counter()
    network(model, live, task.train.x, finite=False)  # as at first: first weights may hide it, as gains of zero do
    return Outcome(live, snapshots, watch.metrics(), watch.curves(), time.perf_counter() - began, masks)


def _refuse_late_draws(late: bool, begin: int, end: int) -> None:
    if late:
        raise Refused(
            f"noise must be there from the first step, so that it is seeded: between steps {begin} and {end} something "
            "began to draw from a global generator. Let the forward pass draw at each step, whether it uses it or not."
        )


# Advancing a stack.


def advancing(
    model: nn.Module,
    live: State,
    masks: Masks,
    starts: Sequence[Start],
    task: Task,
    recipe: Recipe,
    execution: Execution = "auto",
    copies: bool = True,
    draws: bool = False,
) -> Advance:
    """What moves the stack ``live`` through a range of steps: (steps, replicas still alive) -> None."""
    apart = callable(recipe.optimizer) or any(start.apart for start in starts)
    if execution == "vmap" and apart:
        raise Refused(
            "an optimizer of your own, and replicas with rates or dynamics of their own, need the loop: leave "
            "execution at 'auto'."
        )
    if execution == "vmap" and draws:
        raise Refused(
            "vmap draws other numbers than each network by itself, and training draws from a global generator, such as "
            "for dropout: leave execution at 'auto', which takes the loop."
        )
    apart = apart or draws
    if execution == "auto" and task.device.type == "cuda" and copies and not draws and not callable(recipe.optimizer):
        advance = _graphed(model, live, masks, starts, task, recipe)
        if advance is not None:
            return advance
    how = resolve(execution, model, task.device, len(starts))
    if how == "vmap" and not apart:
        why = _why_not_vmap(model, live, starts, task, recipe) if copies else "it cannot be copied"
        if why is None:
            return _vmap(model, live, masks, starts, task, recipe)
        if execution == "vmap":
            raise Refused(f"vmap cannot follow this model as it trains: {why}. Leave execution at 'auto'.")
    return _loop(model, live, masks, starts, task, recipe, copies, draws)


@dataclass(frozen=True)
class _Replica:
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

    def run(self, task: Task, recipe: Recipe, steps: range) -> None:
        dynamics, seed = self.start.dynamics, self.start.order_seed
        updates = dynamics.update_steps(recipe.steps) if dynamics else ()
        with self._holding(), self._reproducible(task.device):
            for step, index in zip(steps, _orders(task, recipe, [seed], steps)[0], strict=True):
                if self.draws:
                    seed_generators(noise_seed(seed, step), task.device)
                x, y = _batch(task, index, seed, step)
                value = training_loss(self.net, x, y, task, recipe)
                if step in updates:
                    self._move_masks(value, step, recipe.steps)
                else:
                    own_rate = self.start.learning_rate
                    rate = recipe.learning_rate_at(step) if own_rate is None else own_rate
                    _descend(self.optimizer, self.pruned, value, rate, self.clip)
                    if callable(recipe.optimizer):
                        self._pin()
            self._keep()

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
        for (name, old), (weight, mask) in zip(self.masks.items(), self.pruned, strict=True):
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad  # None: not used
            new = self.start.dynamics.next_mask(name, old, weight.detach(), gradient, step, steps)
            # .data: a detached slice shares the stack's version counter, and a backward pass may run beside us
            for tensor in (weight.data, *self.optimizer.state[weight].values()):
                if isinstance(tensor, Tensor) and tensor.shape == weight.shape:  # Adam's step counter is a scalar
                    tensor.mul_(new & old)
            old.copy_(new)
            mask.copy_(new)


def _replica(
    model: nn.Module, live: State, masks: Masks, start: Start, r: int, recipe: Recipe, own: bool, draws: bool = False
) -> _Replica:
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
    return _Replica(net, slices, own, pruned, select(masks, r), optimizer, clip, start, draws)


def _loop(
    model: nn.Module,
    live: State,
    masks: Masks,
    starts: Sequence[Start],
    task: Task,
    recipe: Recipe,
    copies: bool,
    draws: bool = False,
) -> Advance:
    """Each replica by itself on its slice of the stack; on a CPU a thread works on one replica at a time.

    Where training draws from the global generators, which all threads share, one replica trains at a time.
    """
    replicas = [_replica(model, live, masks, start, r, recipe, copies, draws) for r, start in enumerate(starts)]
    busy = [Lock() for _ in starts]

    def run(r: int, steps: range) -> None:
        with busy[r]:  # its earlier steps, begun before in another thread, come first
            replicas[r].run(task, recipe, steps)

    def advance(steps: range, alive: Sequence[int]) -> None:
        cores = torch.get_num_threads() if task.device.type == "cpu" and copies and not draws else 1
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

    return Advance(advance, [replica.optimizer for replica in replicas])


def _graphed(
    model: nn.Module, live: State, masks: Masks, starts: Sequence[Start], task: Task, recipe: Recipe
) -> Advance | None:
    """The loop without Python between its steps, where a step of every replica can be recorded."""
    if not isinstance(task.train.x, Tensor):
        return None  # a batch that is read from disk asks Python
    if any(p.dtype == torch.float64 for p in live.params.values()) or any(
        start.dynamics is not None for start in starts
    ):
        return None  # a rate on the device is a float32, and masks that move ask Python
    together = _graphed_stack(model, live, masks, starts, task, recipe)
    if together is not None:
        return together
    graphs = []
    for r, start in enumerate(starts):
        one = _replica(model, live, masks, start, r, recipe, own=True)
        optimizer = partial(make_optimizer, recipe, one.net, dict(one.net.named_parameters()))
        feed = partial(graphed.Feed.of, task, recipe, (start.order_seed,), start.learning_rate)
        loss = partial(training_loss, one.net, task=task, recipe=recipe)
        tensors = partial(_tensors, one.net)
        graphs.append(graphed.Graph(tensors, one.pruned, optimizer, feed, task, loss, one.clip))
        if not graphs[-1].record():
            return None
    return Advance(
        lambda steps, alive: graphed.run([graphs[r] for r in alive], steps), [graph.optimizer for graph in graphs]
    )


def _graphed_stack(
    model: nn.Module, live: State, masks: Masks, starts: Sequence[Start], task: Task, recipe: Recipe
) -> Advance | None:
    """One recorded step for the whole stack, where products of matrices are all there is to it."""
    alike = len(starts) > 1 and not any(start.apart for start in starts)
    if not alike or not of_matrices(model) or _why_not_vmap(model, live, starts, task, recipe) is not None:
        return None
    whole = _stacked(model, live, masks, starts, task, recipe)
    optimizer = partial(make_optimizer, recipe, model, whole.leaves)
    feed = partial(graphed.Feed.of, task, recipe, [start.order_seed for start in starts], None)
    tensors = [*whole.leaves.values(), *live.buffers.values()]
    graph = graphed.Graph(lambda: tensors, whole.pruned, optimizer, feed, task, whole.loss, whole.clip)
    return _sparing(live, partial(graphed.run, [graph]), graph.optimizer) if graph.record() else None


def _tensors(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]


@dataclass(frozen=True)
class _Stacked:
    """All replicas as one network."""

    leaves: dict[str, Tensor]
    """Parameters [replica, ...], those of the stack."""
    pruned: Sequence[tuple[Tensor, Tensor]]
    """Weights of it, and their masks in the same dtype."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """(inputs, targets), [replica, batch, ...] -> the sum of mean losses: gradients do not mix."""
    clip: Callable[[], None] | None


def _stacked(
    model: nn.Module, live: State, masks: Masks, starts: Sequence[Start], task: Task, recipe: Recipe
) -> _Stacked:
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

    return _Stacked(leaves, pruned, loss, clip)


def _vmap(model: nn.Module, live: State, masks: Masks, starts: Sequence[Start], task: Task, recipe: Recipe) -> Advance:
    """All replicas in one batched forward and backward pass; one optimizer on the stacked tensors."""
    whole = _stacked(model, live, masks, starts, task, recipe)
    optimizer = make_optimizer(recipe, model, whole.leaves)
    seeds = [start.order_seed for start in starts]

    def advance(steps: range) -> None:
        orders = _orders(task, recipe, seeds, steps)
        for step, index in zip(steps, orders.transpose(0, 1), strict=True):
            loss = whole.loss(*_batches(task, index, starts, step))
            _descend(optimizer, whole.pruned, loss, recipe.learning_rate_at(step), whole.clip)

    return _sparing(live, advance, optimizer)


def _sparing(live: State, advance: Callable[[range], None], optimizer: torch.optim.Optimizer) -> Advance:
    """Of a stack that moves as one: replicas that have stopped are put back."""
    replicas = range(len(next(iter(live.params.values()))))

    def sparing(steps: range, alive: Sequence[int]) -> None:
        stopped = sorted(set(replicas) - set(alive))
        kept = live.select(stopped) if stopped else None
        advance(steps)
        if kept is not None:
            put_back(live, stopped, kept)

    return Advance(sparing, [optimizer])


def _why_not_vmap(model: nn.Module, live: State, starts: Sequence[Start], task: Task, recipe: Recipe) -> str | None:
    """The first batch both ways, in the dtype of the weights: gradients and buffers must agree but for rounding."""
    recipe = replace(recipe, precision="float32")
    alone, mapped = live.clone(), live.clone()
    index = _orders(task, recipe, [start.order_seed for start in starts], range(1))[:, 0]
    gradients = []
    for r, start in enumerate(starts):
        one = _replica(model, alone, {}, start, r, recipe, own=True)
        training_loss(one.net, *_batch(task, index[r], start.order_seed, 0), task, recipe).backward()
        one._keep()
        gradients.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in one.net.named_parameters()})
    expected = stack(gradients)
    try:
        with warnings.catch_warnings():  # of operations without a rule: nothing comes of this attempt but a yes or no
            warnings.simplefilter("ignore")
            whole = _stacked(model, mapped, {}, starts, task, recipe)
            whole.loss(*_batches(task, index, starts, 0)).backward()
    except Exception as error:  # whatever an operation without a rule raises
        return str(error).strip().splitlines()[0]
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in whole.leaves.items()}
    steepest = max((float(g.abs().max()) for g in expected.values() if g.numel()), default=0.0)
    # A gradient that is zero but for rounding, as of the biases of keys, is no reason.
    near = {n: float((g - expected[n]).abs().max()) <= 1e-6 * steepest for n, g in found.items() if g.numel()}
    wrong = [n for n, g in found.items() if not near.get(n, True) and not close(g, expected[n])]
    wrong += [n for n, b in mapped.buffers.items() if not close(b.double(), alone.buffers[n].double())]
    return f"{wrong[:3]} differ from those of a loop" if wrong else None


def _orders(task: Task, recipe: Recipe, order_seeds: Sequence[int], steps: range) -> Tensor:
    """Indices of the batches of many steps, moved to the device at once: [replica, step, batch]."""
    each = [batch_orders(len(task.train), recipe.batch_size, seed, steps) for seed in order_seeds]
    return torch.stack(each).to(task.device)


def _batch(task: Task, index: Tensor, order_seed: int, step: int) -> tuple[Tensor, Tensor]:
    x = task.train.x[index]
    return crop_flip(x, order_seed, step) if task.augmentation == "crop_flip" else x, task.train.y[index]


def _batches(task: Task, index: Tensor, starts: Sequence[Start], step: int) -> tuple[Tensor, Tensor]:
    """Of every replica: [replica, batch, ...]."""
    each = [_batch(task, i, start.order_seed, step) for i, start in zip(index, starts, strict=True)]
    x, y = (torch.stack(tensors) for tensors in zip(*each, strict=True))
    return x, y


def _descend(
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
    for weight, mask in pruned:
        if weight.grad is not None:  # None: the forward pass does not use this weight
            weight.grad.mul_(mask)
    if clip is not None:
        clip()
    optimizer.step()
