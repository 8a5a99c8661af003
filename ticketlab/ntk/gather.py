"""The live columns of a layer's Jacobian, then one Gram product: cheapest where few weights are left."""

from __future__ import annotations

from torch import Tensor

from ticketlab.ntk.blocks import add_gram, unit_groups
from ticketlab.ntk.layers import Features, Layer


def add(out: Tensor, layer: Layer, left: Features, right: Features, *, trace: bool, symmetric: bool) -> None:
    r"""Add the kernel of a layer from the live columns of its Jacobian.

    .. math:: \Theta[n o, m o'] = \sum_{e\ live} J_{n o, e} J_{m o', e}
    """
    n_out, n, positions = left.deltas.shape[1:]
    entries = max(n, right.deltas.shape[2]) * max(n_out, positions)
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
    """J for the given inputs of the given units: [unit * column, out, n]."""
    inputs, deltas = features.inputs[columns], features.deltas[units]
    n_out, n, positions = deltas.shape[1:]
    if positions == 1:
        # [unit, column, 1, n] * [unit, 1, out, n]: examples innermost, so that both are read in long runs.
        return (inputs.view(*columns.shape, 1, n) * deltas.view(len(units), 1, n_out, n)).flatten(0, 1)
    found = inputs.new_empty(*columns.shape, n_out, n)
    for one, x, delta in zip(found, inputs, deltas, strict=True):
        one.copy_((x.transpose(0, 1) @ delta.permute(1, 2, 0)).permute(1, 2, 0))  # [n, column, out]
    return found.flatten(0, 1)
