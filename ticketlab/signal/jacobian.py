"""Exact singular values of the Jacobian at each input, and what they say of dynamical isometry."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ticketlab.derivatives import pullback
from ticketlab.errors import Refused
from ticketlab.probing import close
from ticketlab.shown import as_line, as_table
from ticketlab.signal.section import At, Section, hooked, sections, weights_of_outputs
from ticketlab.state import State, check_finite

ACTIVE = 2**23  # bytes of the largest activation in a block, so that it stays near the cache
_BLOCK = 2**22  # bytes that the rows or columns of one block of inputs may take; larger ones cost page faults
_DIRECTIONS = 64  # coordinates differentiated in at once, where they are the fewer


@dataclass(frozen=True)
class Isometry:
    """How far Jacobians are from stretching every direction alike, one number per input."""

    mean_squared: Float[Tensor, "*replica n"]
    """Mean of s^2 over the min(in, out) singular values."""
    condition_number: Float[Tensor, "*replica n"]
    """Largest over least; infinite where a direction is lost."""
    distance: Float[Tensor, "*replica n"]
    """sqrt(mean (s - 1)^2): the Frobenius distance to the nearest (partial) isometry over sqrt(min(in, out))."""
    scaled_distance: Float[Tensor, "*replica n"]
    """sqrt(1 - (mean s)^2 / mean s^2), in [0, 1]: to the nearest multiple of an isometry, relative to the norm.

    NaN where J = 0."""

    __repr__, _repr_html_ = as_line, as_table


def jacobian_singular_values(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    *,
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    source: str | None = None,
    target: str | None = None,
) -> Float[Tensor, "*replica n min_in_out"]:
    r"""Singular values of the input-output Jacobian at every input, or of that between two modules.

    .. math:: J(x) = \partial f(x; m \odot \theta) / \partial x

    (Pennington et al. 2017). Inputs do not act on one another, so one backward pass of the whole batch gives one
    row of each input's Jacobian, and one product with J a column: whichever side is smaller is taken, in blocks
    of inputs. The values come from the triangular factor of J, without squaring it.

    Args:
        model: Lends its forward pass; not changed.
        state: One network or a stack, as for :func:`ticketlab.network.network`.
        x: Inputs, shared by all replicas; tokens too, where ``source`` is what embeds them.
        masks: True = kept; stacked or not.
        buffers: In place of those in ``state``; stacked or not.
        source: Module whose output is differentiated in; the input when None.
        target: Module whose output is differentiated; the network's output when None.

    Returns:
        Descending, in the dtype of the outputs; half precision is factorised in float32.

    Raises:
        Refused: Arguments that do not fit the model, inputs that act on one another, modules that are unknown, run
            more than once or return something else than a tensor [n, ...], values that are not finite.
    """
    found, stacked, slopes = sections(model, state, x, masks, buffers, source, target)
    values = torch.stack(_singular_values(found, x, slopes))
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


def _singular_values(found: Sequence[Section], x: Tensor, slopes: Float[Tensor, "2 *shape"]) -> list[Tensor]:
    values: list[Tensor] = []
    plan: _Plan | None = None
    for section in found:
        with torch.enable_grad(), section.net.lent():
            first = plan is None
            plan = plan or _plan(section, x)
            blocks = x.split(plan.size)
            own = plan.fast and _vectorised(plan, section, blocks, slopes.flatten(1) if first else None)
            if own is None:  # a rule that is missing, or wrong, is so for every replica
                plan = replace(plan, fast=None)
                matrices = (rows(section.at(block)) for block in blocks)
                own = [_of_matrices(matrix if plan.by_rows else matrix.mT) for matrix in matrices]
        values.append(torch.cat(own))
    return values


@dataclass(frozen=True)
class _Plan:
    """How Jacobians are computed."""

    by_rows: bool
    fast: Callable[[At], Tensor] | None
    """Vectorised J' or J of a block; None where outputs are taken one after another."""
    size: int
    """Inputs in a block."""
    weights: Float[Tensor, " out"]
    """Of the outputs, where plain autograd is asked for their sum."""


