r"""Optimal Brain Damage (LeCun, Denker & Solla 1990), by three diagonals of the curvature.

To second order at a minimum, with off-diagonal terms left out, deleting a weight raises the mean loss by

.. math:: s_i = h_{ii} w_i^2 / 2

The loss is the task's, over the examples given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ticketlab.derivatives import Cotangents, hessian_product, rows
from ticketlab.engine.criteria.evidence import Criterion, Evidence, Scores
from ticketlab.losses import IGNORED, Loss
from ticketlab.network import Network, close
from ticketlab.state import Params

EXACT_LIMIT = 20_000
"""Most live weights of ``obd_exact``, which costs a Hessian-vector product for each."""
_HESSIAN_COLUMNS = 32  # computed at once
_ROW_ELEMENTS = 2**24  # of one example's rows held at once


def obd_exact(evidence: Evidence) -> Scores:
    """h = the diagonal of the Hessian, one column after another; may be negative.

    Where every path through the network is linear in each single weight, as with ReLU, it is the Gauss-Newton
    diagonal, which is far cheaper. Several columns are computed at once where ``vmap`` gives what plain autograd gives
    for one of them.
    """
    net, (x, y), weights = evidence.network, evidence.examples, evidence.final
    sizes = [w.numel() for w in weights.values()]
    alive = torch.cat([mask.flatten() for mask in evidence.masks.values()]).nonzero()[:, 0]
    diagonal = torch.zeros(sum(sizes), dtype=net.dtype, device=net.device)

    def column(index: Tensor) -> Tensor:
        parts = F.one_hot(index, len(diagonal)).to(net.dtype).split(sizes)
        vector = {n: part.view_as(w) for (n, w), part in zip(weights.items(), parts, strict=True)}
        return torch.cat([p.flatten() for p in hessian_product(net, x, y, evidence.loss, vector, len(x)).values()])

    fast = True
    for columns in alive.split(_HESSIAN_COLUMNS):
        first = column(columns[0])
        found = _columns(net, x, y, evidence.loss, tuple(weights), columns) if fast else None
        fast = found is not None and close(found[0], first)
        if found is None or not fast:
            found = torch.stack([first, *map(column, columns[1:])])  # [column, weight]
        diagonal[columns] = found.gather(1, columns[:, None])[:, 0]
    parts = zip(weights.items(), diagonal.split(sizes), strict=True)
    return _saliency(weights, {name: part.view_as(w) for (name, w), part in parts})


def _columns(
    net: Network, x: Tensor, y: Tensor, loss: Loss, names: Sequence[str], columns: Tensor
) -> Tensor | None:
    """Some columns of the Hessian at once; None where ``vmap`` has no rule for the backward pass."""
    with torch.enable_grad(), net.lent() as weights:
        inner = [weights[n] for n in names]
        options = {"allow_unused": True, "retain_graph": True}
        try:
            slopes = torch.autograd.grad(loss.mean(net.forward(x), y), inner, create_graph=True, **options)
            slope = torch.cat([torch.zeros_like(w) if g is None else g for w, g in zip(inner, slopes, strict=True)])
        except Exception:
            return None
    return None
