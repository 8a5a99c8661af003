"""Losses: outputs and targets in, the loss and error of each example out. No other file writes a softmax.

A `Task` names its loss, ``LOSSES[task.loss]``; everything else asks that `Loss`. Values are not looked at where they
are used, so that all of it works under ``torch.func`` transforms: call ``loss.check`` once before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ticketlab.errors import Refused

LossName = Literal["cross_entropy", "squared_error"]

IGNORED = -100
"""Label of a token that does not count, as in PyTorch; for labels [n, t] alone."""

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class PerExample(NamedTuple):
    """Loss and error of single examples, [*replica, n] each."""

    loss: Tensor
    """Differentiable, in the dtype of the outputs; in nats for cross-entropy."""
    error: Tensor
    """In [0, 1], float64: whether the largest output is another's, or the share of tokens where it is. NaN where the
    loss has no notion of right and wrong."""


@dataclass(frozen=True)
class Loss:
    """A loss, as everything that trains or measures needs it."""

    name: LossName
    each: Callable[[Tensor, Tensor], PerExample] = field(repr=False)
    """(outputs [*replica, n, ...], targets [n, ...]) -> loss and error of each example."""
    mean: Callable[[Tensor, Tensor], Tensor] = field(repr=False)
    """(outputs [n, ...], targets [n, ...]) -> mean loss of one network: a scalar, for training. A stack: ``vmap``."""
    roots: Callable[[Tensor], Tensor] = field(repr=False)
    """outputs [*, out] -> rows r of [*, root, out] with sum r r^T the Hessian of the loss in the outputs."""
    check: Callable[[Tensor, int, Sequence[int]], None] = field(repr=False)
    """(targets, n, shape of the outputs of one example): raises `Refused` where they do not fit."""

    def smoothed(self, label_smoothing: float) -> "Loss":
        """The loss against labels mixed with the uniform distribution, as a recipe may train on; errors stay.

        Raises:
            Refused: A share outside [0, 1), or a loss without labels.
        """
        if label_smoothing == 0:
            return self
        if self.name != "cross_entropy" or not 0 < label_smoothing < 1:
            raise Refused(
                "label smoothing must lie in [0, 1) and needs the cross-entropy: "
                f"got {label_smoothing} for {self.name}. Set it to 0."
            )
        each = partial(cross_entropy, label_smoothing=label_smoothing)
        return replace(self, each=each, mean=partial(mean_cross_entropy, label_smoothing=label_smoothing))

    def residual(self, outputs: Float[Tensor, "*replica_n_out"], targets: Tensor) -> Float[Tensor, "*replica_n_out"]:
        """Gradient of each example's loss in its own outputs: softmax minus one-hot for cross-entropy."""
        return torch.func.grad(lambda z: self.each(z, targets).loss.sum())(outputs)

    def bend(
        self, outputs: Float[Tensor, "*replica_n_out"], targets: Tensor, along: Float[Tensor, "*replica_n_out"]
    ) -> Float[Tensor, "*replica_n_out"]:
        """Product of the Hessian of each example's loss in its own outputs with a vector of that example."""
        return torch.func.grad(lambda z: (self.residual(z, targets) * along).sum())(outputs)


def cross_entropy(
    outputs: Float[Tensor, "*replica_n_token classes"], targets: Int[Tensor, "n *token"], label_smoothing: float = 0.0
) -> PerExample:
    r"""Cross-entropy in nats, and error: a row of NaN counts as wrong.

    .. math:: -(1 - s) \ln p_y - \frac{s}{C} \sum_c \ln p_c

    With a label per token it is the mean over the tokens of an example that are not `IGNORED`, so that an example's
    loss does not depend on the rest of its batch.
    """
    log_p = outputs.log_softmax(-1)
    counted = targets != IGNORED
    labels = (targets if targets.ndim == 1 else torch.where(counted, targets, 0)).long().expand(log_p.shape[:-1])
    loss = -log_p.gather(-1, labels[..., None])[..., 0]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(-1)
    # A row of NaN has no largest entry: it counts as wrong, whatever argmax returns for it.
    error = ((outputs.argmax(-1) != labels) | outputs.isnan().any(-1)).double()
    if targets.ndim == 1:
        return PerExample(loss, error)
    count = counted.sum(-1)
    return PerExample(torch.where(counted, loss, 0).sum(-1) / count, torch.where(counted, error, 0).sum(-1) / count)


