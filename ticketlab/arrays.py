"""Arrays as users have them (NumPy, pandas, lists, tensors), made tensors; what would be mistaken is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ticketlab import losses
from ticketlab.errors import Refused
from ticketlab.losses import FLOATING
from ticketlab.mapped import Mapped


def as_tensor(values: Any, what: str) -> Tensor:
    """Numbers as a dense tensor, detached; arrays are copied, tensors are not.

    Raises:
        Refused: Strings, objects, dates, missing or masked values, ragged lists, sparse or quantised tensors.
    """
    if isinstance(values, Tensor):
        if values.layout is not torch.strided or values.is_quantized or values.is_meta:
            raise Refused(f"{what} must be a dense tensor: got {values.layout}, {values.dtype}. Pass x.to_dense().")
        return values.detach()
    if np.ma.is_masked(values):
        raise Refused(f"{what} must have no masked entries: fill them, as x.filled(0), or drop those examples.")
    try:
        array = np.array(values)  # a copy: torch warns of read-only arrays and refuses negative strides
        kind = array.dtype.kind
        if kind in "biuf":
            return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except (TypeError, ValueError):  # ragged, on another device, or a dtype that torch lacks
        kind = "O"
    remedy = "Stack them, fill what is missing, and convert with .astype('float32')"
    if kind in "US" or what.startswith("y"):
        remedy = "Number the classes with np.unique(y, return_inverse=True)[1]"
    given = f"{type(values).__name__} of {values.dtype}" if hasattr(values, "dtype") else type(values).__name__
    raise Refused(f"{what} must be an array of numbers, one row per example: got {given}. {remedy}.")


def as_inputs(values: Any, what: str = "x") -> Tensor:
    """Inputs [n, ...]: floating and finite, or tokens in int64.

    Raises:
        Refused: NaN or infinity, bytes as pixels come, negative integers, or any other dtype.
    """
    if isinstance(values, Mapped):  # checked when it was written; it stands for a tensor
        return cast(Tensor, values)
    x = as_tensor(values, what)
    if x.dtype == torch.uint8:
        raise Refused(
            f"{what} must be floating, or integer tokens: got torch.uint8, as of pixels. Divide by 255 and normalise, "
            f"as ({what}.float() / 255 - mean) / std; convert tokens with .long()."
        )
    if x.dtype in FLOATING:
        n_wrong = int((~x.isfinite()).sum())
        if n_wrong:
            raise Refused(f"{what} must be finite: got {n_wrong} values NaN or infinite. Drop or fill those.")
        return x
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise Refused(f"{what} must be floating, or integer tokens: got {x.dtype}. Convert it with .float().")
    x = x.to(torch.int64)
    if x.numel() and int(x.min()) < 0:
        low = int(x.min())
        raise Refused(f"{what} holds integers, as tokens do, from 0: got {low}. Convert features with .float().")
    return x


def as_targets(values: Any, like: Tensor, loss: losses.LossName, what: str = "y") -> Tensor:
    """Labels in int64, or floating targets in the dtype of the inputs ``like``; on their device.

    Raises:
        Refused: Bool or floating labels, one-hot rows, a column in place of labels [n]; targets that are not finite.
    """
    y = as_tensor(values, what)
    if loss == "squared_error":
        losses.check_values(y, what)
        return y.to(like.device, like.dtype if like.is_floating_point() else y.dtype)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        losses.check_integers(y, what)
    if y.ndim == 2 and y.shape[1] == 1:
        raise Refused(f"{what} must be [n], or [n, t] with a label per token: got {tuple(y.shape)}. Pass y[:, 0].")
    return y.to(like.device, torch.int64)


def n_outputs(y: Tensor, loss: losses.LossName) -> int:
    """The number of columns of targets, or of classes where every one of them has an example.

    Raises:
        Refused: Labels that do not begin at 0 or leave one out, or labels of tokens, which need not all occur.
    """
    if loss == "squared_error":
        return math.prod(y.shape[1:])
    if y.ndim != 1:
        remedy = "Pass y.argmax(1) in place of one-hot rows." if losses.is_one_hot(y) else "Pass n_classes."
        raise Refused(f"labels [n, t] need n_classes, the number of tokens there are: got {tuple(y.shape)}. {remedy}")
    values = y.unique().tolist()
    if values != list(range(len(values))):
        raise Refused(
            "labels must be 0..n_classes - 1, with an example of each where n_classes is not given: got "
            f"{values[0]}..{values[-1]}, {len(values)} classes. {losses.renumbering(y)}"
        )
    return len(values)


def check_layout(shape: Sequence[int], floating: bool, what: str = "x") -> None:
    """Raise where the shape of one example is that of an image with its channels last, or of integer pixels.

    Raises:
        Refused: With the call that puts it right.
    """
    if 0 in shape:
        raise Refused(f"an example of {what} must hold a number: got shape {tuple(shape)}. Leave out empty axes.")
    square = len(shape) in (2, 3) and shape[0] == shape[1] > 4
    if not floating and (len(shape) > 2 or square):
        raise Refused(
            f"{what} holds integers, as tokens [n, t] do, in the shape of images: got {('n', *shape)}. Convert pixels "
            "with .float(), and normalise them; flatten a grid of tokens with .flatten(1)."
        )
    if len(shape) == 3 and min(shape[:2]) > 4 and (shape[2] == 3 or (square and shape[2] in (1, 4))):
        raise Refused(
            f"images must be [n, c, h, w], channels first: got {('n', *shape)}, as if channels came last. "
            f"Pass {what}.permute(0, 3, 1, 2), or {what}.transpose(0, 3, 1, 2) in NumPy."
        )
