"""The one training loop: R replicas of one architecture, each from its own `Start`.

The data set lies on the device as tensors. A replica is a real copy of the module whose parameters and buffers *are*
its slice of the stack, so that whatever works in a plain PyTorch loop works here; on a CPU each has a thread
(``loop``). A pruned weight stays where it starts, at zero or ``frozen`` at its own value, because its gradient is
masked: SGD and Adam with zero gradient and zero state leave a weight where it is. Weight decay leaves a zero where it
is, but nothing else, so the two exclude each other. ``vmap`` (``stacked``) and CUDA graphs (``graphed``) are
optimisations, used where their gradients are those of the loop (``advance``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from ticketlab.data import Task
from ticketlab.engine import ranks
from ticketlab.engine.advance import advancing
from ticketlab.engine.checkpoint import Checkpoints, Half, put_in, taken
from ticketlab.engine.recipe import Recipe
from ticketlab.engine.start import Start
from ticketlab.engine.trainable import check, probed
from ticketlab.engine.watch import OnEval, Watch
from ticketlab.errors import Refused
from ticketlab.network import Execution, network
from ticketlab.precision import float32_arithmetic
from ticketlab.probing import watching_generators
from ticketlab.shown import as_line, as_table
from ticketlab.state import Masks, State, stack, stack_states


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
    execution: str
    """The way that was taken: loop, vmap, recorded loop or recorded stack."""

    __repr__, _repr_html_ = as_line, as_table


PIECE = 500
"""Steps in one go, at most: so much is drawn beforehand, and a checkpoint may be taken in between."""


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

    Of several processes that train together (``ranks``) each takes its share of every batch.

    Args:
        model: The architecture; its own weights, buffers and mode are not used or changed.
        starts: One per replica, all with masks of the same names. Replicas with rates or dynamics of their own are
            trained by the loop.
        task: Data on one device, and the loss.
        recipe: Optimizer, schedule, batch size, precision of a step; evaluation is in true float32.
        first_step: The rewind step k.
        snapshot_steps: Steps in [first_step, steps] at which the networks are kept.
        execution: How the stack is computed; ``auto`` takes ``vmap`` where it pays and gives what the loop gives. With
            ``loop`` each replica has one thread of a CPU, and its bits do not depend on its neighbours.
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
        probe = probed(model, _telling(starts), task, recipe)
    began = saved = time.perf_counter()
    live, masks = stack_states([start.begun for start in starts]), stack([start.masks for start in starts])
    ranks.take_first([*live.params.values(), *live.buffers.values(), *masks.values()])
    tf32 = recipe.precision == "tf32"
    with float32_arithmetic(task.device, tf32):
        advance = advancing(model, live, masks, starts, task, recipe, execution, probe.copies, probe.draws)
    watch = Watch(model, live, masks, task, execution, on_eval)
    watch.check(first_step)
    snapshots = {first_step: live.clone()} if first_step in snapshot_steps else {}
    done = first_step
    if callable(recipe.optimizer) or any(start.dynamics for start in starts):
        checkpoints = None
    half = checkpoints.read(task.device, len(advance.optimizers)) if checkpoints is not None else None
    _refuse_other_stores(half)
    if half is not None:
        put_in(half, watch, snapshots, advance.optimizers)
        done, began = int(half.state["step"]), began - float(half.state["seconds"])
    hidden = (
        None if progress and ranks.rank() == 0 else True
    )  # None: tqdm hides itself where the output is not a terminal
    label = progress if isinstance(progress, str) else "train"
    total = recipe.steps - first_step
    with tqdm(total=total, desc=label, unit="step", disable=hidden, initial=done - first_step) as bar:
        if probe.draws and task.device.type == "cpu" and len(starts) > 1:
            bar.set_postfix_str("one replica at a time: training draws from a global generator")
        for begin, end in pairwise(chain([done], _stops(done, recipe, snapshot_steps))):
            # The caller's generators are put back.
            with watching_generators(task.device) as drawn, float32_arithmetic(task.device, tf32):
                advance(range(begin, end), watch.alive)
            _refuse_late_draws(drawn() and not probe.draws, begin, end)
            if end % recipe.eval_every == 0 or end == recipe.steps:
                watch.look(end)
            if end in snapshot_steps:
                watch.check(end)
                snapshots[end] = watch.state()
            bar.update(end - begin)
            if (
                checkpoints is not None
                and ranks.rank() == 0
                and (now := time.perf_counter()) - saved > checkpoints.seconds
            ):
                checkpoints.write(taken(end, now - began, watch, snapshots, advance.optimizers))
                saved = time.perf_counter()
    network(model, live, task.train.x, finite=False)  # as at first: first weights may hide it, as gains of zero do
    seconds = time.perf_counter() - began
    return Outcome(live, snapshots, watch.metrics(), watch.curves(), seconds, masks, advance.how)


def _refuse_other_stores(half: Half | None) -> None:
    step = half.state["step"] if half is not None else None
    if ranks.agreed(step) != step:
        raise Refused(f"all processes must see one store: a checkpoint of step {step} is not the first one's.")


def _telling(starts: Sequence[Start]) -> Start:
    """One of finite weights where there is any: of NaN all is equal to all."""
    return next((s for s in starts if all(p.isfinite().all() for p in s.begun.params.values())), starts[0])


def _stops(step: int, recipe: Recipe, snapshot_steps: Sequence[int]) -> Iterator[int]:
    """The steps after ``step`` at which training pauses."""
    kept = sorted(snapshot_steps)
    while step < recipe.steps:
        regular = [(step // every + 1) * every for every in (recipe.eval_every, PIECE)]
        step = min(recipe.steps, *regular, *(k for k in kept if k > step))
        yield step


def _refuse_late_draws(late: bool, begin: int, end: int) -> None:
    if late:
        raise Refused(
            f"noise must be there from the first step, so that it is seeded: between steps {begin} and {end} something "
            "began to draw from a global generator. Let the forward pass draw at each step, whether it uses it or not."
        )
