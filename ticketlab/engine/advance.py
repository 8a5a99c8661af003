"""What moves a stack of replicas: chosen here among a loop, vmap, and recordings on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ticketlab.data import Task
from ticketlab.engine import graphed, ranks
from ticketlab.engine.loop import loop, replica
from ticketlab.engine.optimizer import make_optimizer
from ticketlab.engine.recipe import Recipe
from ticketlab.engine.stacked import sparing, stacked, vmapped, why_not_vmap
from ticketlab.engine.start import Start
from ticketlab.engine.step import Advance, training_loss
from ticketlab.errors import Refused
from ticketlab.network import Execution, of_matrices, resolve
from ticketlab.state import Masks, State


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
    """What moves the stack ``live`` through a range of steps.

    Args:
        copies: Whether copies of the model stand on their own, as `probed` finds.
        draws: Whether a training step draws from a global generator.

    Raises:
        Refused: ``vmap`` where it does not follow.
    """
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
    if execution == "vmap" and ranks.size() > 1:
        raise Refused("processes that train together take the loop: leave execution at 'auto'.")
    apart = apart or draws or ranks.size() > 1
    recordable = copies and not draws and not callable(recipe.optimizer) and ranks.size() == 1
    if execution == "auto" and task.device.type == "cuda" and recordable:
        advance = _graphed(model, live, masks, starts, task, recipe)
        if advance is not None:
            return advance
    how = resolve(execution, model, task.device, len(starts))
    if how == "vmap" and not apart:
        why = why_not_vmap(model, live, starts, task, recipe) if copies else "it cannot be copied"
        if why is None:
            return vmapped(model, live, masks, starts, task, recipe)
        if execution == "vmap":
            raise Refused(f"vmap cannot follow this model as it trains: {why}. Leave execution at 'auto'.")
    return loop(model, live, masks, starts, task, recipe, copies, draws, steady=execution == "loop")


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
    together = _together(model, live, masks, starts, task, recipe)
    if together is not None:
        return together
    graphs = []
    for r, start in enumerate(starts):
        one = replica(model, live, masks, start, r, recipe, own=True)
        optimizer = partial(make_optimizer, recipe, one.net, dict(one.net.named_parameters()))
        feed = partial(graphed.Feed.of, task, recipe, (start.order_seed,), start.learning_rate)
        loss = partial(training_loss, one.net, task=task, recipe=recipe)
        tensors = partial(_tensors, one.net)
        graphs.append(graphed.Graph(tensors, one.pruned, optimizer, feed, task, loss, one.clip))
        if not graphs[-1].record():
            return None
    optimizers = [graph.optimizer for graph in graphs]
    return Advance(lambda steps, alive: graphed.run([graphs[r] for r in alive], steps), optimizers, "recorded loop")


def _together(
    model: nn.Module, live: State, masks: Masks, starts: Sequence[Start], task: Task, recipe: Recipe
) -> Advance | None:
    """One recorded step for the whole stack, where products of matrices are all there is to it."""
    alike = len(starts) > 1 and not any(start.apart for start in starts)
    if not alike or not of_matrices(model) or why_not_vmap(model, live, starts, task, recipe) is not None:
        return None
    whole = stacked(model, live, masks, starts, task, recipe)
    optimizer = partial(make_optimizer, recipe, model, whole.leaves)
    feed = partial(graphed.Feed.of, task, recipe, [start.order_seed for start in starts], None)
    tensors = [*whole.leaves.values(), *live.buffers.values()]
    graph = graphed.Graph(lambda: tensors, whole.pruned, optimizer, feed, task, whole.loss, whole.clip)
    run = partial(graphed.run, [graph])
    return sparing(live, run, graph.optimizer, "recorded stack") if graph.record() else None


def _tensors(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]
