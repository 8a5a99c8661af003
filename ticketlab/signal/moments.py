"""Stochastic spectra of Jacobians too large to hold: moments by Hutchinson's estimator, the top by Lanczos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import vjp

from ticketlab.errors import Refused
from ticketlab.seeds import stream
from ticketlab.signal.jacobian import _ACTIVE, widest
from ticketlab.signal.section import Section, sections


@dataclass(frozen=True)
class Moments:
    """Estimated moments of the spectrum of J J', input by input."""

    values: Float[Tensor, "*replica n order"]
    """tr((J J')^k) / out for k = 1, 2, ..."""
    standard_errors: Float[Tensor, "*replica n order"]
    """Of ``values``, from the spread over probes."""

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
    params: Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    masks: Mapping[str, Tensor] | None = None,
    *,
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
    each one pass over the whole batch; J is never held. Products with J differentiate u -> J' u, which is linear in
    u and needs no forward-mode rule.

    Args:
        model: Lends its forward pass; not changed.
        params: Its parameters, or a stack of them.
        x: Inputs, shared by all replicas, in the dtype of the parameters.
        masks: True = kept; stacked or not.
        n_moments: Orders 1 to this.
        n_probes: At least 2, or there is no standard error.
        seed: Of the probes; replicas share them.
        buffers: The model's own when None; otherwise with the replica axis of ``params``.
        source: As for ``jacobian_singular_values``.
        target: As for ``jacobian_singular_values``.

    Raises:
        Refused: As for ``jacobian_singular_values``; fewer than 1 moment or 2 probes.
    """
    if n_moments < 1 or n_probes < 2:
        raise Refused(f"n_moments must be at least 1 and n_probes at least 2: got {n_moments} and {n_probes}.")
    found, stacked = sections(model, params, x, masks, buffers, source, target)
    size = max(1, _ACTIVE // widest(found[0], x))
    per_replica = []
    for section in found:
        generator = stream("jacobian moments", seed)
        per_replica.append(
            torch.cat([_samples(section, block, n_moments, n_probes, generator) for block in x.split(size)], 1)
        )
    samples = torch.stack(per_replica) if stacked else per_replica[0]  # [*replica, probe, n, order]
    errors = samples.std(-3) / n_probes**0.5
    return Moments(samples.mean(-3), errors)


def largest_singular_values(
    model: nn.Module,
    params: Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    masks: Mapping[str, Tensor] | None = None,
    *,
    n_values: int = 1,
    seed: int = 0,
    buffers: Mapping[str, Tensor] | None = None,
    source: str | None = None,
    target: str | None = None,
) -> Float[Tensor, "*replica n n_values"]:
    """The edge of the spectrum at every input, descending: Lanczos on J J' or J' J, whichever is smaller (ARPACK).

    J is never held. For sections wide on both sides; ``n_values`` must be less than min(in, out).

    Raises:
        Refused: As for ``jacobian_singular_values``, or an ``n_values`` out of range.
    """
    found, stacked = sections(model, params, x, masks, buffers, source, target)
    rows = []
    for section in found:
        generator = stream("largest singular values", seed)
        rows.append(torch.stack([_largest(section, one, n_values, generator) for one in x.split(1)]))
    values = torch.stack(rows).to(x.dtype)
    return values if stacked else values[0]


def _samples(
    section: Section, x: Tensor, n_moments: int, n_probes: int, generator: torch.Generator
) -> Float[Tensor, "probe n order"]:
    """v' (J J')^k v / out, where odd orders are |J' w|^2 and even ones |J w|^2 for the vector w so far."""
    u = section.entering(x)
    y, pull = section.linearised(u, x)
    push = vjp(lambda w: pull(w)[0], torch.zeros_like(y))[1] if n_moments > 1 else None
    probes = []
    for _ in range(n_probes):
        signs = torch.randint(0, 2, y.shape, generator=generator).to(y) * 2 - 1
        vector, squares = signs, []
        for order in range(n_moments):
            vector = pull(vector)[0] if order % 2 == 0 else push(vector)[0]  # type: ignore[misc]
            squares.append(vector.flatten(1).double().square().sum(1) / y.shape[1])
        probes.append(torch.stack(squares, 1))
    return torch.stack(probes)


def _largest(section: Section, x: Tensor, n_values: int, generator: torch.Generator) -> Float[Tensor, " n_values"]:
    u = section.entering(x)
    y, pull = section.linearised(u, x)
    push = vjp(lambda w: pull(w)[0], torch.zeros_like(y))[1]
    n_in, n_out = u.numel(), y.numel()
    side = min(n_in, n_out)
    if not 1 <= n_values < side:
        raise Refused(f"n_values must lie in 1..{side - 1}, below min(in, out): got {n_values}.")

    def product(vector: np.ndarray) -> np.ndarray:
        w = torch.from_numpy(np.ascontiguousarray(vector)).to(y)
        if n_out <= n_in:
            return push(pull(w.view_as(y))[0])[0].double().cpu().numpy().ravel()
        return pull(push(w.view_as(u))[0])[0].double().cpu().numpy().ravel()

    operator = LinearOperator((side, side), matvec=product, dtype=np.float64)
    start = torch.randn(side, generator=generator, dtype=torch.float64).numpy()
    values = eigsh(operator, k=n_values, which="LA", v0=start, return_eigenvectors=False)
    return torch.from_numpy(np.sqrt(np.clip(np.sort(values)[::-1], 0, None)).copy())
