"""Models as pure functions of dicts of tensors, one network or a stack of replicas.

Every other module leans on this one. Parameters, buffers and masks are plain dicts keyed by the
module's own names; a *stacked* dict holds R networks of one architecture on a leading replica axis.
The user's module only lends its forward pass: its weights, buffers and mode stay as they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from ticketlab.errors import Refused, nearest
from ticketlab.seeds import initialise, stream
from ticketlab.state import Buffers, Masks, Params, State, select, stack, stack_states, state

Execution = Literal["auto", "loop", "vmap"]


def n_replicas(model: nn.Module, params: Mapping[str, Tensor]) -> int | None:
    """Length of the replica axis of ``params``; None when they are those of a single network.

    Raises:
        Refused: Names or shapes are neither the model's nor the model's behind one common axis.
    """
    own = dict(model.named_parameters())
    if set(params) != set(own):
        missing, extra = sorted(set(own) - set(params)), sorted(set(params) - set(own))
        raise Refused(
            f"params must have the model's names: missing {missing}, unknown {extra}. "
            "Take them from ticketlab.functional.state(model) or from a level of the same model."
        )
    lengths: set[int | None] = set()
    for name, tensor in params.items():
        shape = tuple(own[name].shape)
        if tuple(tensor.shape) == shape:
            lengths.add(None)
        elif tensor.ndim == len(shape) + 1 and tuple(tensor.shape[1:]) == shape:
            lengths.add(tensor.shape[0])
        else:
            raise Refused(
                f"params[{name!r}] must have shape {shape}, or [replica, *{shape}]: got {tuple(tensor.shape)}."
            )
    if len(lengths) > 1:
        raise Refused(f"all params must share one replica axis: got lengths {sorted(map(str, lengths))}.")
    return lengths.pop() if lengths else None


def masked(params: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None) -> Params:
    """m * theta: the parameters with pruned weights set to zero; unmasked ones as they are."""
    if masks is None:
        return dict(params)
    unknown = sorted(set(masks) - set(params))
    if unknown:
        raise Refused(f"masks must name parameters of the model: unknown {unknown}. Build them with masks.ones(model).")
    for name, mask in masks.items():
        if mask.shape != params[name].shape[params[name].ndim - mask.ndim :]:
            raise Refused(
                f"masks[{name!r}] must have the shape of the parameter, {tuple(params[name].shape)}: "
                f"got {tuple(mask.shape)}."
            )
    return {name: p * masks[name].to(p.dtype) if name in masks else p for name, p in params.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode; every submodule gets its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def transformable() -> Iterator[None]:
    """Attention as plain matrix products, which alone have every derivative and batching rule.

    Of other operations that ``vmap`` has no rule for, torch warns that it loops over them: slow, not wrong.
    """
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def refuse_batch_statistics(model: nn.Module, needs: str) -> None:
    """Raise a ValueError if a batch norm takes its statistics from the batch; ``needs`` begins the message."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            why = "is in training mode" if module.training else "keeps no running statistics"
            raise Refused(
                f"{needs} outputs that do not depend on the rest of the batch: batch norm {name!r} {why}. "
                "Call model.eval() (with track_running_stats=True)."
            )


def resolve(
    execution: Execution, model: nn.Module, device: torch.device, replicas: int | None = None
) -> Literal["loop", "vmap"]:
    """How a stack of replicas is computed: the one place where this is chosen.

    On an accelerator launches dominate and ``vmap`` shares them. On a CPU it pays for small fully connected
    networks alone, where Python's overhead dominates too; convolutions take a slow grouped path under it, and
    from about 10^5 weights on a thread for each replica is faster (measured by ``benchmarks/execution.py``).
    A single replica has nothing to share.
    """
    if execution not in ("auto", "loop", "vmap"):
        raise Refused(f"execution must be 'auto', 'loop' or 'vmap': got {execution!r}.")
    if execution != "auto":
        return execution
    if replicas == 1:
        return "loop"
    small = sum(p.numel() for p in model.parameters()) < 100_000
    return "vmap" if device.type != "cpu" or (small and all(p.ndim <= 2 for p in model.parameters())) else "loop"


