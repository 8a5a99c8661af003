"""The unmasked layer: its kernel factors into inputs and deltas, whatever the number of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ticketlab.ntk.blocks import add_gram, n_fitting, strips
from ticketlab.ntk.layers import Features, Layer
from ticketlab.ntk.rows import add_outputs, halved


def add(out: Tensor, layer: Layer, left: Features, right: Features, *, trace: bool, symmetric: bool) -> None:
    r"""Add the kernel of a layer whose weights are all live.

    .. math:: \Theta[n o, m o'] = \sum_{t t'} (a_{n t} \cdot a_{m t'} + 1_{bias})\,
              (\delta_{n o t} \cdot \delta_{m o' t'})

    The sum runs over pairs of positions: the product of the two sums is another number. With one position it
    is an elementwise product of two Gram matrices; with more, the sum over t is taken first. The groups of a
    convolution are layers of their own.
    """
    per_group = layer.units // layer.groups
    for g in range(layer.groups):
        units = slice(g * per_group, (g + 1) * per_group)
        a, b = _columns(layer, left, g), _columns(layer, right, g)
        if layer.positions == 1:
            _add_single(out, (a, b), (left.deltas[units], right.deltas[units]), trace=trace, symmetric=symmetric)
        else:
            _add_sequence(out, (a, b), (left.deltas[units], right.deltas[units]), trace=trace, symmetric=symmetric)


def _columns(layer: Layer, features: Features, group: int) -> Tensor:
    """The inputs of one group, and the ones where the bias is live."""
    width, ones = layer.inputs, layer.groups * layer.inputs
    own = features.inputs[group * width : (group + 1) * width]
    has_bias = layer.bias is not None and bool(layer.live[0, -1])
    if has_bias and layer.groups == 1:
        return features.inputs[: width + 1]
    return torch.cat([own, features.inputs[ones : ones + 1]]) if has_bias else own


def _add_single(out: Tensor, inputs: tuple, deltas: tuple, *, trace: bool, symmetric: bool) -> None:
    a, b = inputs
    d, e = (delta.squeeze(-1) for delta in deltas)
    similarity = a.flatten(1).mT @ b.flatten(1)  # [n, m]
    if trace:
        gram = torch.zeros_like(out)
        add_gram(gram, d.flatten(0, 1), e.flatten(0, 1), symmetric)
        out.addcmul_(similarity, gram)
        return
    n_out, n, m = d.shape[1], d.shape[2], e.shape[2]
    left, right = d.flatten(1), e.flatten(1)  # whole: a strip of columns is a view, without a copy
    step = max(1, min(n_fitting(n * n_out * m, d.dtype), -(-128 // n)))
    for start in range(0, n_out, step):  # strips of outputs here: they are the outer index
        rows, columns = slice(start, min(start + step, n_out)), slice(start if symmetric else 0, n_out)
        gram = left[:, start * n : rows.stop * n].mT @ right[:, columns.start * m :]
        gram = gram.view(-1, n, n_out - columns.start, m)
        if symmetric:
            gram[:, :, : len(gram)].mul_(0.5)
        out[rows, :, columns].addcmul_(similarity[:, None], gram)


def _add_sequence(out: Tensor, inputs: tuple, deltas: tuple, *, trace: bool, symmetric: bool) -> None:
    (a, b), (d, e) = inputs, deltas
    units, n_out, n, positions = d.shape
    m, others = e.shape[2:]
    for rows, columns in strips(n, m, n_fitting(positions * m * others, d.dtype), symmetric):
        mine, theirs = d[:, :, rows], e[:, :, columns]
        r, c = mine.shape[2], theirs.shape[2]
        similarity = (a[:, rows].flatten(1).mT @ b[:, columns].flatten(1)).view(r, positions, c, others)
        if trace:
            gram = mine.reshape(units * n_out, -1).mT @ theirs.reshape(units * n_out, -1)
            out[rows, columns] += halved((similarity * gram.view_as(similarity)).sum((1, 3)), symmetric)
            continue
        size = n_fitting(n_out * c * others, d.dtype)
        for some, same in zip(mine.split(size), theirs.split(size), strict=True):
            # A copy: the diagonal is halved in place, once for each chunk of units.
            add_outputs(out, similarity[None].clone(), some, same, rows, columns, symmetric=symmetric)
