"""The kernel as products with vectors alone, and what can be read off those: no matrix of its side is ever formed.

Two ways to a product: two backward passes per vector, or the rows of the live Jacobian, which serve any number of
vectors at once and are kept where they fit. Measures rest on Lanczos and on sketches by random vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ticketlab.errors import Refused, check_count, check_type
from ticketlab.lanczos import largest
from ticketlab.ntk.axes import targets
from ticketlab.ntk.jacobian import block_size, live_rows
from ticketlab.ntk.passes import twice
from ticketlab.ntk.problem import Coordinates, Problem, problems
from ticketlab.ntk.sketch import Estimate, Product, Sketch, mean, sketches, trace_samples
from ticketlab.seeds import stream
from ticketlab.shown import as_line, as_table
from ticketlab.state import State, check_finite


@dataclass(frozen=True)
class Eigenpairs:
    """The largest eigenvalues of a kernel; float64."""

    values: Float[Tensor, " k"]
    """Descending, in outputs squared per squared unit of the weights."""
    vectors: Float[Tensor, "n_out k"]
    """Orthonormal columns, signs at will."""
    residuals: Float[Tensor, " k"]
    """||Theta v - lambda v|| of each pair: an eigenvalue lies that near, but for the rounding of products."""

    __repr__, _repr_html_ = as_line, as_table


@dataclass(frozen=True)
class KernelOperator:
    """Theta_m of one network, [n * out, n * out], as products with vectors.

    Measures that are estimated take ``n_probes`` = s, at most n * out: s random vectors find the space in which traces
    are exact, s others estimate the rest (see `ticketlab.ntk.sketch`). All are drawn from ``seed``. Standard errors
    shrink at least as s^(-1/2); they are spreads over s, and where the spectrum falls fast, two of them held the value
    for 90 % of seeds at s = 16 and for 92 to 96 % at 32 and 48. Rounding of products comes on top. Where rows do not
    fit, an estimate makes them four times over.
    """

    problem: Problem
    x: Tensor
    n_outputs: int
    block_size: int
    """Examples whose rows are made at once."""
    keep_bytes: int = 2**31
    """Rows of the live Jacobian are kept, once made, where all of them take no more."""

    __repr__, _repr_html_ = as_line, as_table

    @property
    def size(self) -> int:
        """n * out, the side of the kernel."""
        return len(self.x) * self.n_outputs

    def product(self, vectors: Float[Tensor, "n_out *m"]) -> Float[Tensor, "n_out *m"]:
        """Theta_m v = J (J' v), block by block of examples, for one vector or several.

        J times a vector is the derivative of u -> J' u, which is linear in u: it needs no forward-mode rule,
        and those are missing for more operations (fused attention among them) than second derivatives are.
        Where those are missing too, or wrong, or there are as many vectors as outputs, J is made explicitly, a block
        at a time, twice; or once for all products, where it fits into ``keep_bytes``.

        Args:
            vectors: One [n * out], or several in columns [n * out, m].

        Raises:
            Refused: Vectors of another shape, or a product that is not finite.
        """
        if vectors.ndim not in (1, 2) or len(vectors) != self.size:
            raise Refused(f"vector must have shape ({self.size},), [n * out]: got {tuple(vectors.shape)}.")
        columns = vectors.detach().reshape(self.size, -1)
        found = self._from_rows(columns) if self._explicit(columns.shape[1]) else self._from_passes(columns)
        check_finite("the product with the kernel", found)
        return found.view_as(vectors)

    def trace(self, n_probes: int | None = None, *, seed: int = 0) -> Estimate:
        """The trace: the sum of the squared live gradients.

        Exact without ``n_probes``, at the cost of one backward pass per example and output. With them by Hutch++, from
        four products per probe: for networks of thousands of outputs.

        Raises:
            Refused: Fewer than 2 probes, or a trace that is not finite.
        """
        if n_probes is not None:
            return mean(self._samples("trace", False, n_probes, seed))
        found = torch.stack([rows.double().square().sum() for rows in self._rows()]).sum()
        check_finite("the trace", found)
        return Estimate(found, torch.zeros_like(found))

    def frobenius(self, *, n_probes: int = 64, seed: int = 0) -> Estimate:
        r"""The Frobenius norm :math:`(\mathrm{tr}\, \Theta^2)^{1/2}`, by Hutch++ of the square.

        Its products are those of the kernel: :math:`u^\top \Theta^2 u = \|\Theta u\|^2`. The standard error is that of
        the trace, carried through the root.

        Raises:
            Refused: Fewer than 2 probes, or products that are not finite.
        """
        squares = mean(self._samples("square", False, n_probes, seed))
        root = squares.value.sqrt()
        return Estimate(root, squares.standard_error / (2 * root).clamp(min=torch.finfo(root.dtype).tiny))

    def participation_ratio(self, *, n_probes: int = 64, seed: int = 0) -> Estimate:
        r""":math:`(\mathrm{tr}\, \Theta)^2 / \|\Theta\|^2`, as in `Spectrum`: an exact trace and `frobenius`.

        Raises:
            Refused: As there.
        """
        norm = self.frobenius(n_probes=n_probes, seed=seed)
        ratio = (self.trace().value / norm.value).square()
        return Estimate(ratio, 2 * ratio * norm.standard_error / norm.value)

    def effective_rank(self, *, n_probes: int = 64, seed: int = 0) -> Estimate:
        r"""exp of the entropy of :math:`\lambda_i / \sum \lambda` (Roy & Vetterli 2007), as in `Spectrum`.

        The entropy is the trace of :math:`f(\Theta / \mathrm{tr}\, \Theta)`, f(p) = -p ln p, which is taken inside the
        Krylov space of the vectors (Chen & Hallman 2023, SIAM J. Matrix Anal. Appl. 44(3)). The space grows, by one
        product per vector, until the entropy moves by less than a twentieth of its standard error, or nothing is left
        beside it. Eigenvalues below the rounding of the kernel's dtype count as it left them.

        Raises:
            Refused: As for `frobenius`.
        """
        total, before = self.trace().value, torch.tensor(torch.nan)
        if total == 0:  # 0 / 0, as of a network whose units are all dead
            return Estimate(total / total, total / total)
        for sketch in sketches([self._double(False)], self._vectors(n_probes, seed)):
            shares, vectors = torch.linalg.eigh(_symmetric(sketch.basis.T @ sketch.images[0]) / total)
            inside = (vectors * torch.special.entr(shares.clamp(min=0))) @ vectors.T
            entropy = mean(trace_samples(sketch, inside))
            if (entropy.value - before).abs() <= entropy.standard_error / 20:
                break
            before = entropy.value
        rank = entropy.value.exp()
        return Estimate(rank, rank * entropy.standard_error)

    def alignment(
        self, other: KernelOperator | Tensor, *, centered: bool = True, n_probes: int = 64, seed: int = 0
    ) -> Estimate:
        """Alignment with another kernel, as `ticketlab.ntk.alignment`, or with targets, as `target_alignment`.

        Of targets the inner product is exact, one pass over the rows, and the kernel's norm is estimated. Of two
        kernels the inner product and both norms are estimated from the same probes, and the standard error is that of
        their ratio, to first order.

        Args:
            other: The operator of another network or mask on the same inputs; or targets [n, out], or labels [n].
            centered: Remove the mean over examples, of each output apart.

        Raises:
            Refused: An operator of another number of inputs or outputs, targets that do not go with the kernel, fewer
                than 2 probes, or products that are not finite.
        """
        if not isinstance(other, KernelOperator):
            check_type("other", other, Tensor, "Pass targets [n, out], labels [n], or ntk.operator(...).")
            squares = mean(self._samples("square", centered, n_probes, seed))
            found = self._along_targets(other, centered) / squares.value.sqrt()
            return Estimate(found, found * squares.standard_error / (2 * squares.value))
        if (len(self.x), self.n_outputs) != (len(other.x), other.n_outputs):
            raise Refused(
                f"both kernels must be of the same inputs and outputs: got {len(self.x)} inputs and {self.n_outputs} "
                f"outputs, and {len(other.x)} and {other.n_outputs}."
            )
        sketch = next(sketches([self._double(centered), other._double(centered)], self._vectors(n_probes, seed)))
        a, b = sketch.images
        ab, aa, bb = (trace_samples(sketch, _symmetric(left.T @ right)) for left, right in ((a, b), (a, a), (b, b)))
        scale = (aa.mean() * bb.mean()).sqrt()
        found = ab.mean() / scale
        slope = ab / scale - found * (aa / aa.mean() + bb / bb.mean()) / 2
        return Estimate(found, mean(slope).standard_error)

    def top(self, k: int = 1, *, seed: int = 0) -> Eigenpairs:
        """The k largest eigenvalues and their eigenvectors by Lanczos (ARPACK), repeated ones as often as they occur.

        Args:
            k: In 1..n * out.
            seed: Of the start vector, which decides rounding alone.

        Raises:
            Refused: A ``k`` out of range, products that are not finite, or no convergence.
        """
        check_count("k", k, 1, self.size)
        multiply, device = self._double(False), self.problem.device

        def product(vector: np.ndarray) -> np.ndarray:
            return multiply(torch.as_tensor(vector.reshape(-1, 1), device=device)).flatten().cpu().numpy()

        tolerance = torch.finfo(self.problem.dtype).eps ** (2 / 3)
        # Normal start vectors: uniform entries would miss antisymmetric eigenvectors.
        found = largest(product, self.size, int(k), stream("kernel spectrum", seed), tolerance=tolerance)
        return Eigenpairs(*(torch.as_tensor(part.copy(), device=device) for part in found))

    @cached_property
    def _kept(self) -> list[Float[Tensor, "n out k"]] | None:
        """All rows of J by block, where they fit."""
        n_live = sum(int(live.count_nonzero()) for live in self.problem.live.values())
        fits = self.size * n_live * self.problem.dtype.itemsize <= self.keep_bytes
        return list(self._made()) if fits else None

    def _rows(self) -> Iterable[Float[Tensor, "n out k"]]:
        return self._made() if self._kept is None else self._kept

    def _made(self) -> Iterable[Float[Tensor, "n out k"]]:
        return (live_rows(self.problem, x) for x in self.x.split(self.block_size))

    def _explicit(self, n_vectors: int) -> bool:
        """Whether rows are at hand, or cheaper: one backward pass per output, and two or more per vector."""
        return n_vectors >= max(2, self.n_outputs) or self.__dict__.get("_kept") is not None

    def _from_rows(self, columns: Float[Tensor, "n_out m"]) -> Float[Tensor, "n_out m"]:
        parts = columns.split(self.block_size * self.n_outputs)
        step: Tensor | float = 0.0
        for rows, part in zip(self._rows(), parts, strict=True):
            step = step + rows.flatten(0, 1).T @ part.to(rows)
        return torch.cat([rows.flatten(0, 1) @ step for rows in self._rows()])

    def _from_passes(self, columns: Float[Tensor, "n_out m"]) -> Float[Tensor, "n_out m"]:
        blocks, found = self.x.split(self.block_size), []
        with self.problem.net.lent() as weights, torch.enable_grad():
            for column in columns.T:
                parts = column.reshape(len(self.x), -1).split(self.block_size)
                one = twice(self.problem, weights, list(zip(blocks, parts, strict=True)))
                if one is None:
                    break
                found.append(one)
        return torch.stack(found, 1) if len(found) == columns.shape[1] else self._from_rows(columns)

    def _double(self, centered: bool) -> Product:
        """Products in float64, of H Theta H where it is centred; from rows where they fit, for many will follow."""
        _ = self._kept

        def product(vectors: Float[Tensor, "n_out m"]) -> Float[Tensor, "n_out m"]:
            inner = self._centered(vectors) if centered else vectors
            found = self.product(inner.to(self.problem.dtype)).double()
            return self._centered(found) if centered else found

        return product

    def _centered(self, vectors: Float[Tensor, "n_out m"]) -> Float[Tensor, "n_out m"]:
        each = vectors.view(len(self.x), self.n_outputs, -1)
        return (each - each.mean(0)).view_as(vectors)

    def _vectors(self, n_probes: int, seed: int) -> Float[Tensor, "n_out 2*s"]:
        check_count("n_probes", n_probes, 2, 10**6)  # one has no standard error
        generator, number = stream("kernel probes", seed), max(2, min(int(n_probes), self.size))
        return torch.randn(self.size, 2 * number, generator=generator, dtype=torch.float64).to(self.problem.device)

    def _samples(self, what: str, centered: bool, n_probes: int, seed: int) -> Float[Tensor, " s"]:
        """Estimates of the trace of the kernel or of its square."""
        sketch: Sketch = next(sketches([self._double(centered)], self._vectors(n_probes, seed)))
        left = sketch.images[0] if what == "square" else sketch.basis
        return trace_samples(sketch, _symmetric(left.T @ sketch.images[0]))

    def _along_targets(self, y: Tensor, centered: bool) -> Float[Tensor, ""]:
        """<Theta, YY' x I> / ||YY' x I||, the first of which is the square of Y'J of each output."""
        n, n_out = len(self.x), self.n_outputs
        y = targets((n, n_out, n, n_out), y).to(self.problem.device)
        y = y - y.mean(0) if centered else y
        along: Tensor | float = 0.0
        for rows, part in zip(self._rows(), y.split(self.block_size), strict=True):
            along = along + part.T.to(rows) @ rows.flatten(1)
        return torch.as_tensor(along).double().square().sum() / (n_out**0.5 * (y.T @ y).norm())


def operator(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    *,
    masks: Mapping[str, Tensor] | None = None,
    coordinates: Coordinates = "live",
    buffers: Mapping[str, Tensor] | None = None,
    keep_bytes: int = 2**31,
) -> KernelOperator:
    """The kernel as a linear operator, for measures where the kernel, or even J, is too large to hold.

    Args:
        keep_bytes: Keep the rows of J, once made, where all of them take no more; 0: never, in little memory.
            The others as in :func:`ticketlab.ntk.kernel`.

    Raises:
        Refused: As for the kernel, or a stack of replicas.
    """
    check_count("keep_bytes", keep_bytes, 0, 2**63)
    found, stacked = problems(model, state, x, masks=masks, coordinates=coordinates, buffers=buffers)
    if stacked:
        raise Refused(f"an operator is one network: got a stack of {len(found)}. Select one replica of each dict.")
    return KernelOperator(found[0], x, *block_size(found[0], x), keep_bytes)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