def fitted(
    model: nn.Module,
    params: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> tuple[int | None, State]:
    """The length of the replica axis and the state m * theta, everything checked against the model.

    Args:
        model: Whose names and shapes count.
        params: Its parameters, or a stack of them.
        masks: True = kept; with the replica axis, or one for all replicas. Where they alone have the axis (the
            levels of one network), parameters are the same on all of it.
        buffers: With the replica axis of ``params`` or masks; copies of the model's own when None.

    Raises:
        Refused: Names or shapes that do not fit the model, or one another.
    """
    replicas = n_replicas(model, params)
    levels = {len(m) for name, m in (masks or {}).items() if name in params and m.ndim == params[name].ndim + 1}
    own = dict(model.named_buffers())
    if replicas is None and len(levels) == 1:
        replicas = levels.pop()
        params = {name: p.expand(replicas, *p.shape) for name, p in params.items()}
        buffers = {
            n: b.expand(replicas, *b.shape) if n in own and b.shape == own[n].shape else b
            for n, b in (buffers or {}).items()
        }
    lead = () if replicas is None else (replicas,)
    for name, mask in (masks or {}).items():
        shape = tuple(params[name].shape) if name in params else ()
        if name in params and tuple(mask.shape) not in (shape, shape[len(lead) :]):
            raise Refused(f"masks[{name!r}] must have the shape of the parameter, {shape}: got {tuple(mask.shape)}.")
    wrong = [n for n, b in (buffers or {}).items() if n not in own or tuple(b.shape) != (*lead, *own[n].shape)]
    if wrong:
        raise Refused(f"buffers must be the model's, with the replica axis {lead} of params: {wrong} are not.")
    given = buffers or {n: b.detach().expand((*lead, *b.shape)).clone() for n, b in own.items()}
    return replicas, State(masked(params, masks), dict(given))


def apply(
    model: nn.Module,
    params: Mapping[str, Tensor],
    x: Tensor,
    *,
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    execution: Execution = "auto",
) -> Tensor:
    """f(x; m * theta) in evaluation mode, for one network or a stack.

    Args:
        model: Lends its forward pass; not changed.
        params: The model's parameters, or a stack of them.
        x: Inputs [n, ...], shared by all replicas.
        masks: True = kept; stacked or not.
        buffers: The model's own when None; otherwise with the replica axis of ``params``.
        execution: How a stack is computed.

    Returns:
        Outputs [n, ...], or [replica, n, ...] for a stack.
    """
    replicas, fit = fitted(model, params, masks, buffers)
    return _forward(model, replicas, fit, x, resolve(execution, model, x.device, replicas))


def _forward(
    model: nn.Module, replicas: int | None, fit: State, x: Tensor, execution: Literal["loop", "vmap"]
) -> Tensor:
    tensors = {**fit.params, **fit.buffers}
    with evaluating(model):
        if replicas is None:
            return functional_call(model, tensors, (x,))
        if execution == "vmap":
            return vmap(lambda one: functional_call(model, one, (x,)))(tensors)
        return torch.stack([functional_call(model, select(tensors, r), (x,)) for r in range(replicas)])


@torch.no_grad()
def evaluate(
    model: nn.Module,
    params: Mapping[str, Tensor],
    x: Tensor,
    y: Int[Tensor, " n"],
    *,
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    batch_size: int = 2500,
    execution: Execution = "auto",
) -> tuple[Float[Tensor, "*replica"], Float[Tensor, "*replica"]]:
    """Mean cross-entropy in nats and error in [0, 1] over a data set, in evaluation mode.

    Both are float64 and do not depend on ``batch_size`` beyond the rounding of the logits: losses are
    summed in float64 and errors are counted as integers.

    Returns:
        (loss_nats, error), each a scalar, or [replica] for a stack.

    Raises:
        Refused: No examples, or a label too many or too few.
    """
    if not 0 < len(x) == len(y):
        raise Refused(f"evaluate needs at least one example and a label for each: got {len(x)} and {len(y)}.")
    replicas, fit = fitted(model, params, masks, buffers)
    how = resolve(execution, model, x.device, replicas)
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    wrong = torch.zeros((), dtype=torch.int64, device=x.device)
    for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True):
        logits = _forward(model, replicas, fit, xs, how)  # [*replica, batch, classes]
        targets = ys.expand(logits.shape[:-1])
        nats = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        loss = loss + nats.sum(-1, dtype=torch.float64)
        # A row of NaN has no largest entry: it counts as wrong, whatever argmax returns for it.
        right = (logits.argmax(-1) == targets) & ~logits.isnan().any(-1)
        wrong = wrong + (~right).sum(-1)
    return loss / len(y), wrong.double() / len(y)


__all__ = [
    "Buffers",
    "Execution",
    "Masks",
    "Params",
    "State",
    "apply",
    "evaluate",
    "initialise",
    "nearest",
    "select",
    "stack",
    "stack_states",
    "state",
    "stream",
]
