"""The live columns of a layer's Jacobian, then one Gram product: cheapest where few weights are left."""

from __future__ import annotations

import torch
from torch import Tensor

from ticketlab.ntk.blocks import add_gram, picked, unit_groups
from ticketlab.ntk.layers import Features, Layer


def add(out: Tensor, layer: Layer, left: Features, right: Features, *, trace: bool, symmetric: bool) -> None:
    r"""Add the kernel of a layer from the live columns of its Jacobian.

    .. math:: \Theta[n o, m o'] = \sum_{e\ live} J_{n o, e} J_{m o', e}
    """
    n_out, n, positions = left.deltas.shape[1:]
    copied = 1 if _is_dense(layer.n_live, layer.live.numel()) else positions  # see _live_inputs
    entries = max(n, right.deltas.shape[2]) * max(n_out, copied)
    for units, columns in unit_groups(layer, entries, left.inputs.dtype):
        mine = columns_of_jacobian(left, units, columns)
        theirs = mine if symmetric else columns_of_jacobian(right, units, columns)
        add_jacobian(out, mine, theirs, trace=trace, symmetric=symmetric)


def add_jacobian(out: Tensor, left: Tensor, right: Tensor, *, trace: bool, symmetric: bool) -> None:
    """Add the Gram product of two blocks of columns [column, out, n] and [column, out', m]."""
    if trace:
        add_gram(out, left.reshape(-1, left.shape[2]), right.reshape(-1, right.shape[2]), symmetric)
    else:
        rows, columns = left.flatten(1), right.flatten(1)
        add_gram(out.view(rows.shape[1], columns.shape[1]), rows, columns, symmetric)


def columns_of_jacobian(features: Features, units: Tensor, columns: Tensor) -> Tensor:
    """J for the given inputs [unit, column] of the given units: [unit column, out, n], padding left out."""
    pad = len(features.inputs) - 1
    wanted = columns != pad
    if features.inputs.shape[2] == 1:
        inputs = picked(features.inputs, columns[wanted]).mT  # [unit column, 1, n]
        return inputs * picked(features.deltas, units[:, None].expand_as(columns)[wanted]).squeeze(-1)
    form = _all_inputs if _is_dense(columns.numel(), len(units) * pad) else _live_inputs
    return form(features.inputs, features.deltas[units], columns)[wanted]


def _is_dense(live: int, every: int) -> bool:
    """Whether one product over all inputs beats thin ones over the live inputs, which are 6 times slower each."""
    return 6 * live > every


def _all_inputs(inputs: Tensor, deltas: Tensor, columns: Tensor) -> Tensor:
    """Dense rows of J by one product for each example, and what is wanted of them: [unit, column, out, n]."""
    units, n_out, n, positions = deltas.shape
    dense = inputs.transpose(0, 1) @ deltas.permute(2, 3, 0, 1).reshape(n, positions, units * n_out)
    by_unit = dense.view(n, len(inputs), units, n_out).permute(2, 1, 3, 0)
    return by_unit[torch.arange(units, device=columns.device)[:, None], columns]


def _live_inputs(inputs: Tensor, deltas: Tensor, columns: Tensor) -> Tensor:
    """The same from the live inputs alone, a unit at a time."""
    n_out, n = deltas.shape[1:3]
    found = inputs.new_empty(*columns.shape, n_out, n)
    for one, x, delta in zip(found, picked(inputs, columns), deltas, strict=True):
        one.copy_((x.transpose(0, 1) @ delta.permute(1, 2, 0)).permute(1, 2, 0))  # [n, column, out]
    return found
