r"""Optimal Brain Damage (LeCun, Denker & Solla 1990), by three diagonals of the curvature.

To second order at a minimum, with off-diagonal terms left out, deleting a weight raises the mean loss by

.. math:: s_i = h_{ii} w_i^2 / 2

The loss is the cross-entropy in nats over the examples given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vjp, vmap

from ticketlab.engine.criteria.evidence import Evidence, Scores
from ticketlab.errors import Refused
from ticketlab.state import Params

EXACT_LIMIT = 20_000
"""Most live weights of ``obd_exact``, which costs a Hessian-vector product for each."""
_HESSIAN_COLUMNS = 32  # computed at once
_BLOCK_ELEMENTS = 2**24  # of gradients of single examples held at once


def obd_exact(evidence: Evidence) -> Scores:
    """h = the diagonal of the Hessian, one column after another; may be negative.

    Where every path through the network is linear in each single weight, as with ReLU, it is the Gauss-Newton
    diagonal, which is far cheaper.

    Raises:
        Refused: More than ``EXACT_LIMIT`` live weights, or no examples.
    """
    x, y = evidence.examples("obd_exact")
    refuse_above_limit(sum(int(mask.sum()) for mask in evidence.masks.values()))
    names, weights = list(evidence.masks), evidence.final
    sizes = [weights[name].numel() for name in names]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(names, flat.split(sizes), strict=True)
        return F.cross_entropy(evidence.logits({n: part.view_as(weights[n]) for n, part in parts}, x), y)

    flat = torch.cat([weights[name].flatten() for name in names])
    diagonal = torch.zeros_like(flat)
    alive = torch.cat([mask.flatten() for mask in evidence.masks.values()]).nonzero()[:, 0]
    product = vjp(grad(loss), flat)[1]  # v -> H v, for H is symmetric
    for columns in alive.split(_HESSIAN_COLUMNS):
        products = vmap(product)(F.one_hot(columns, len(flat)).to(flat.dtype))[0]  # [column, weight]
        diagonal[columns] = products.gather(1, columns[:, None])[:, 0]
    parts = zip(names, diagonal.split(sizes), strict=True)
    return _saliency(weights, {name: part.view_as(weights[name]) for name, part in parts})


def refuse_above_limit(live: int) -> None:
    """Raise where ``obd_exact`` would take too long."""
    if live > EXACT_LIMIT:
        raise Refused(
            f"criterion 'obd_exact' needs at most {EXACT_LIMIT} live weights: got {live}. "
            "Use 'obd_gauss_newton', the same with ReLU, or 'obd_fisher'."
        )


def obd_gauss_newton(evidence: Evidence) -> Scores:
    r"""h = the diagonal of the Gauss-Newton matrix, exact.

    .. math:: h = \frac1n \sum_n \sum_c (J_n^\top r_{nc})^2, \quad r_{nc} = \sqrt{p_{nc}} (e_c - p_n)

    for the softmax Hessian of an example is diag(p) - p p^T = sum_c r_c r_c^T. It costs as many backward passes
    of single examples as there are classes, and no labels.
    """
    x, weights = evidence.inputs("obd_gauss_newton"), evidence.final
    classes = evidence.one_output(weights, x).shape[-1]

    def squares(one: Tensor) -> Params:
        logits, pull = vjp(lambda w: evidence.logits(w, one[None])[0], weights)[:2]
        p = logits.softmax(0)
        roots = p.sqrt()[:, None] * (torch.eye(classes, dtype=p.dtype, device=p.device) - p)  # row c is r_c
        return {name: g.square().sum(0) for name, g in vmap(pull)(roots)[0].items()}

    return _saliency(weights, _mean_over_examples(weights, squares, classes, x))


def obd_fisher(evidence: Evidence) -> Scores:
    """h = the mean over examples of the squared gradient of the loss: the empirical Fisher diagonal.

    With the labels of the data, not of the model: it vanishes where every example is fitted.
    """
    (x, y), weights = evidence.examples("obd_fisher"), evidence.final

    def squares(one: Tensor, label: Tensor) -> Params:
        gradient = grad(lambda w: F.cross_entropy(evidence.logits(w, one[None]), label[None]))(weights)
        return {name: g.square() for name, g in gradient.items()}

    return _saliency(weights, _mean_over_examples(weights, squares, 1, x, y))


def _mean_over_examples(weights: Params, squares: Callable[..., Params], copies: int, *examples: Tensor) -> Params:
    """The mean of ``squares`` over examples, in blocks that hold ``copies`` gradients of each."""
    size = max(1, _BLOCK_ELEMENTS // (copies * sum(w.numel() for w in weights.values())))
    mean = {name: torch.zeros_like(w) for name, w in weights.items()}
    for block in zip(*(part.split(size) for part in examples), strict=True):
        for name, square in vmap(squares)(*block).items():
            mean[name] += square.sum(0) / len(examples[0])
    return mean


def _saliency(weights: Params, diagonal: Params) -> Scores:
    return {name: diagonal[name] * w.square() / 2 for name, w in weights.items()}