def _plan(section: Section, x: Tensor) -> _Plan:
    u, y = section.at(x[:1])
    by_rows = y.numel() <= u.numel()
    held, active = y.element_size() * y.numel() * u.numel(), widest(section, x)
    size = max(1, min(_BLOCK // held, ACTIVE // (active if by_rows else active * _DIRECTIONS)))
    in_cache = y.numel() * active * min(size, len(x)) <= ACTIVE
    fast = _columns if not by_rows else _rows if in_cache else None
    return _Plan(by_rows, fast, size, weights_of_outputs(y))


def _vectorised(
    plan: _Plan, section: Section, blocks: Sequence[Tensor], slopes: Float[Tensor, "2 in"] | None
) -> list[Tensor] | None:
    """Singular values by the fast path; None where an operation has no rule for it, or a wrong one.

    What is wrong with a rule may depend on shapes: the first block has those of all but the last. ``slopes`` are what
    plain autograd gives at the first input and at the last.
    """
    assert plan.fast is not None
    values = []
    for i, block in enumerate(blocks):
        at = section.at(block)
        try:
            found = plan.fast(at)
        except Exception:  # whatever an operation without a rule raises
            return None
        for end in () if slopes is None else (0, -1):
            if i == end % len(blocks):
                own = found[end] if plan.by_rows else found[end].mT
                weights, slope = plan.weights.to(own.dtype), slopes[end].to(own.dtype)  # type: ignore[index]
                if not close(own @ weights, slope):
                    return None
        values.append(_of_matrices(found))
    return values


def widest(section: Section, x: Tensor) -> int:
    """Bytes of the largest activation of one input."""
    sizes = [x[0].numel() * x.element_size()]

    def note(_name: str, output: object) -> None:
        sizes.extend([output.numel() * output.element_size()] if isinstance(output, Tensor) else [])

    with torch.no_grad(), hooked(section.net.model, [n for n, _ in section.net.model.named_modules()], note):
        section.at(x[:1])
    return max(sizes)


def rows(at: At) -> Float[Tensor, "n in out"]:
    """J' of each input by plain autograd, one backward pass of the batch per output."""
    found = [pullback(column.sum(), [at.u], retain_graph=True)[0] for column in at.y.unbind(1)]
    return torch.stack(found).flatten(2).permute(1, 2, 0)


def _rows(at: At) -> Float[Tensor, "n in out"]:
    """The same, vectorised over outputs."""
    ones = torch.eye(at.y.shape[1], dtype=at.y.dtype, device=at.y.device)[:, None].expand(-1, len(at.y), -1)
    (found,) = torch.autograd.grad(at.y, at.u, ones, is_grads_batched=True)
    return found.flatten(2).permute(1, 2, 0)


def _columns(at: At) -> Float[Tensor, "n out in"]:
    """J of each input, one product with J for each coordinate that enters, vectorised."""
    dual, pulled = transposed(at)
    basis = torch.eye(at.u[0].numel(), dtype=at.u.dtype, device=at.u.device).reshape(-1, 1, *at.u.shape[1:])
    chunks = [
        torch.autograd.grad(pulled, dual, some.expand(-1, *at.u.shape), is_grads_batched=True, retain_graph=True)[0]
        for some in basis.split(_DIRECTIONS)
    ]
    return torch.cat(chunks).permute(1, 2, 0)


def transposed(at: At) -> tuple[Tensor, Tensor]:
    """w, and J' w with a graph: it is linear in w, so that its derivative along v is J v."""
    dual = torch.zeros_like(at.y).requires_grad_()
    return dual, pullback(at.y, [at.u], dual, create_graph=True)[0]


def _of_matrices(tall: Float[Tensor, "n long short"]) -> Float[Tensor, "n short"]:
    """A tall matrix and its triangular factor have the same singular values, and the factor is small.

    What is not finite in one is not finite in the other.
    """
    wide = tall.float() if tall.dtype.itemsize < 4 else tall  # no factorisation is in half precision
    factor = torch.linalg.qr(wide, mode="r")[1]
    check_finite("derivatives", factor)
    return torch.linalg.svdvals(factor).to(tall.dtype)
