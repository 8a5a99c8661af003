r"""Optimal Brain Damage (LeCun, Denker & Solla 1990), by three diagonals of the curvature.

To second order at a minimum, with off-diagonal terms left out, deleting a weight raises the mean loss by

.. math:: s_i = h_{ii} w_i^2 / 2

The loss is the task's, over the examples given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ticketlab.derivatives import Cotangents, hessian_product, pullback, rows
from ticketlab.engine.criteria.evidence import Criterion, Evidence, Scores
from ticketlab.errors import Refused
from ticketlab.losses import IGNORED, Loss
from ticketlab.network import output_shape
from ticketlab.probing import close
from ticketlab.state import Params

EXACT_LIMIT = 20_000
"""Most live weights of ``obd_exact``, which costs a Hessian-vector product for each."""
_MOST_OUTPUTS = 4096  # of an example, for each of which the Gauss-Newton diagonal takes a backward pass
_HESSIAN_COLUMNS = 32  # computed at once
_ROW_ELEMENTS = 2**24  # of the rows of one example held at once


def obd_exact(evidence: Evidence) -> Scores:
    """h = the diagonal of the Hessian, one column after another; may be negative.

    Where every path through the network is linear in each single weight, as with ReLU, it is the Gauss-Newton
    diagonal, which is far cheaper.
    """
    (x, y), weights = evidence.examples, evidence.final
    sizes = [w.numel() for w in weights.values()]
    alive = torch.cat([mask.flatten() for mask in evidence.masks.values()]).nonzero()[:, 0]

    def column(index: Tensor) -> Tensor:
        parts = F.one_hot(index, sum(sizes)).to(evidence.network.dtype).split(sizes)
        vector = {n: part.view_as(w) for (n, w), part in zip(weights.items(), parts, strict=True)}
        product = hessian_product(evidence.network, x, y, evidence.loss, vector, len(x))
        return torch.cat([part.flatten() for part in product.values()])

    diagonal = torch.cat([torch.zeros_like(w).flatten() for w in weights.values()])
    for columns in alive.split(_HESSIAN_COLUMNS):
        first, found = column(columns[0]), _columns(evidence, x, y, columns)
        if found is None or not close(found[0], first):
            found = torch.stack([first, *map(column, columns[1:])])  # [column, weight]
        diagonal[columns] = found.gather(1, columns[:, None])[:, 0]
    parts = zip(weights.items(), diagonal.split(sizes), strict=True)
    return _saliency(weights, {name: part.view_as(w) for (name, w), part in parts})


def _columns(evidence: Evidence, x: Tensor, y: Tensor, columns: Tensor) -> Tensor | None:
    """Columns [column, weight] of the Hessian by one backward pass under ``vmap``; None where that fails."""
    with torch.enable_grad(), evidence.network.lent() as lent:
        inner, loss = [lent[n] for n in evidence.masks], evidence.loss
        try:
            slopes = pullback(loss.mean(evidence.network.forward(x), y), inner, create_graph=True)
            slope = torch.cat([part.flatten() for part in slopes])
            units = F.one_hot(columns, len(slope)).to(slope.dtype)
            parts = torch.autograd.grad(slope, inner, units, is_grads_batched=True, allow_unused=True)
        except Exception:  # whatever an operation without a rule raises
            return None
        nothing = [w.new_zeros(len(columns), w.numel()) for w in inner]
        return torch.cat([z if p is None else p.flatten(1) for p, z in zip(parts, nothing, strict=True)], 1)


def obd_gauss_newton(evidence: Evidence) -> Scores:
    r"""h = the diagonal of the Gauss-Newton matrix, exact.

    .. math:: h = \frac1n \sum_n \sum_c (J_n^\top r_{nc})^2, \quad r_{nc} = \sqrt{p_{nc}} (e_c - p_n)

    for the softmax Hessian of an example is diag(p) - p p^T = sum_c r_c r_c^T. It costs as many backward passes
    of single examples as there are outputs, and no labels, unless some tokens of an example do not count.
    """
    n_outputs = math.prod(output_shape(evidence.network, evidence.inputs))
    if n_outputs > _MOST_OUTPUTS:
        raise Refused(
            f"it takes a backward pass per output of an example, {_MOST_OUTPUTS} at most: the model has {n_outputs}. "
            "Use obd_fisher or snip, which take one in all."
        )
    return _saliency(evidence.final, _mean_squares(evidence, _roots(evidence.loss)))


def _roots(loss: Loss) -> Cotangents:
    """The vectors r of one example, with sum r r^T the Hessian of its loss in all its outputs."""

    def of(outputs: Tensor, target: Tensor | None = None) -> Tensor:
        each = outputs.reshape(-1, outputs.shape[-1] if outputs.ndim else 1)  # [token, out]
        counts = torch.ones_like(each[:, 0])
        if target is not None and target.ndim and loss.name == "cross_entropy":
            counts = (target != IGNORED).to(each.dtype)
        r = loss.roots(each) * (counts / counts.sum()).sqrt()[:, None, None]  # [token, root, out]
        alone = torch.eye(len(each), dtype=r.dtype, device=r.device)[:, None, :, None]  # a root is one token's
        return (alone * r[:, :, None]).reshape(-1, *outputs.shape)

    return of


def obd_fisher(evidence: Evidence) -> Scores:
    """h = the mean over examples of the squared gradient of the loss: the empirical Fisher diagonal.

    With the labels of the data, not of the model: it vanishes where every example is fitted.
    """
    loss, _ = evidence.loss, evidence.examples
    return _saliency(evidence.final, _mean_squares(evidence, lambda z, y: loss.residual(z[None], y[None])))


def _mean_squares(evidence: Evidence, cotangents: Cotangents) -> Params:
    r"""Mean over examples of :math:`\sum_c (J_n^\top r_{nc})^2`, in blocks of vectors r that fit in memory."""
    net, x = evidence.network, evidence.inputs
    targets = () if evidence.y is None else (evidence.examples[1],)
    with torch.no_grad():
        n_vectors = len(cotangents(net(x[:1])[0], *(y[0] for y in targets)))
    size = max(1, _ROW_ELEMENTS // sum(m.numel() for m in evidence.masks.values()))
    mean = {name: torch.zeros_like(net.params[name]) for name in evidence.masks}
    for first in range(0, n_vectors, size):

        def some(*one: Tensor, first: int = first) -> Tensor:
            return cotangents(*one)[first : first + size]

        for _, block in rows(net, x, some, tuple(mean), *targets):
            for name, r in block.items():
                mean[name] += r.square().sum((0, 1)) / len(x)
    return mean


def _saliency(weights: Params, diagonal: Params) -> Scores:
    return {name: diagonal[name] * w.square() / 2 for name, w in weights.items()}


CURVATURE: dict[str, Criterion] = {
    "obd_exact": Criterion(
        obd_exact, needs="labels", passes=lambda n, outputs, weights: 6 * weights * n, limit=EXACT_LIMIT
    ),
    "obd_gauss_newton": Criterion(
        obd_gauss_newton, needs="inputs", passes=lambda n, outputs, weights: (1 + 2 * outputs) * n
    ),
    "obd_fisher": Criterion(obd_fisher, needs="labels", passes=lambda n, outputs, weights: 3 * n),
}
