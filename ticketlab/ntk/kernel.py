"""The kernel itself: plan, then add up layers over pairs of blocks of examples.

>>> import torch, ticketlab as tl
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
>>> tl.ntk.kernel(model, tl.state(model), torch.randn(5, 4), masks=tl.masks.ones(model)).shape
torch.Size([5, 2, 5, 2])
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ticketlab.errors import Refused, nearest
from ticketlab.ntk import gather, generic, rows, structured
from ticketlab.ntk.features import features
from ticketlab.ntk.layers import Features, Layer, find_layers, retried
from ticketlab.ntk.plan import LayerMethod, Method, choose, largest_block
from ticketlab.ntk.problem import Coordinates, Outputs, Problem, problems
from ticketlab.state import State, check_finite

_ADD = {"structured": structured.add, "rows": rows.add, "gather": gather.add}


@dataclass(frozen=True)
class _Block:
    """A block of examples: the features of each layer, and the Jacobian [k, out, n] of what has none."""

    n: int
    layers: list[Features]
    rest: Tensor | None


@dataclass(frozen=True)
class _Work:
    """How the kernel of one network is put together."""

    problem: Problem
    layers: list[Layer]
    methods: list[LayerMethod]
    rest: list[str]
    """Parameters without a layer."""
    n_outputs: int
    trace: bool
    """Summed over the outputs; the sum of the outputs is one output, and its kernel its own trace."""
    block_size: int
    """Examples whose features are held at once."""

    def block(self, x: Tensor) -> _Block:
        layers = features(self.problem, self.layers, x)
        return _Block(len(x), layers, generic.jacobian(self.problem, self.rest, x) if self.rest else None)

    def tile(self, a: _Block, b: _Block) -> Tensor:
        """The kernel between two blocks, [out, n, out', m] or [n, m]; where they are one, half of it."""
        shape = (a.n, b.n) if self.trace else (self.n_outputs, a.n, self.n_outputs, b.n)
        out = torch.zeros(shape, dtype=self.problem.dtype, device=self.problem.device)
        for layer, method, left, right in zip(self.layers, self.methods, a.layers, b.layers, strict=True):
            _ADD[method](out, layer, left, right, trace=self.trace, symmetric=a is b)
        if a.rest is not None and b.rest is not None:
            gather.add_jacobian(out, a.rest, b.rest, trace=self.trace, symmetric=a is b)
        return out


def kernel(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    x1: Float[Tensor, "n *shape"],
    x2: Float[Tensor, "m *shape"] | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    outputs: Outputs = "full",
    coordinates: Coordinates = "live",
    method: Method = "auto",
    block_size: int | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> Tensor:
    r"""The empirical neural tangent kernel of a masked network at the point m * theta.

    .. math:: \Theta_m[n o, n' o'] = \sum_{e\ live} \frac{\partial f_o(x_n)}{\partial \theta_e}
              \frac{\partial f_{o'}(x_{n'})}{\partial \theta_e}

    The model is evaluated in evaluation mode and left as it was. Parameters with ``requires_grad=False`` are
    frozen: they are no coordinates. A tied parameter is one coordinate, whatever it is used for.

    Args:
        model: Any module that maps inputs [n, ...] to outputs [n, ...]; axes after the first are flattened to
            ``out``. Each example must be treated on its own.
        state: Parameters and buffers, or a dict of parameters alone; one network or a stack of replicas.
        x1: Inputs, in the dtype and on the device of the parameters (or integer tokens).
        x2: Further inputs; ``x1`` again when None, and then the result is exactly symmetric.
        masks: True = kept, one for each prunable parameter; stacked or not. The levels of one network are a
            stack of masks over unstacked parameters.
        outputs: ``full``; ``trace``, the sum over outputs of the diagonal blocks (a sum, not a mean); or
            ``sum_logits``, the kernel of the summed outputs.
        coordinates: What is differentiated in, always at the point m * theta. ``live``: the kept weights and
            every parameter that has no mask, which is Theta_m. ``all``: pruned weights as well, which is
            another object. A dict of bool tensors: just those entries of the parameters it names.
        method: How linear layers and convolutions are computed: ``structured`` (nothing pruned), ``rows``,
            ``gather``, or per layer the cheapest (``auto``); what remains goes through ``generic``, which
            alone serves as the slow oracle for everything.
        block_size: Examples whose features are held at once; None keeps below a memory cap. It need not
            divide anything, and does not change the result beyond rounding.
        buffers: In place of those in ``state``; stacked or not.

    Returns:
        [n, out, m, out] for ``full``, else [n, m]; behind a leading replica axis if anything was stacked.

    Raises:
        Refused: As :func:`ticketlab.network.network`, for all inputs; coordinates that do not fit, complex numbers,
            pruned weights with ``structured``, or a kernel that is not finite.

    See Also:
        :func:`ticketlab.ntk.jacobian`: the factor J of this kernel, for its small eigenvalues.

    References:
        Jacot, Gabriel, Hongler 2018 (arXiv:1806.07572). Structured derivatives: Novak, Sohl-Dickstein,
        Schoenholz 2022 (arXiv:2206.08720).
    """
    for name, given, known in (("outputs", outputs, get_args(Outputs)), ("method", method, get_args(Method))):
        if given not in known:
            raise Refused(nearest(name, given, known))
    if block_size is not None and block_size < 1:
        raise Refused(f"block_size must be at least 1 example, or None: got {block_size}.")
    found, stacked = problems(
        model, state, x1, x2, masks=masks, coordinates=coordinates, buffers=buffers, sum_logits=outputs == "sum_logits"
    )
    kernels = [_kernel(problem, x1, x2, outputs != "full", method, block_size) for problem in found]
    return torch.stack(kernels) if stacked else kernels[0]


def _kernel(
    problem: Problem, x1: Tensor, x2: Tensor | None, trace: bool, method: Method, block_size: int | None
) -> Tensor:
    n, m = len(x1), len(x1 if x2 is None else x2)

    def from_layers(layers: list[Layer]) -> Tensor:
        covered = {name for layer in layers for name in layer.names}
        rest = [name for name, live in problem.live.items() if name not in covered and bool(live.any())]
        n_rest = sum(int(problem.live[name].count_nonzero()) for name in rest)
        methods = choose(layers, method, n_outputs, n, m, trace=trace, symmetric=x2 is None)
        size = block_size or largest_block(layers, methods, n_outputs, n_rest, problem.dtype)
        return _filled(_Work(problem, layers, methods, rest, n_outputs, trace, min(size, max(n, m))), x1, x2)

    with problem.net.lent():
        layers, n_outputs = find_layers(problem, x1)
        theta = retried(from_layers, [] if method == "generic" else layers)
    check_finite("the kernel", theta)
    return theta


def _refuse_beyond_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """A system may promise more memory than it has, and end the process that uses it."""
    wanted = math.prod(shape) * dtype.itemsize
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else wanted
    if wanted > there:
        raise Refused(
            f"the kernel must fit into memory: {shape} takes {wanted / 2**30:.0f} GB, and {device} has "
            f"{there / 2**30:.0f}. Take fewer inputs, outputs='trace' or 'sum_logits', or ntk.operator, which "
            "holds none."
        )


def _filled(work: _Work, x1: Tensor, x2: Tensor | None) -> Tensor:
    """All pairs of blocks. Blocks of the second side are made again for each of the first: one pair is held."""
    size, symmetric, other = work.block_size, x2 is None, x1 if x2 is None else x2
    n, m, o = len(x1), len(other), work.n_outputs
    shape = (n, m) if work.trace else (n, o, m, o)
    _refuse_beyond_memory(shape, work.problem.dtype, work.problem.device)
    theta = torch.empty(shape, dtype=work.problem.dtype, device=work.problem.device)

    def at(i: int, j: int) -> Tensor:
        """The place of a tile in the kernel, with the axes of a tile."""
        square = theta[i : i + size, j : j + size] if work.trace else theta[i : i + size, :, j : j + size]
        return square if work.trace else square.permute(1, 0, 3, 2)

    for i in range(0, n, size):
        rows = work.block(x1[i : i + size])
        for j in range(i if symmetric else 0, m, size):
            columns = rows if symmetric and j == i else work.block(other[j : j + size])
            tile = work.tile(rows, columns)
            if rows is columns:
                _add_mirrored(at(i, j), tile)
                continue
            at(i, j).copy_(tile)
            if symmetric:
                at(j, i).copy_(_mirrored(tile))
    return theta


def _mirrored(tile: Tensor) -> Tensor:
    return tile.mT if tile.ndim == 2 else tile.permute(2, 3, 0, 1)


def _add_mirrored(out: Tensor, half: Tensor) -> None:
    """A half and its mirror image, one output at a time: all at once the strides reach over too many pages."""
    if half.ndim == 2:
        torch.add(half, half.mT, out=out)
        return
    added = half.new_empty(half.shape[0], half.shape[1], half.shape[1])  # [out', n, m]
    for one, left, right in zip(out, half, _mirrored(half), strict=True):
        torch.add(left.transpose(0, 1), right.transpose(0, 1), out=added)
        one.copy_(added.transpose(0, 1))
