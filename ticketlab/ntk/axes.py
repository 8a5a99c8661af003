"""Reading the axes of a kernel: [n, m] or [n, out, m, out], behind a replica axis or not."""

from __future__ import annotations

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
