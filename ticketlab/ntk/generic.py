"""The oracle: derivatives of any module with respect to its live coordinates, one example at a time.

Slower than the layer-wise methods and independent of them: it knows nothing of layers. They are tested
against it, and it serves the parameters that they cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

import torch
from jaxtyping import Float
from torch import Tensor

from ticketlab import derivatives
from ticketlab.ntk.problem import Problem


def jacobian(problem: Problem, names: Sequence[str], x: Tensor) -> Float[Tensor, "k out n"]:
    r"""Derivatives of the outputs with respect to the live coordinates of the named parameters.

    .. math:: J_{e, o, n} = \partial f_o(x_n;\, S v) / \partial v_e

    with S the scatter of the live vector v into the parameters. Each example goes through the model alone, so nothing
    is assumed of how the model treats its batch axis.
    """
    return torch.cat(list(_blocks(problem, names, x))).permute(2, 1, 0)


def _blocks(problem: Problem, names: Sequence[str], x: Tensor) -> Iterator[Float[Tensor, "n out k"]]:
    def cotangents(y: Tensor) -> Tensor:
        if problem.sum_logits:
            return torch.ones_like(y)[None]
        return torch.eye(y.numel(), dtype=y.dtype, device=y.device).view(-1, *y.shape)

    live = {name: problem.live[name].flatten().nonzero()[:, 0] for name in names}
    # Closed, for the rows hold the module until they end.
    with closing(derivatives.rows(problem.net, x, cotangents, names)) as blocks:
        for _, rows in blocks:
            flat = {n: rows[n].reshape(*rows[n].shape[:2], -1).to(problem.dtype) for n in names}  # a scalar has no axis
            yield torch.cat([part[..., live[name]] for name, part in flat.items()], 2)