def mean_cross_entropy(
    outputs: Float[Tensor, "n *token classes"], targets: Int[Tensor, "n *token"], label_smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Mean over examples, for training; with a label per example the very bits of ``F.cross_entropy``."""
    if targets.ndim == 1:
        return F.cross_entropy(outputs, targets.long(), label_smoothing=label_smoothing)
    return cross_entropy(outputs, targets, label_smoothing).loss.mean()


def squared_error(outputs: Float[Tensor, "*replica_n_out"], targets: Float[Tensor, "n *out"]) -> PerExample:
    r"""Squared error, the mean over an example's outputs: :math:`|f - y|^2 / O`. Its error is NaN."""
    squares = (outputs - targets).square()
    axes = tuple(range(1 - targets.ndim, 0))  # those behind n
    loss = squares.mean(axes) if axes else squares
    return PerExample(loss, torch.full_like(loss, torch.nan, dtype=torch.float64))


def probabilities(logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
    """What the network predicts."""
    return logits.softmax(-1)


def _roots_of_cross_entropy(logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes classes"]:
    r"""Rows :math:`r_c = \sqrt{p_c} (e_c - p)`, for diag(p) - p p^T = sum_c r_c r_c^T; the labels play no part."""
    p = probabilities(logits)
    one_hot = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    return p.sqrt()[..., :, None] * (one_hot - p[..., None, :])


def _roots_of_squared_error(outputs: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch out out"]:
    one_hot = torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
    return ((2 / outputs.shape[-1]) ** 0.5 * one_hot).expand(*outputs.shape, -1)


def check_labels(labels: Tensor, n_classes: int, what: str = "labels") -> None:
    """Raise unless these are class indices [n], or [n, t] with `IGNORED` among them, of ``n_classes`` classes.

    Raises:
        Refused: No tensor, another dtype, none at all, an index out of range, or an example [t] of which no token
            counts.
    """
    check_integers(labels, what)
    if labels.ndim not in (1, 2) or not labels.numel():
        raise Refused(f"{what} must be class labels [n] or [n, t], one at least: got shape {tuple(labels.shape)}.")
    counted = labels[labels != IGNORED] if labels.ndim == 2 else labels
    low, high = (int(v) for v in (counted.min(), counted.max())) if counted.numel() else (0, 0)
    if low < 0 or high >= n_classes:
        remedy = renumbering(counted, n_classes)
        raise Refused(f"{what} must be in 0..{n_classes - 1} for {n_classes} classes: got {low}..{high}. {remedy}")
    if labels.ndim == 2 and not (labels != IGNORED).any(1).all():
        raise Refused(f"{what} must count a token of every example: some have {IGNORED} alone. Leave those out.")


def check_integers(labels: Tensor, what: str) -> None:
    """Raise unless labels are a tensor of integers, bool apart."""
    if not isinstance(labels, Tensor) or labels.dtype not in INTEGERS:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        remedy = "Convert them with .long(); values need the loss 'squared_error'"
        if isinstance(labels, Tensor) and is_one_hot(labels):
            remedy = "Pass y.argmax(1) in place of one-hot rows"
        elif isinstance(labels, Tensor) and labels.isnan().any():
            remedy = "Leave out the examples whose label is NaN, and convert with .long()"
        raise Refused(f"{what} must be integer class labels, a tensor [n] or [n, t]: got {kind}. {remedy}.")


def is_one_hot(targets: Tensor) -> bool:
    """Whether every row holds a single 1 and zeros."""
    if targets.ndim != 2 or targets.shape[1] < 2 or targets.is_complex():
        return False
    return bool((((targets == 0) | (targets == 1)).all(1) & ((targets == 1).sum(1) == 1)).all())


def renumbering(labels: Tensor, n_classes: int | None = None) -> str:
    """What to do with labels that are not 0..classes - 1."""
    values = labels.unique().tolist()
    if values == [-1, 1]:
        return "Pass (y + 1) // 2 in place of -1 and 1."
    if values[0] == 1 and values[-1] == (n_classes or len(values)):
        return "Number the classes from 0: pass y - 1."
    if values[0] == IGNORED:
        return f"Leave out the examples labelled {IGNORED}: only tokens of labels [n, t] may be ignored."
    return "Number the classes from 0 without gaps, with torch.unique(y, return_inverse=True)[1], or raise n_classes."


def _check_classes(targets: Tensor, n: int, output_shape: Sequence[int]) -> None:
    """Labels for logits [n, classes] or [n, t, classes]."""
    shape, wanted = tuple(output_shape), (n, *output_shape[:-1])
    if len(shape) not in (1, 2) or shape[-1] < 2:
        raise Refused(
            "cross-entropy needs logits [n, classes] or [n, t, classes], two classes at least: the model returns "
            f"{(n, *shape)}. Give it an output per class, two for binary labels, or flatten what lies between."
        )
    check_integers(targets, "labels")
    if tuple(targets.shape) == wanted:
        check_labels(targets, shape[-1])
        return
    remedy = f"Pass labels of shape {wanted}."
    if len(shape) == 2 and targets.ndim == 1:
        remedy = "For a label per example let the model pool over t, or return the logits of one position."
    elif len(shape) == 2 and tuple(targets.shape) == (n, shape[1]):
        remedy = "Classes come last: let the model return y.permute(0, 2, 1)."
    elif tuple(targets.shape) == (n, 1):
        remedy = "Pass y[:, 0]."
    elif is_one_hot(targets):
        remedy = "Pass y.argmax(1) in place of one-hot rows."
    raise Refused(
        f"labels must have shape {wanted} for logits {(n, *shape)}: got shape {tuple(targets.shape)}. {remedy}"
    )


def check_values(targets: Tensor, what: str = "targets") -> None:
    """Raise unless these are finite floating targets of the squared error.

    Raises:
        Refused: No tensor, another dtype, none at all, NaN or infinity.
    """
    if not isinstance(targets, Tensor) or targets.dtype not in FLOATING:
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise Refused(f"{what} of the squared error must be a floating tensor: got {kind}. Convert them with .float().")
    if not targets.numel() or not targets.isfinite().all():
        raise Refused(
            f"{what} must be finite, one at least: got {tuple(targets.shape)}. Drop or fill NaN and infinity."
        )


def _check_values(targets: Tensor, n: int, output_shape: Sequence[int]) -> None:
    """Targets in the shape of the outputs: nothing is broadcast."""
    check_values(targets)
    wanted = (n, *output_shape)
    if tuple(targets.shape) != wanted:
        remedy = "Pass y[:, None]." if (*targets.shape, 1) == wanted else "Give the model as many outputs as targets."
        raise Refused(f"targets must have the shape of the outputs, {wanted}: got {tuple(targets.shape)}. {remedy}")


CROSS_ENTROPY = Loss("cross_entropy", cross_entropy, mean_cross_entropy, _roots_of_cross_entropy, _check_classes)
SQUARED_ERROR = Loss("squared_error", squared_error, F.mse_loss, _roots_of_squared_error, _check_values)
LOSSES: dict[str, Loss] = {loss.name: loss for loss in (CROSS_ENTROPY, SQUARED_ERROR)}
