"""The optimizer of a recipe: which parameters decay, whose gradient is clipped, what a user's own must keep to."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ticketlab.engine.recipe import Recipe, own_name
from ticketlab.errors import Refused


def make_optimizer(
    recipe: Recipe, model: nn.Module, params: Mapping[str, Tensor], rate: Tensor | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimizer, in its fused form (one pass over weights, gradients and state) where that is right.

    On a CPU the fused forms skip blocks in half precision (pytorch issue 191763), and none knows complex numbers.

    Args:
        recipe: Its choice, rates and decay.
        model: Tells what decays where not all does.
        params: Those of the model by name, or stacks of them; what requires no gradient is left out.
        rate: A learning rate on the device, with which the optimizer can be part of a CUDA graph.

    Raises:
        Refused: An optimizer of a user's own that is none, or not of these parameters at one rate.
    """
    trained = {name: p for name, p in params.items() if p.requires_grad}
    if callable(recipe.optimizer):
        return _own(recipe.optimizer, list(trained.values()))
    fused = all(p.is_floating_point() and (p.device.type != "cpu" or p.dtype.itemsize >= 4) for p in trained.values())
    lr = recipe.learning_rate if rate is None else rate
    shared: dict[str, Any] = {"lr": lr, "weight_decay": recipe.weight_decay, "fused": fused}
    groups: Any = list(trained.values())
    if not recipe.decay_all:
        spared = undecayed(model)
        groups = [
            {"params": [p for n, p in trained.items() if n not in spared]},
            {"params": [p for n, p in trained.items() if n in spared], "weight_decay": 0.0},
        ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=recipe.nesterov, **shared)
    adaptive = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    return adaptive(groups, capturable=rate is not None, **shared)


def undecayed(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that ``decay_all=False`` spares: those of norms, and biases of one axis.

    A norm is a batch, instance, layer, group or RMS norm of PyTorch, or a module whose class is called one, as
    ``LlamaRMSNorm``. A bias is a vector whose name says so, such as ``bias``, ``in_proj_bias`` or ``bias_ih_l0``.
    """
    own = {id(p): name for name, p in model.named_parameters()}
    norms = {own[id(p)] for m in model.modules() if _is_norm(m) for p in m.parameters(recurse=False)}
    biases = {n for n, p in model.named_parameters() if p.ndim <= 1 and "bias" in n.rpartition(".")[2]}
    return frozenset(norms | biases)


def _is_norm(module: nn.Module) -> bool:
    known = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    return isinstance(module, known) or re.search(r"Norm(\dd)?$", type(module).__name__) is not None


def clipping(recipe: Recipe, params: Sequence[Tensor], *, stacked: bool = False) -> Callable[[], None] | None:
    """What scales gradients down to the recipe's ``clip_norm``, each network's by its own norm; None: nothing does.

    Args:
        recipe: Its largest norm.
        params: All that is trained, in the model's order: of one network, or [replica, ...].
        stacked: Whether they have the replica axis.
    """
    if recipe.clip_norm is None:
        return None
    if stacked:
        return partial(_clip_each, params, recipe.clip_norm)
    return partial(_clip, params, recipe.clip_norm)


def _clip(params: Sequence[Tensor], largest: float) -> None:
    nn.utils.clip_grad_norm_(params, largest)


def _clip_each(params: Sequence[Tensor], largest: float) -> None:
    """``clip_grad_norm_`` of every replica of a stack."""
    gradients = [p.grad for p in params if p.grad is not None]
    norms = [torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in gradients]
    whole = torch.linalg.vector_norm(torch.stack(norms), dim=0)  # [replica]
    factor = (largest / (whole + 1e-6)).clamp(max=1.0)
    for g in gradients:
        g.mul_(factor.view(-1, *[1] * (g.ndim - 1)))


def first_steps(factory: Callable[[list[Tensor]], torch.optim.Optimizer], model: nn.Module) -> dict[str, Tensor]:
    """Where three steps of an optimizer of a user's own take copies of the model's weights, by made-up gradients."""
    params = {n: nn.Parameter(p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    optimizer = _own(factory, [p for p in params.values() if p.requires_grad])
    for step in range(3):
        for i, p in enumerate(params.values()):
            made_up = torch.arange(p.numel(), device=p.device, dtype=torch.float64).add(i + step).cos()
            p.grad = made_up.view_as(p).to(p.dtype) if p.requires_grad else None
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        optimizer.step()
    return {n: p.detach() for n, p in params.items()}


def _own(factory: Callable[[list[Tensor]], torch.optim.Optimizer], params: list[Tensor]) -> torch.optim.Optimizer:
    made, name = factory(list(params)), own_name(factory)
    if not isinstance(made, torch.optim.Optimizer):
        raise Refused(f"an optimizer must be a torch.optim.Optimizer: {name} returns {type(made).__name__}.")
    if {id(p) for group in made.param_groups for p in group["params"]} != {id(p) for p in params}:
        raise Refused(
            f"an optimizer must take every parameter that it is given, and no other: that of {name} does not."
        )
    rates = {float(group["lr"]) for group in made.param_groups}
    if len(rates) > 1:
        raise Refused(
            f"an optimizer has one rate, the recipe's, in all its groups: that of {name} has {sorted(rates)}."
        )
    try:
        inspect.signature(made.step).bind()
    except TypeError as error:
        raise Refused(
            f"an optimizer must step without a closure: {type(made).__name__} of {name} needs one."
        ) from error
    return made
