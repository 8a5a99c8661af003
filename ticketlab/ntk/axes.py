"""Reading the axes of a kernel, [n, m] or [n, out, m, out] behind a replica axis or not, and of targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ticketlab.errors import Refused
from ticketlab.state import check_finite


def by_output(kernel: Tensor) -> Tensor:
    """The kernel as [*replica, n, out, m, out']; a kernel without output axes gets axes of length 1.

    Raises:
        Refused: A tensor of another number of axes, or outputs of two numbers.
    """
    if kernel.ndim in (2, 3):
        return kernel[..., :, None, :, None]
    if kernel.ndim in (4, 5) and kernel.shape[-1] == kernel.shape[-3]:
        return kernel
    raise Refused(
        "a kernel must be [n, m] or [n, out, m, out], or a stack of either behind one replica axis: "
        f"got shape {tuple(kernel.shape)}."
    )


def as_matrix(kernel: Tensor) -> Tensor:
    """The kernel as [*replica, n * out, m * out]."""
    whole = by_output(kernel)
    return whole.flatten(-2).flatten(-3, -2)


def square_matrix(kernel: Tensor) -> Tensor:
    """The same in float64, of a kernel of one set of inputs with itself.

    Raises:
        Refused: A kernel that is not finite, not square or not symmetric.
    """
    matrix = as_matrix(kernel).double()
    if matrix.shape[-1] != matrix.shape[-2]:
        raise Refused(
            f"the kernel must be that of one set of inputs with itself: got shape {tuple(kernel.shape)}. "
            "Compute it without x2."
        )
    check_finite("the kernel", matrix)
    gap, largest = (matrix - matrix.mT).abs().amax(), matrix.abs().amax()
    if gap > 1e-3 * largest:
        raise Refused(f"the kernel must be symmetric: it misses by {gap / largest:.1e} of its largest entry.")
    return (matrix + matrix.mT) / 2


def targets(kernel: Sequence[int], y: Tensor) -> Float[Tensor, "n out"]:
    """Targets that go with a kernel of this shape, in float64, labels made one-hot.

    Raises:
        Refused: Labels out of range, or targets of other inputs or outputs.
    """
    with_outputs = len(kernel) > 3
    outputs = kernel[-1] if with_outputs else 1
    if y.ndim == 1 and len(y) and not y.is_floating_point():
        low, high = int(y.min()), int(y.max())
        if low < 0 or (with_outputs and high >= outputs):
            last = outputs - 1 if with_outputs else "n_classes - 1"
            raise Refused(f"labels must lie in 0..{last}: got {low}..{high}. Number the classes from 0.")
        y = F.one_hot(y.long(), outputs if with_outputs else -1)
    y = y.double() if y.ndim == 2 else y.double()[:, None]
    if len(y) != kernel[-1 - int(with_outputs)] or (with_outputs and y.shape[1] != outputs):
        raise Refused(
            f"y must hold integer labels [n] or targets [n, out] of the kernel's inputs: got {tuple(y.shape)} "
            f"for a kernel of shape {tuple(kernel)}."
        )
    return y
