"""The masked layer, unit by unit: exact under any mask, and free of the square of the outputs times the weights."""

from __future__ import annotations

from torch import Tensor

from ticketlab.ntk.blocks import halve, n_fitting, strips, unit_groups
from ticketlab.ntk.layers import Features, Layer


def add(out: Tensor, layer: Layer, left: Features, right: Features, *, trace: bool, symmetric: bool) -> None:
    r"""Add the kernel of a layer as a sum over its units.

    .. math:: \Theta[n o, m o'] = \sum_u \sum_{t t'} \delta_{u n o t}\, A^{(u)}_{n t, m t'}\, \delta_{u m o' t'},
              \qquad A^{(u)} = a_{S_u} a_{S_u}^T

    with S_u the live inputs of unit u. Units with about as many live inputs share a batched product.
    """
    n, positions = left.inputs.shape[1:]
    m, others = right.inputs.shape[1:]
    dtype = left.inputs.dtype
    for units, columns in unit_groups(layer, max(n * positions, m * others), dtype):
        x, y = left.inputs[columns], right.inputs[columns]  # [unit, column, n, position]
        d, e = left.deltas[units], right.deltas[units]
        per_example = len(units) * positions * m * others
        for rows, cols in strips(n, m, n_fitting(per_example, dtype), symmetric):
            mine, theirs = d[:, :, rows], e[:, :, cols]
            shape = (len(units), mine.shape[2], positions, theirs.shape[2], others)
            similarity = (x[:, :, rows].flatten(2).mT @ y[:, :, cols].flatten(2)).view(shape)
            halve(similarity, rows, symmetric)
            if trace:
                gram = (mine.flatten(2).mT @ theirs.flatten(2)).view(shape)
                out[rows, cols] += similarity.mul_(gram).sum((0, 2, 4))
            else:
                second_full(out, similarity, mine, theirs, rows, cols)


def second_full(out: Tensor, similarity: Tensor, left: Tensor, right: Tensor, rows: slice, columns: slice) -> None:
    """Contract A[unit or 1, n, t, m, t'] with the deltas of both sides, one example of the left at a time.

    Summing over t first keeps the cost at O T^2 + O^2 T a unit and pair of examples, not O^2 T^2.
    """
    units, n_out, _, positions = left.shape
    m, others = right.shape[2:]
    if positions == others == 1:
        right_flat = right.reshape(units, n_out * m)
    else:
        right_flat = right.permute(2, 0, 3, 1).reshape(m, units * others, n_out)
    for i, n in enumerate(range(rows.start, rows.stop)):
        mine, a = left[:, :, i], similarity[:, i]  # [unit, out, t], [unit or 1, t, m, t']
        if positions == others == 1:
            weighted = a[:, 0, :, 0][:, None] * right.squeeze(-1)  # [unit, out', m]
            out[:, n, :, columns] += (mine[:, :, 0].mT @ weighted.view_as(right_flat)).view(n_out, n_out, m)
        else:
            if len(a) == 1:  # shared by all units: one product instead of a batch
                half = mine.reshape(units * n_out, positions) @ a[0].flatten(1)
            else:
                half = mine @ a.flatten(2)
            half = half.view(units, n_out, m, others).permute(2, 1, 0, 3).reshape(m, n_out, units * others)
            out[:, n, :, columns] += (half @ right_flat).permute(1, 2, 0)
