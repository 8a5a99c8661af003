"""What names a study beside its config: what its network does, and what is a user's own does.

All of it is a few numbers of a few digits, taken in float64, so that rounding does not vary from machine to machine.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ticketlab.data import Task
from ticketlab.engine.criteria import Evidence, own_scores
from ticketlab.engine.optimizer import first_steps
from ticketlab.engine.recipe import Recipe, own_name
from ticketlab.engine.treatments import Origin, own_start
from ticketlab.errors import Refused
from ticketlab.lending import attention_as_products, lent
from ticketlab.losses import LOSSES
from ticketlab.precision import float32_arithmetic
from ticketlab.seeds import Factory, kept_generators, seed_generators
from ticketlab.state import Masks, State, moved, state


def behaviour(model: nn.Module, task: Task, dtype: torch.dtype, first: State | None = None) -> dict[str, Any]:
    """What a network is, and what it does on a few examples in both modes.

    Args:
        model: The architecture.
        task: Data of the study.
        dtype: Weights of the study, for models that cannot run in float64.
        first: The network; the model's own weights and buffers when None.
    """
    first = state(model) if first is None else first
    return {
        "shapes": {name: list(p.shape) for name, p in first.params.items()},
        "sums": {name: f"{float(p.abs().double().cpu().sum()):.5g}" for name, p in first.params.items()},
        "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
        "text": re.sub(r" at 0x[0-9a-f]+|<lambda>", "", repr(model)),
        "attributes": _attributes(model),
        "does": {f"training={training}": _does(model, first, task, dtype, training) for training in (False, True)},
    }


def _attributes(model: nn.Module) -> list[str]:
    """Plain values that modules hold, such as a slope or a threshold, which a few examples may not reach."""
    return [
        f"{name}.{key}={value!r}"
        for name, module in model.named_modules()
        for key, value in sorted(vars(module).items())
        if not key.startswith("_") and key != "training" and isinstance(value, int | float | str | bool | tuple)
    ]


def _does(model: nn.Module, first: State, task: Task, dtype: torch.dtype, training: bool) -> list[str]:
    """Outputs, gradients and buffers: gradients show what outputs do not, such as where the graph is cut.

    On the CPU, or else on the task's device: a run has one name, wherever it goes on.
    """
    for wide, digits in ((torch.float64, 5), (dtype, 3)):
        for device in dict.fromkeys((torch.device("cpu"), task.device)):
            try:
                return _told_of_passes(model, first, task, device, wide, digits, training)
            except Exception:  # a dtype or device of its own, or whatever a model raises at one that it does not take
                continue
    return ["unknown"]


def _told_of_passes(
    model: nn.Module, first: State, task: Task, device: torch.device, wide: torch.dtype, digits: int, training: bool
) -> list[str]:
    x, y = moved(task.train.x[:8], device, wide), task.train.y[:8].to(device)
    with (
        lent(model, *first.to(device, wide).clone(), training=training),
        attention_as_products(),
        float32_arithmetic(device),
        kept_generators(device),
        torch.enable_grad(),
    ):
        seed_generators(0, device)
        outputs = model(x.clone())
        weights = [p for p in model.parameters() if p.requires_grad]
        LOSSES[task.loss].mean(outputs, y).backward()  # unlike autograd.grad, through any checkpoint
        slopes = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
        steepest = max((float(slope.abs().max()) for slope in slopes if slope.numel()), default=0.0)
        rounding = steepest * torch.finfo(wide).eps ** 0.75  # a gradient that is zero but for that, as of key biases
        told = [_told(slope, digits, rounding) for slope in slopes]
        return [_told(y, digits) for y in outputs.detach()] + told + [_told(b, digits) for b in model.buffers()]


def criterion_effect(own: Any, model: nn.Module, task: Task, masks: Masks) -> dict[str, Any]:
    """The code of a user's own criterion, and its scores of the first network."""
    function, first = getattr(own, "score", own), state(model)
    x, y = task.train.x[:32], task.train.y[:32]
    scores = own_scores(function, Evidence(model, masks, first, first, x, y, 0, "global", LOSSES[task.loss]))
    rounds = getattr(own, "rounds", 1)
    return {"code": _code(function), "rounds": rounds, "does": [_told(tensor, 3) for tensor in scores.values()]}


def treatment_effect(name: str, own: Any, factory: Factory, model: nn.Module, masks: Masks) -> dict[str, Any]:
    """The code of a user's own treatment, and what it makes of the first network under half of its weights."""
    function, first = getattr(own, "start", own), state(model)
    half = {n: torch.arange(m.numel(), device=m.device).view_as(m) % 2 == 0 for n, m in masks.items()}
    begun = own_start(name, function, Origin(factory, first, half, 0, 0, 1, first, first, 0.1))
    told = [_told(tensor, 3) for tensor in (*begun.state.params.values(), *begun.masks.values())]
    how = repr((begun.order_seed, begun.frozen, begun.learning_rate, begun.dynamics))
    return {"code": _code(function), "how": how, "does": told}


def optimizer_effect(own: Callable[..., torch.optim.Optimizer], model: nn.Module) -> dict[str, Any]:
    """The code of a user's own optimizer, and where its first steps take the first network.

    Raises:
        Refused: An optimizer that fails on other gradients than those of training, or steps by chance: what it does
            cannot be told, and so no stored run be named by it.
    """
    try:
        with kept_generators(next(model.parameters()).device):
            first, again = ([_told(p, 3) for p in first_steps(own, model).values()] for _ in range(2))
    except Refused:
        raise
    except Exception as error:  # whatever a function of a user's own raises
        raise Refused(
            f"a stored run is named by what it does, and {own_name(own)} fails on gradients made up for it: {error}. "
            "Train without a store, as store=None, or let it step on any gradients."
        ) from error
    if first != again:
        raise Refused(
            f"an optimizer must be a function of its parameters and gradients where a run is stored: {own_name(own)} "
            "steps twice from the same weights to different ones. Leave its draws out, or train with store=None."
        )
    theirs = (getattr(own, "__module__", None) or "").startswith("torch.")  # its code is another in each version
    return {"code": "" if theirs else _code(own), "does": first}


def schedule_effect(recipe: Recipe) -> dict[str, Any]:
    """The rate of every step."""
    return {"rates": [f"{recipe.learning_rate_at(step):.9g}" for step in range(recipe.steps)]}


def _told(tensor: Tensor, digits: int, rounding: float = 0.0) -> str:
    """A number that depends on every entry and its place; 0 where entries are no larger than ``rounding``."""
    flat = tensor.detach().flatten()
    flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
    if rounding and flat.numel() and float(flat.abs().max()) <= rounding:
        return "0"
    mixed = flat.double() @ torch.arange(1, len(flat) + 1, device=flat.device, dtype=torch.float64).cos()
    return f"{float(mixed):.{digits}g}"


def _code(function: Callable[..., Any]) -> str:
    """A function's text, or its bytecode where there is none, with the plain values that it closes over."""
    closed = [c.cell_contents for c in getattr(function, "__closure__", None) or ()]
    known = [value for value in closed if isinstance(value, int | float | str | bool | tuple | type(None))]
    try:
        text = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        text = f"{code.co_code.hex()} {code.co_consts}" if code else type(function).__qualname__
    return f"{text} {known} {getattr(function, '__defaults__', None)}"
