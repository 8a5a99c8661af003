"""Stochastic spectra of Jacobians too large to hold: moments by Hutchinson's estimator, the top by Lanczos."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ticketlab.derivatives import pullback
from ticketlab.errors import Refused, check_count
from ticketlab.lanczos import largest
from ticketlab.probing import close
from ticketlab.seeds import stream
from ticketlab.shown import as_line, as_table
from ticketlab.signal.jacobian import ACTIVE, rows, transposed, widest
from ticketlab.signal.section import At, Section, sections, weights_of_outputs
from ticketlab.state import State, check_finite

_MATRIX = 2**30  # bytes that a Jacobian may take where it has to be held after all

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Moments:
    """Estimated moments of the spectrum of J J', input by input."""

    values: Float[Tensor, "*replica n order"]
    """tr((J J')^k) / out for k = 1, 2, ..."""
    standard_errors: Float[Tensor, "*replica n order"]
    """Of ``values``, from the spread over probes."""

    __repr__, _repr_html_ = as_line, as_table

    @property
    def mean(self) -> Float[Tensor, "*replica order"]:
        """Over the inputs."""
        return self.values.mean(-2)

    @property
    def mean_standard_error(self) -> Float[Tensor, "*replica order"]:
        """Of ``mean`` as an estimate for these very inputs: probes are drawn anew for each."""
        return self.standard_errors.square().sum(-2).sqrt() / self.standard_errors.shape[-2]


