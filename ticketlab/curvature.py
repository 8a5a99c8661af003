"""Curvature of the loss at a ticket: eigenvalues and trace of its Hessian or Gauss-Newton matrix, in live coordinates.

Leans on `Network` and on products with the matrix, which is never held: Lanczos and Hutchinson. Takes any
``nn.Module``, one network or a stack, and changes neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ticketlab import lanczos
from ticketlab.data import Task
from ticketlab.derivatives import gauss_newton_product, hessian_product
from ticketlab.errors import Refused, check_count, check_type, nearest
from ticketlab.losses import Loss
from ticketlab.network import Network, network, output_shape
from ticketlab.probing import close
from ticketlab.seeds import stream
from ticketlab.shown import as_line, as_table
from ticketlab.state import Params, State, check_finite, stack

MatrixName = Literal["hessian", "gauss_newton"]
End = Literal["largest", "smallest"]
SplitName = Literal["train", "validation", "test"]

_PRODUCTS = {"hessian": hessian_product, "gauss_newton": gauss_newton_product}


@dataclass(frozen=True)
class Eigenvalues:
    """One end of the spectrum of a curvature matrix; float64."""

    values: Float[Tensor, "*replica k"]
    """Descending, in units of the loss per squared unit of the weights."""
    residuals: Float[Tensor, "*replica k"]
    """||A v - lambda v|| of each pair, ||v|| = 1: an eigenvalue lies that near, but for the rounding of A v."""
    n: int
    """Examples that the loss is a mean of."""
    n_live: Int[Tensor, "*replica"]
    """Side of the matrix: kept weights, and parameters without a mask."""
    vectors: Params | None = field(default=None, repr=False)
    """Of each trainable parameter, [*replica, k, *shape], zero at pruned weights; together of norm 1, signs at will."""

    __repr__, _repr_html_ = as_line, as_table


@dataclass(frozen=True)
class Trace:
    """Estimated trace of a curvature matrix; float64, one per replica."""

    value: Float[Tensor, "*replica"]
    standard_error: Float[Tensor, "*replica"]
    """From the spread over probes."""
    n: int
    """Examples that the loss is a mean of."""
    n_live: Int[Tensor, "*replica"]
    """Side of the matrix."""

    __repr__, _repr_html_ = as_line, as_table


def top_eigenvalues(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    task: Task,
    *,
    k: int = 1,
    matrix: MatrixName = "hessian",
    end: End = "largest",
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    loss: Loss | None = None,
    split: SplitName = "train",
    limit: int | None = None,
    vectors: bool = False,
    batch_size: int = 500,
    tolerance: float | None = None,
    max_products: int = 1000,
    seed: int = 0,
) -> Eigenvalues:
    r"""Eigenvalues of the Hessian of the mean loss, or of its Gauss-Newton matrix, at m * theta in live coordinates.

    .. math:: H = \nabla^2 \frac1N \sum_n \ell(f(x_n; \theta), y_n) \Big|_{m \odot \theta}, \qquad
              G = \frac1N \sum_n J_n^\top \frac{\partial^2 \ell_n}{\partial f^2} J_n

    in evaluation mode: batch norm uses its running statistics. G is H without the curvature of the network itself,
    never negative, and equal to H where the network is linear in its parameters. Found by Lanczos (ARPACK), one pass
    over the data for each product; the matrix is not held. Gradient descent with the learning rate eta is stable on a
    quadratic where the largest eigenvalue of H, the sharpness, is below 2 / eta, and full-batch training tends to that
    edge: compare ``values[..., 0] * learning_rate`` with 2 (Cohen et al. 2021, arXiv:2103.00065).

    Args:
        model: Any module in float weights; not changed. Parameters with ``requires_grad=False`` are no coordinates.
        state: One network or a stack, as for :func:`ticketlab.network.network`.
        task: Data and loss.
        k: Number of eigenvalues, in 1..live coordinates.
        matrix: ``hessian`` or ``gauss_newton``.
        end: ``largest``: the k largest. ``smallest``: the k least, of a Hessian the most negative ones, of which
            ``values[..., -1]`` is the least; where curvature is positive they are found slowly.
        masks: True = kept; stacked or not, also over the parameters of one network, as its levels.
        buffers: In place of those in ``state``; stacked or not.
        loss: In place of the task's own, as where labels were smoothed.
        split: Which data.
        limit: Examples, the first ones of the split; all when None.
        vectors: Return eigenvectors too.
        batch_size: Examples whose graph is held at once; changes the result by rounding alone.
        tolerance: Largest estimated residual of a pair, relative to its eigenvalue or to the root mean square of all,
            whichever is larger; by the dtype of the weights when None.
        max_products: About how many products one run of Lanczos may take. For more than one eigenvalue there are two
            runs at least, for an eigenvalue that occurs several times is seen once by each.
        seed: Of the start vector, which decides rounding alone.

    Raises:
        Refused: Arguments that do not fit the model or one another, weights, inputs or derivatives that are not
            finite, outputs that depend on the rest of the batch, a model whose second derivative is missing or not
            symmetric, a ``k`` out of range, or Lanczos that does not converge.
    """
    if end not in get_args(End):
        raise Refused(nearest("end", end, get_args(End)))
    if tolerance is not None and not 0 < tolerance < 1:
        raise Refused(f"tolerance must lie in (0, 1), relative to an eigenvalue: got {tolerance}. None will do.")
    if max_products < 1:
        raise Refused(f"max_products must be at least 1: got {max_products}.")
    net, parts = _parts(model, state, task, matrix, masks, buffers, loss, split, limit, batch_size)
    least = min(part.n_live for part in parts)
    if not isinstance(k, Integral) or isinstance(k, bool) or not 1 <= k <= least:
        raise Refused(f"k must be an integer in 1..{least}, the number of live coordinates: got {k}.")
    sign = 1 if end == "largest" else -1
    tolerance = tolerance or torch.finfo(net.dtype).eps ** (2 / 3)

    def pairs(part: _Matrix) -> lanczos.Pairs:
        generator = stream("curvature start", seed)
        return lanczos.largest(
            lambda v: sign * part.product(v),
            part.n_live,
            int(k),
            generator,
            tolerance=tolerance,
            max_products=max_products,
        )

    found = [pairs(part) for part in parts]
    if sign < 0:  # descending again
        found = [lanczos.Pairs(-one.values[::-1], one.vectors[:, ::-1], one.residuals[::-1]) for one in found]
    values, residuals = (_joined(net, [getattr(one, what).copy() for one in found]) for what in ("values", "residuals"))
    whole = None
    if vectors:
        columns = [stack([part.placed(v) for v in one.vectors.T]) for part, one in zip(parts, found, strict=True)]
        whole = columns[0] if net.replicas is None else stack(columns)
    return Eigenvalues(values, residuals, len(parts[0].x), _sides(net, parts), whole)


def trace(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    task: Task,
    *,
    matrix: MatrixName = "hessian",
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    loss: Loss | None = None,
    split: SplitName = "train",
    limit: int | None = None,
    n_probes: int = 32,
    batch_size: int = 500,
    seed: int = 0,
) -> Trace:
    r"""Trace of the Hessian or Gauss-Newton matrix by Hutchinson's estimator, with its standard error.

    .. math:: \mathrm{tr} A = E_v\, v^\top A v

    with Rademacher v over live coordinates (Hutchinson 1990): unbiased, of variance
    :math:`2 (\|A\|_F^2 - \sum_i A_{ii}^2)` a probe, exact for a diagonal A.

    Args:
        n_probes: At least 2, or there is no standard error; each is one pass over the data.
        seed: Of the probes; replicas share them as far as they have the same number of live coordinates.
            The others as in `top_eigenvalues`.

    Raises:
        Refused: As for `top_eigenvalues`, or fewer than 2 probes.
    """
    check_count("n_probes", n_probes, 2, 10**8)  # one has no standard error
    net, parts = _parts(model, state, task, matrix, masks, buffers, loss, split, limit, batch_size)
    samples = []
    for part in parts:
        generator = stream("curvature trace", seed)
        signs = (torch.randint(0, 2, (part.n_live,), generator=generator).numpy() * 2.0 - 1 for _ in range(n_probes))
        samples.append(np.array([v @ part.product(v) for v in signs]))
    values = _joined(net, [one.mean() for one in samples])
    errors = _joined(net, [one.std(ddof=1) / n_probes**0.5 for one in samples])
    return Trace(values, errors, len(parts[0].x), _sides(net, parts))


@dataclass(frozen=True)
class _Matrix:
    """The curvature of one network in its live coordinates, as products alone."""

    name: MatrixName
    net: Network
    x: Tensor
    y: Tensor
    loss: Loss
    batch_size: int

    @cached_property
    def n_live(self) -> int:
        return sum(int(live.sum()) for live in self.net.live.values())

    def placed(self, vector: Float[np.ndarray, " live"]) -> Params:
        """A vector over live coordinates as parameters, in their dtype, zero at pruned weights."""
        flat, found = torch.from_numpy(np.ascontiguousarray(vector)), {}
        parts = flat.split([int(live.sum()) for live in self.net.live.values()])
        for (name, live), part in zip(self.net.live.items(), parts, strict=True):
            found[name] = torch.zeros_like(self.net.params[name])
            found[name][live] = part.to(found[name])
        return found

    def product(self, vector: Float[np.ndarray, " live"]) -> Float[np.ndarray, " live"]:
        """A v, finite."""
        multiply = _PRODUCTS[self.name]
        found = multiply(self.net, self.x, self.y, self.loss, self.placed(vector.ravel()), self.batch_size)
        check_finite(f"products with the {self.name}", found)
        return torch.cat([found[n][live].double() for n, live in self.net.live.items()]).cpu().numpy()


def _parts(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    task: Task,
    matrix: MatrixName,
    masks: Mapping[str, Tensor] | None,
    buffers: Mapping[str, Tensor] | None,
    loss: Loss | None,
    split: SplitName,
    limit: int | None,
    batch_size: int,
) -> tuple[Network, list[_Matrix]]:
    """The matrix of each network, everything checked."""
    for what, given, known in (("matrix", matrix, MatrixName), ("split", split, SplitName)):
        if given not in get_args(known):
            raise Refused(nearest(what, given, get_args(known)))
    if not isinstance(batch_size, int) or batch_size < 1:
        raise Refused(f"batch_size must be at least 1 example: got {batch_size}.")
    check_type("task", task, Task, "Build one of tensors with tl.Task.from_tensors(x, y).")
    data = getattr(task if limit is None else task.limit(**{split: limit}), split)
    loss = task.objective if loss is None else loss
    check_type("loss", loss, Loss, "Pass task.objective, or losses.LOSSES[name].")
    net = network(model, state, data.x, masks=masks, buffers=buffers)
    loss.check(data.y, len(data), output_shape(net, data.x))
    parts = [_Matrix(matrix, one, data.x, data.y, loss, batch_size) for one in net.each()]
    if not all(part.n_live for part in parts):
        raise Refused(
            "curvature needs a live coordinate: every trainable weight is pruned, or all parameters have "
            "requires_grad=False. Set it to True, or keep a weight."
        )
    if matrix == "hessian":
        _check_symmetric(parts[0])
    return net, parts


def _check_symmetric(part: _Matrix) -> None:
    """Of the first examples: u . H v = v . H u, for PyTorch may differentiate a backward pass, and wrongly."""
    few = _Matrix(part.name, part.net, part.x[:32], part.y[:32], part.loss, part.batch_size)
    u, v = torch.randn(2, few.n_live, generator=stream("curvature symmetry", 0), dtype=torch.float64).numpy()
    of_u, of_v = few.product(u), few.product(v)
    size = np.linalg.norm(u * of_v) + np.linalg.norm(v * of_u)
    left, right = (torch.tensor([one, size]).to(part.net.device, part.net.dtype) for one in (u @ of_v, v @ of_u))
    if not close(left, right):
        raise Refused(
            f"the Hessian must be symmetric: u'Hv = {u @ of_v:.6g} and v'Hu = {v @ of_u:.6g}. The model has an "
            "operation whose second derivative is wrong. Let the backward pass of a torch.autograd.Function be made of "
            "differentiable operations, or pass matrix='gauss_newton'."
        )


def _joined(net: Network, found: list[np.ndarray]) -> Tensor:
    """One per replica, on the device of the network."""
    return torch.as_tensor(found[0] if net.replicas is None else np.stack(found), device=net.device)


def _sides(net: Network, parts: list[_Matrix]) -> Tensor:
    return _joined(net, [np.asarray(part.n_live) for part in parts])
