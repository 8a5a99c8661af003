"""What a network would predict if its kernel stayed as it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ticketlab.errors import Refused
from ticketlab.ntk.axes import as_matrix, square_matrix
from ticketlab.state import check_finite


def kernel_regression(
    k_train: Tensor,
    y_train: Float[Tensor, "n out"],
    k_test: Tensor,
    ridge: float = 0.0,
    *,
    f_train: Float[Tensor, "*replica n out"] | None = None,
    f_test: Float[Tensor, "*replica m out"] | None = None,
) -> Float[Tensor, "*replica m out"]:
    r"""Kernel (ridge) regression, the limit of :func:`gradient_flow_prediction`.

    .. math:: \hat f = f_{test} + K_{test} (K_{train} + \rho I)^{+} (y - f_{train})

    The pseudo-inverse leaves out directions that the kernel does not have: without a ridge this is the
    least-norm solution, which gradient descent from theta reaches in a linear model.

    Args:
        k_train: [n, n], or [n, out, n, out], stacked or not.
        y_train: Targets, real; one-hot for classes.
        k_test: [m, n], or [m, out, n, out]: ``kernel(model, state, x_test, x_train)``.
        ridge: rho, in the units of the kernel.
        f_train: Outputs of the network on the training inputs; zero when None.
        f_test: Outputs of the network on the test inputs; zero when None.

    Raises:
        Refused: A negative ridge, kernels that are not finite, or shapes that do not go together.
    """
    if not ridge >= 0:
        raise Refused(f"ridge must be at least 0: got {ridge}.")
    return _predict(k_train, y_train, k_test, lambda values: 1 / (values + ridge), f_train, f_test)


def gradient_flow_prediction(
    k_train: Tensor,
    y_train: Float[Tensor, "n out"],
    k_test: Tensor,
    time: float,
    *,
    f_train: Float[Tensor, "*replica n out"] | None = None,
    f_test: Float[Tensor, "*replica m out"] | None = None,
) -> Float[Tensor, "*replica m out"]:
    r"""Outputs after gradient flow for a time on half the sum of squared errors, with the kernel held fixed.

    .. math:: f(t) = f_{test} + K_{test} K_{train}^{-1} (I - e^{-K_{train} t}) (y - f_{train})

    Gradient descent at rate eta on the *mean* over n examples of half the squared error has
    t = eta * steps / n (Jacot et al. 2018; Lee et al. 2019, arXiv:1902.06720, eq. 11).

    Args:
        time: t, at least 0; infinite for the limit. The others as in :func:`kernel_regression`.

    Raises:
        Refused: A negative time, kernels that are not finite, or shapes that do not go together.
    """
    if not time >= 0:
        raise Refused(f"time must be at least 0: got {time}.")
    if math.isinf(time):
        return kernel_regression(k_train, y_train, k_test, f_train=f_train, f_test=f_test)
    return _predict(k_train, y_train, k_test, lambda v: -torch.expm1(-v * time) / v, f_train, f_test)


def _predict(
    k_train: Tensor,
    y_train: Tensor,
    k_test: Tensor,
    response: Callable[[Tensor], Tensor],
    f_train: Tensor | None,
    f_test: Tensor | None,
) -> Tensor:
    matrix, across = square_matrix(k_train), as_matrix(k_test).double()
    has_outputs = k_train.ndim > 3
    n = k_train.shape[-2 - 2 * int(has_outputs)]
    if y_train.ndim != 2 or len(y_train) != n or (has_outputs and y_train.shape[1] != k_train.shape[-1]):
        raise Refused(
            f"y_train must hold real targets [n, out] of the training inputs: got {tuple(y_train.shape)} for a kernel "
            f"of shape {tuple(k_train.shape)}. Make labels one-hot."
        )
    if across.shape[-1] != matrix.shape[-1] or (k_test.ndim > 3) != has_outputs:
        raise Refused(
            "k_test must have the test inputs first and the training inputs second, with the output axes of k_train: "
            f"got {tuple(k_test.shape)} for {tuple(k_train.shape)}. "
            "Compute it as kernel(model, state, x_test, x_train)."
        )
    check_finite("k_test", k_test)
    test = (k_test.shape[-2 - 2 * int(has_outputs)], y_train.shape[1])
    for name, f, shape in (("f_train", f_train, tuple(y_train.shape)), ("f_test", f_test, test)):
        if f is not None and (f.ndim not in (2, 3) or f.shape[-2:] != shape):
            raise Refused(
                f"{name} must hold the outputs {shape} of the network, stacked or not: got {tuple(f.shape)}. "
                "Of a network with one output they are [n, 1]."
            )
    gap = y_train.double() - (0 if f_train is None else f_train.double())
    gap = gap.flatten(-2)[..., None] if has_outputs else gap
    values, vectors = torch.linalg.eigh(matrix)
    # A direction below the rounding of the kernel is one that training cannot move, at any time.
    floor = values[..., -1:] * torch.finfo(k_train.dtype).eps * matrix.shape[-1]
    known = values > floor
    weights = torch.where(known, response(torch.where(known, values, 1)), 0)
    found = across @ (vectors @ (weights[..., None] * (vectors.mT @ gap)))
    found = found.unflatten(-2, (-1, k_train.shape[-1]))[..., 0] if has_outputs else found
    return (found + (0 if f_test is None else f_test.double())).to(k_train.dtype)