def jacobian_moments(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    *,
    masks: Mapping[str, Tensor] | None = None,
    n_moments: int = 2,
    n_probes: int = 16,
    seed: int = 0,
    buffers: Mapping[str, Tensor] | None = None,
    source: str | None = None,
    target: str | None = None,
) -> Moments:
    r"""Moments of J J' at every input by Hutchinson's estimator, with standard errors.

    .. math:: \frac{1}{out} \mathrm{tr}(J J^\top)^k = \frac{1}{out} E_v\, v^\top (J J^\top)^k v

    with Rademacher v of its own for each input and probe (Hutchinson 1990). Order k takes k products with J or J',
    each one pass over the whole batch; J is not held. Products with J differentiate u -> J' u, which is linear in
    u and needs no forward-mode rule; where the model has no second derivative, or a wrong one, J is held after all.

    Args:
        model: Lends its forward pass; not changed.
        state: One network or a stack, as for :func:`ticketlab.network.network`.
        x: Inputs, shared by all replicas.
        masks: True = kept; stacked or not.
        n_moments: Orders 1 to this.
        n_probes: At least 2, or there is no standard error.
        seed: Of the probes; replicas share them.
        buffers: In place of those in ``state``; stacked or not.
        source: As for ``jacobian_singular_values``.
        target: As for ``jacobian_singular_values``.

    Raises:
        Refused: As for ``jacobian_singular_values``; fewer than 1 moment or 2 probes; a model without a second
            derivative whose Jacobians are too large to hold.
    """
    check_count("n_moments", n_moments, 1, 10**4)
    check_count("n_probes", n_probes, 2, 10**8)
    found, stacked, _ = sections(model, state, x, masks, buffers, source, target)
    per_replica = []
    for section in found:
        generator = stream("jacobian moments", seed)
        with torch.enable_grad(), section.net.lent():
            linear = n_moments == 1 or _is_adjoint(section, x)
            size = ACTIVE // widest(section, x)
            blocks = x.split(max(1, size if linear else min(size, _MATRIX // _held(section.at(x[:1])))))
            parts = [_samples(section, block, n_moments, n_probes, generator, linear) for block in blocks]
            per_replica.append(torch.cat(parts, 1))
    samples = torch.stack(per_replica) if stacked else per_replica[0]  # [*replica, probe, n, order]
    check_finite("moments", samples)
    errors = samples.std(-3) / n_probes**0.5
    return Moments(samples.mean(-3), errors)


def largest_singular_values(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    *,
    masks: Mapping[str, Tensor] | None = None,
    n_values: int = 1,
    seed: int = 0,
    buffers: Mapping[str, Tensor] | None = None,
    source: str | None = None,
    target: str | None = None,
) -> Float[Tensor, "*replica n n_values"]:
    """The edge of the spectrum at every input, descending: Lanczos on J J' or J' J, whichever is smaller (ARPACK).

    J is not held. For sections wide on both sides; ``n_values`` must be less than min(in, out).

    Raises:
        Refused: As for ``jacobian_moments``, or an ``n_values`` out of range.
    """
    found, stacked, _ = sections(model, state, x, masks, buffers, source, target)
    values = []
    for section in found:
        generator = stream("largest singular values", seed)
        with torch.enable_grad(), section.net.lent():
            linear = _is_adjoint(section, x)
            values.append(torch.stack([_largest(section, one, n_values, generator, linear) for one in x.split(1)]))
    both = torch.stack(values).to(section.net.dtype)
    return both if stacked else both[0]


def _is_adjoint(section: Section, x: Tensor) -> bool:
    """Whether products with J that differentiate those with J' are right: w . J J' w = |J' w|^2, at two inputs."""
    at = section.at(x[[0, -1]])
    w = weights_of_outputs(at.y).expand_as(at.y)
    try:
        pull, push = _products(at, linear=True)
        pulled = pull(w)
        return close((push(pulled) * w).sum(1), pulled.flatten(1).square().sum(1))
    except Refused:  # an operation without a second derivative
        return False


def _products(at: At, linear: bool) -> tuple[Product, Product]:
    """w -> J' w and v -> J v; not ``linear``: from J itself, of whose derivative nothing is asked."""
    if linear:
        dual, pulled = transposed(at)
        return (
            lambda w: pullback(at.y, [at.u], w, retain_graph=True)[0],
            lambda v: pullback(pulled, [dual], v, retain_graph=True)[0],
        )
    if _held(at) > _MATRIX:
        raise Refused(
            "the model must have a second derivative where a Jacobian is too large to hold "
            f"({_held(at) / 2**30:.1f} GiB). "
            "Use activations that have one (SiLU in place of Hardsigmoid), or name a smaller section."
        )
    matrices = rows(at)  # [n, in, out]
    return (
        lambda w: torch.einsum("nio,no->ni", matrices, w).view_as(at.u),
        lambda v: torch.einsum("nio,ni->no", matrices, v.flatten(1)),
    )


def _held(at: At) -> int:
    """Bytes of all Jacobians."""
    return at.u.element_size() * at.u.numel() * at.y.shape[1]


def _samples(
    section: Section, x: Tensor, n_moments: int, n_probes: int, generator: torch.Generator, linear: bool
) -> Float[Tensor, "probe n order"]:
    """v' (J J')^k v / out, where odd orders are |J' w|^2 and even ones |J w|^2 for the vector w so far."""
    at = section.at(x)
    if n_moments == 1:
        pull, push = (lambda w: pullback(at.y, [at.u], w, retain_graph=True)[0]), None
    else:
        pull, push = _products(at, linear)
    probes = []
    for _ in range(n_probes):
        signs = torch.randint(0, 2, at.y.shape, generator=generator).to(at.y) * 2 - 1
        vector, squares = signs, []
        for order in range(n_moments):
            vector = pull(vector) if order % 2 == 0 else push(vector)  # type: ignore[misc]
            squares.append(torch.linalg.vector_norm(vector.flatten(1), dim=1, dtype=torch.float64) ** 2 / at.y.shape[1])
        probes.append(torch.stack(squares, 1))
    return torch.stack(probes)


def _largest(
    section: Section, x: Tensor, n_values: int, generator: torch.Generator, linear: bool
) -> Float[Tensor, " n_values"]:
    at = section.at(x)
    n_in, n_out = at.u.numel(), at.y.numel()
    side = min(n_in, n_out)
    if not 1 <= n_values < side:
        raise Refused(f"n_values must lie in 1..{side - 1}, below min(in, out): got {n_values}.")
    pull, push = _products(at, linear)
    check_finite("derivatives", pull(torch.ones_like(at.y)))

    def product(vector: np.ndarray) -> np.ndarray:
        w = torch.from_numpy(np.ascontiguousarray(vector)).to(at.y)
        found = push(pull(w.view_as(at.y))) if n_out <= n_in else pull(push(w.view_as(at.u)))
        return found.double().cpu().numpy().ravel()

    tolerance = torch.finfo(section.net.dtype).eps ** (2 / 3)
    squared = largest(product, side, n_values, generator, tolerance=tolerance).values
    rounding = side * torch.finfo(section.net.dtype).eps * squared.max(initial=0.0)  # whose root is none of J's
    return torch.from_numpy(np.sqrt(np.where(squared > rounding, squared, 0)))
