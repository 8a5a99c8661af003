"""Exact singular values of the Jacobian at each input, and what they say of dynamical isometry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vjp, vmap

from ticketlab.errors import Refused
from ticketlab.signal.section import Section, hooked, sections

_BLOCK = 2**22  # bytes that the rows or columns of one block of inputs may take; larger ones cost page faults
_ACTIVE = 2**23  # bytes of the largest activation in a block, so that it stays near the cache
_DIRECTIONS = 64  # coordinates differentiated in at once, where they are the fewer


@dataclass(frozen=True)
class Isometry:
    """How far Jacobians are from stretching every direction alike, one number an input."""

    mean_squared: Float[Tensor, "*replica n"]
    """Mean of s^2 over the min(in, out) singular values."""
    condition_number: Float[Tensor, "*replica n"]
    """Largest over least; infinite where a direction is lost."""
    distance: Float[Tensor, "*replica n"]
    """sqrt(mean (s - 1)^2): the Frobenius distance to the nearest (partial) isometry over sqrt(min(in, out))."""
    scaled_distance: Float[Tensor, "*replica n"]
    """sqrt(1 - (mean s)^2 / mean s^2), in [0, 1]: to the nearest multiple of an isometry, relative to the norm.

    NaN where J = 0."""


def jacobian_singular_values(
    model: nn.Module,
    params: Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    masks: Mapping[str, Tensor] | None = None,
    *,
    buffers: Mapping[str, Tensor] | None = None,
    source: str | None = None,
    target: str | None = None,
) -> Float[Tensor, "*replica n min_in_out"]:
    r"""Singular values of the input-output Jacobian at every input, or of that between two modules.

    .. math:: J(x) = \partial f(x; m \odot \theta) / \partial x

    (Pennington et al. 2017). Inputs do not act on one another, so one backward pass of the whole batch gives one
    row of each input's Jacobian, and one product with J a column: whichever side is smaller is taken, in blocks
    of inputs. The values come from the triangular factor of J, without squaring it. The network is in evaluation
    mode; dropout is off.

    Args:
        model: Lends its forward pass; not changed.
        params: Its parameters, or a stack of them.
        x: Inputs, shared by all replicas, in the dtype of the parameters.
        masks: True = kept; stacked or not.
        buffers: The model's own when None; otherwise with the replica axis of ``params``.
        source: Module whose output is differentiated in; the input when None.
        target: Module whose output is differentiated; the network's output when None.

    Returns:
        Descending, in the dtype of ``params``.

    Raises:
        Refused: Arguments that do not fit the model, batch norm in training mode, inputs that act on one another,
            modules that are unknown or run more than once.
    """
    found, stacked = sections(model, params, x, masks, buffers, source, target)
    values = torch.stack([_singular_values(section, x) for section in found])
    return values if stacked else values[0]


def isometry(singular_values: Float[Tensor, "*replica n k"]) -> Isometry:
    """Mean squared singular value, condition number and distances from dynamical isometry, input by input.

    Raises:
        Refused: Values that are negative, not finite, or none.
    """
    s = singular_values
    if s.ndim == 0 or s.shape[-1] == 0 or not bool((s >= 0).all() & s.isfinite().all()):
        raise Refused(f"singular values must be [..., k] with k >= 1, finite and >= 0: got shape {tuple(s.shape)}.")
    s = s.double()
    squared = s.square().mean(-1)
    relative = s.mean(-1).square() / squared  # NaN where J = 0, which is not close to anything
    return Isometry(
        mean_squared=squared,
        condition_number=torch.where(squared == 0, math.inf, s.amax(-1) / s.amin(-1)),
        distance=(s - 1).square().mean(-1).sqrt(),
        scaled_distance=(1 - relative).clamp(min=0).sqrt(),
    )


def _singular_values(section: Section, x: Tensor) -> Tensor:
    with torch.no_grad():
        u = section.entering(x[:1])
        n_in, n_out = u[0].numel(), section(u, x[:1]).shape[1]
    by_rows = n_out <= n_in
    held = x.element_size() * n_in * n_out
    active = widest(section, x)
    size = max(1, min(_BLOCK // held, _ACTIVE // (active if by_rows else active * _DIRECTIONS)))
    matrices = partial(_rows, at_once=n_out * active * min(size, len(x)) <= _ACTIVE) if by_rows else _columns
    return torch.cat([_of_matrices(matrices(section, block)) for block in x.split(size)])


def widest(section: Section, x: Tensor) -> int:
    """Bytes of the largest activation of one input."""
    sizes = [x[0].numel()]

    def note(_name: str, output: object) -> None:
        sizes.extend([output.numel()] if isinstance(output, Tensor) else [])

    with torch.no_grad(), hooked(section.model, [n for n, _ in section.model.named_modules()], note):
        section(section.entering(x[:1]), x[:1])
    return x.element_size() * max(sizes)


def _rows(section: Section, x: Tensor, at_once: bool) -> Float[Tensor, "n in out"]:
    """J' of each input, one backward pass of the batch an output; vectorised over outputs where that is in cache."""
    with torch.enable_grad():
        u = section.entering(x).requires_grad_()
        y = section(u, x)
        if at_once:
            ones = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)[:, None].expand(-1, len(y), -1)
            (rows,) = torch.autograd.grad(y, u, ones, is_grads_batched=True)
        else:
            rows = torch.stack([torch.autograd.grad(column.sum(), u, retain_graph=True)[0] for column in y.unbind(1)])
    return rows.flatten(2).permute(1, 2, 0)


def _columns(section: Section, x: Tensor) -> Float[Tensor, "n out in"]:
    """J of each input, one product with J for each coordinate that enters, vectorised."""
    u = section.entering(x)
    y, pull = section.linearised(u, x)
    push = vjp(lambda w: pull(w)[0], torch.zeros_like(y))[1]  # J v as the derivative of w -> J' w, linear in w
    basis = torch.eye(u[0].numel(), dtype=u.dtype, device=u.device).reshape(-1, 1, *u.shape[1:])
    return vmap(lambda v: push(v.expand_as(u))[0], chunk_size=_DIRECTIONS)(basis).permute(1, 2, 0)


def _of_matrices(tall: Float[Tensor, "n long short"]) -> Float[Tensor, "n short"]:
    """A tall matrix and its triangular factor have the same singular values, and the factor is small."""
    return torch.linalg.svdvals(torch.linalg.qr(tall, mode="r")[1])
