"""Where gradients are taken: networks at m * theta, their live coordinates and the data, all of it checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ticketlab import masks as mask_ops
from ticketlab.errors import Refused
from ticketlab.functional import apply, evaluate, fitted, refuse_batch_statistics
from ticketlab.state import Buffers, Params


@dataclass(frozen=True)
class Point:
    """One network or a stack of them at m * theta, in evaluation mode."""

    model: nn.Module
    weights: Params
    """m * theta, detached."""
    buffers: Buffers
    """Floating ones in the dtype of the weights."""
    live: dict[str, Bool[Tensor, "..."]]
    """The coordinates: for each trainable parameter a bool tensor of its shape."""
    replicas: int | None
    """Length of the replica axis; None where there is none."""

    @property
    def lead(self) -> int:
        """Number of axes before a parameter's own."""
        return int(self.replicas is not None)

    def logits(self, weights: Mapping[str, Tensor], x: Tensor) -> Float[Tensor, "*replica n classes"]:
        """Outputs at other weights of the same names; what ``weights`` lacks stays as it is here."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused attentions have no second derivative
            y = apply(self.model, {**self.weights, **weights}, x, buffers=self.buffers)
        if y.ndim != 2 + self.lead:
            raise Refused(
                f"the model must return logits [n, classes] of one network: got {tuple(y.shape[self.lead :])}. "
                "Wrap it in a module that flattens its outputs."
            )
        return y

    def loss_sum(self, weights: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Float[Tensor, "*replica"]:
        """Sum of the cross-entropies in nats, one a replica."""
        logits = self.logits(weights, x)
        check_classes(y, logits.shape[-1])
        targets = y.long().expand(logits.shape[:-1])
        return -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0].sum(-1)

    def mean_loss(self, weights: Params, x: Tensor, y: Tensor, batch_size: int) -> Float[Tensor, "*replica"]:
        """Mean cross-entropy in nats, in float64 and without a graph."""
        with sdpa_kernel(SDPBackend.MATH):  # nor have they a batching rule
            return evaluate(self.model, weights, x, y, buffers=self.buffers, batch_size=batch_size)[0]

    def leaves(self) -> Params:
        """The trainable weights as leaves of a new graph."""
        return {name: self.weights[name].clone().requires_grad_() for name in self.live}

    def flat(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "*replica d"]:
        """Trainable parameters one after the other, pruned coordinates at 0, in float64."""
        parts = [torch.where(live, tensors[name], 0).double() for name, live in self.live.items()]
        return torch.cat([self._rows(part) for part in parts], -1)

    def n_live(self) -> Int[Tensor, "*replica"]:
        return torch.stack([self._rows(live).sum(-1) for live in self.live.values()]).sum(0)

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(*tensor.shape[: self.lead], -1)  # a scalar parameter is a row too


def point(
    model: nn.Module,
    params: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None,
    buffers: Mapping[str, Tensor] | None,
) -> Point:
    """The network at m * theta, or a stack of them.

    Raises:
        Refused: Names or shapes that do not fit, masks that are not bool or do not cover every prunable
            parameter, weights that are not finite, batch norm that depends on the batch, or a model without a
            trainable parameter.
    """
    refuse_batch_statistics(model, "a gradient needs")
    if masks is not None:
        mask_ops.validate(model, masks)
    replicas, fit = fitted(model, params, masks, buffers)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if not names:
        raise Refused("a gradient needs a trainable parameter: all have requires_grad=False. Set it to True.")
    weights = {name: p.detach() for name, p in fit.params.items()}
    check_finite(weights)
    dtype = weights[names[0]].dtype
    # Statistics kept in float32 must not meet inputs in float64.
    held = {n: b.detach().to(dtype) if b.is_floating_point() else b.detach() for n, b in fit.buffers.items()}
    everything = {name: torch.ones_like(weights[name], dtype=torch.bool) for name in names}
    live = {name: ones & masks[name] if masks and name in masks else ones for name, ones in everything.items()}
    return Point(model, weights, held, live, replicas)


def check_finite(params: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that names the parameters with an infinite or NaN entry."""
    wrong = [name for name, p in params.items() if not p.isfinite().all()]
    if wrong:
        raise Refused(f"params must be finite: {wrong} are not. Leave out networks whose training diverged.")


def check_labels(x: Tensor, y: Tensor) -> None:
    """Raise a ValueError unless there is an integer label for each of at least one input."""
    if x.ndim < 1 or y.ndim != 1 or not 0 < len(x) == len(y):
        raise Refused(
            "a gradient needs at least one example and one label for each: "
            f"got x of shape {tuple(x.shape)} and y of shape {tuple(y.shape)}. Pass y as [n]."
        )
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise Refused(f"labels must be integer class indices: got {y.dtype}. Convert them with .long().")


def check_classes(y: Tensor, n_classes: int) -> None:
    """Raise a ValueError unless every label is that of an output."""
    low, high, last = int(y.min()), int(y.max()), n_classes - 1
    if low < 0 or high > last:
        raise Refused(f"labels must lie in 0..{last}, the outputs: got {low}..{high}. Number the classes from 0.")


def check_data(at: Point, x: Tensor, y: Tensor, batch_size: int) -> None:
    """Raise a ValueError unless inputs and labels go together and with the model, and a batch holds something."""
    check_labels(x, y)
    weight = next(iter(at.weights.values()))
    if x.is_floating_point() and x.dtype != weight.dtype:
        raise Refused(f"x must have the dtype of params, {weight.dtype}: got {x.dtype}. Cast one of the two.")
    if batch_size < 1:
        raise Refused(f"batch_size must be at least 1 example: got {batch_size}.")
    if len(x) > 1:
        _check_apart(at, x[[0, -1]])


def _check_apart(at: Point, pair: Tensor) -> None:
    """Two inputs, and either beside a copy of itself: no output may change, or results depend on the batch size."""
    with torch.no_grad():
        logits = at.logits({}, pair)
        alone = torch.stack([at.logits({}, pair[[i, i]])[..., i, :] for i in (0, 1)], -2)
    if logits.isnan().any():
        raise Refused("logits must be numbers: the model gives NaN for finite weights. Look at its inputs.")
    rounding = torch.finfo(logits.dtype).eps ** 0.5
    size = float(logits.nan_to_num(0, 0, 0).abs().max())
    if not torch.allclose(logits, alone, rtol=rounding, atol=rounding * size):
        raise Refused(
            "each input must pass through the network by itself, the same each time: an output depends on the rest "
            "of the batch, or on chance. Replace what couples a batch, or put such modules in evaluation mode."
        )
