"""What is refused before anything is trained, and what a module is: whether copies stand alone, whether it draws."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ticketlab import masks as mask_ops
from ticketlab.data import Task
from ticketlab.engine.dynamic.moves import validate
from ticketlab.engine.optimizer import first_steps
from ticketlab.engine.recipe import Recipe
from ticketlab.engine.step import objective
from ticketlab.errors import Refused
from ticketlab.lending import aliases, lent
from ticketlab.network import n_replicas, network
from ticketlab.probing import attempt, close, watching_generators
from ticketlab.seeds import kept_generators, seed_generators
from ticketlab.state import State

if TYPE_CHECKING:
    from ticketlab.engine.start import Start


def check(
    model: nn.Module, starts: Sequence[Start], recipe: Recipe, first_step: int, snapshot_steps: Sequence[int]
) -> None:
    if not starts:
        raise Refused("train needs at least one start: got none. Pass [Start(tl.state(model), masks, order_seed=0)].")
    if not 0 <= first_step < recipe.steps:
        raise Refused(f"the first step must lie in [0, {recipe.steps}), before training ends: got {first_step}.")
    outside = [s for s in snapshot_steps if not first_step <= s <= recipe.steps]
    if outside:
        raise Refused(f"snapshot steps must lie in [{first_step}, {recipe.steps}]: got {outside}.")
    for r, start in enumerate(starts):
        if n_replicas(model, start.state.params) is not None:
            raise Refused(f"a start is one network: number {r} has a replica axis. Take one with State.select(index).")
        if start.masks:
            mask_ops.validate(model, start.masks)
        _check_start(start, r, recipe)


def _check_start(start: Start, r: int, recipe: Recipe) -> None:
    if start.frozen and recipe.weight_decay:
        raise Refused(
            f"weight decay would move frozen weights: got {recipe.weight_decay}. Set weight_decay = 0, or freeze none."
        )
    if start.learning_rate is not None and not 0 < start.learning_rate < math.inf:
        raise Refused(
            f"learning rates must be positive and finite, or None for the schedule: got {start.learning_rate}."
        )
    if start.dynamics is not None:
        if start.frozen:
            raise Refused(f"a mask that moves needs pruned weights at zero: replica {r} is frozen. Choose one.")
        validate(start.dynamics, start.masks, recipe.steps)
    others = {p.dtype for p in start.state.params.values() if p.is_floating_point()} - {torch.float32}
    if recipe.precision != "float32" and others:
        raise Refused(f"precision {recipe.precision!r} is for float32 weights: got {sorted(map(str, others))}.")
    if recipe.precision == "tf32" and next(iter(start.state.params.values())).device.type != "cuda":
        raise Refused(f"precision 'tf32' is of CUDA devices: replica {r} is elsewhere. Take 'float32'.")
    half = {p.dtype for p in start.state.params.values()} & {torch.float16}
    if half and recipe.optimizer in ("adam", "adamw"):
        raise Refused(
            f"{recipe.optimizer} divides by eps = 1e-8, which is 0 in float16: use bfloat16, float32, or sgd."
        )


@dataclass(frozen=True)
class Trainable:
    """How a module can be trained."""

    copies: bool
    """Whether copies stand on their own. They do not where a hook or closure still reaches the original."""
    draws: bool
    """Whether a training step draws from a global generator, such as for dropout, and so needs them to itself."""


def probed(model: nn.Module, start: Start, task: Task, recipe: Recipe) -> Trainable:
    """One training pass on a throwaway copy: refuse what cannot be trained, and tell how the rest is.

    A copy that still reaches the module that it was copied from shows where that one is poisoned.
    """
    x, y = task.train.x[: recipe.batch_size], task.train.y[: recipe.batch_size]
    params, buffers = start.begun.clone()
    fresh = {n: b.clone() for n, b in buffers.items()}
    with torch.no_grad(), kept_generators(task.device):
        seed_generators(0, task.device)
        with watching_generators(task.device) as drawn, lent(model, params, fresh, training=True):
            outputs = attempt(model, x)
        draws = drawn() or any(_dropout(module) > 0 for module in model.modules()) or _steps_by_chance(recipe, model)
        objective(task, recipe).check(y, len(x), outputs.shape[1:])
        network(model, start.begun, task.train.x, finite=False)  # what is trained is evaluated: each example by itself
        _refuse_hidden_state(model, start.begun, x)
        seed_generators(0, task.device)
        return Trainable(_copies(model, params, buffers, x, outputs), draws)


def _copies(
    model: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Tensor, outputs: Tensor
) -> bool:
    # A hook on a parameter is not copied with it.
    hooked = any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    net = None if hooked else copied(model)
    if net is None:
        return False
    net.train()
    put(net, params, buffers)
    poison = [{n: torch.full_like(t, math.nan) if t.is_floating_point() else t for n, t in part.items()}
              for part in (params, buffers)]  # fmt: skip
    with lent(model, poison[0], poison[1], training=True):
        try:
            return bool(close(net(x.clone()), outputs))
        except Exception:  # whatever a copy that does not stand on its own raises
            return False


def _steps_by_chance(recipe: Recipe, model: nn.Module) -> bool:
    """Whether an optimizer of a user's own draws; True too where made-up gradients do not show it."""
    if not callable(recipe.optimizer):
        return False
    with torch.enable_grad(), watching_generators(next(model.parameters()).device) as drawn:
        try:
            first_steps(recipe.optimizer, model)
        except Refused:
            raise
        except Exception:  # whatever a function of a user's own raises
            return True
        return drawn()


def _refuse_hidden_state(model: nn.Module, begun: State, x: Tensor) -> None:
    """What training changes must be a parameter or a buffer: nothing else is stored, evaluated or rewound."""

    def fresh() -> dict[str, Tensor]:
        return {n: t.clone() for part in begun for n, t in part.items()}

    with lent(model, fresh(), None):
        before = model(x.clone())
        model.train()
        model(x.clone())
        model.eval()
        values = fresh()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.data = values[name]
        after = model(x.clone())
    if not close(before, after):
        raise Refused(
            "what a forward pass in training mode changes must be a parameter or a buffer: outputs differ after one "
            "with both put back, so that the model keeps state elsewhere. Register it with register_buffer."
        )


def copied(model: nn.Module) -> nn.Module | None:
    """A copy with parameters and buffers of its own, or None where the module cannot be copied."""
    if aliases(model):  # those of a copy would keep the values that they are copied with
        return None
    # What a forward pass has left on the module may hang on a graph, which deepcopy refuses.
    left = [v for m in model.modules() for v in m.__dict__.values() if isinstance(v, Tensor) and not v.is_leaf]
    try:
        return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in left})
    except Exception:  # locks, handles, generators: whatever has no copy
        return None


def put(net: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """These tensors as the module's own, for good."""
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        tensor.data = params[name] if name in params else buffers[name]


def _dropout(module: nn.Module) -> float:
    """The probability that a module drops something with, 0 where it has none."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    return float(module.dropout) if isinstance(module, nn.MultiheadAttention | nn.RNNBase) else 0.0
