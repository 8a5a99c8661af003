"""The masked layer, unit by unit: exact under any mask, and free of the square of the outputs times the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ticketlab.ntk.blocks import Group, n_fitting, picked, strips, unit_groups
from ticketlab.ntk.layers import Features, Layer


def add(out: Tensor, layer: Layer, left: Features, right: Features, *, trace: bool, symmetric: bool) -> None:
    r"""Add the kernel of a layer as a sum over its units.

    .. math:: \Theta[n o, m o'] = \sum_u \sum_{t t'} \delta_{u n o t}\, A^{(u)}_{n t, m t'}\, \delta_{u m o' t'},
              \qquad A^{(u)} = a_{S_u} a_{S_u}^T

    with S_u the live inputs of unit u. Units with about as many live inputs share a batched product.
    """
    n, positions = left.inputs.shape[1:]
    m, others = right.inputs.shape[1:]
    groups = unit_groups(layer, max(n * positions, m * others), left.inputs.dtype)
    if positions == others == 1 and not trace:
        _add_single(out, groups, left, right, symmetric=symmetric)
        return
    dtype = left.inputs.dtype
    for units, columns in groups:
        x, d = picked(left.inputs, columns), left.deltas[units]  # [unit, column, n, position], [unit, out, n, position]
        y, e = (x, d) if symmetric else (picked(right.inputs, columns), right.deltas[units])
        per_example = len(units) * positions * m * others
        for rows, cols in strips(n, m, n_fitting(per_example, dtype), symmetric):
            mine, theirs = d[:, :, rows], e[:, :, cols]
            shape = (len(units), mine.shape[2], positions, theirs.shape[2], others)
            similarity = (x[:, :, rows].flatten(2).mT @ y[:, :, cols].flatten(2)).view(shape)
            if trace:
                gram = (mine.flatten(2).mT @ theirs.flatten(2)).view(shape)
                out[rows, cols] += halved(similarity.mul_(gram).sum((0, 2, 4)), symmetric)
            else:
                add_outputs(out, similarity, mine, theirs, rows, cols, symmetric=symmetric)


def _add_single(out: Tensor, groups: Iterable[Group], left: Features, right: Features, *, symmetric: bool) -> None:
    """The same for one position: a small product over the units for each pair of examples.

    With the units innermost only the left deltas are weighed by A, and nothing else is moved.
    """
    n, m = left.inputs.shape[1], right.inputs.shape[1]
    dtype = left.inputs.dtype
    # Four chunks: fewer units at once, and the turns of the loop over examples cost more than they do.
    for pack in _packs(groups, 4 * n_fitting(max(n, m), dtype)):
        units = torch.cat([units for units, _ in pack])
        x = [picked(left.inputs, columns)[..., 0] for _, columns in pack]  # [unit, column, n] each
        y = x if symmetric else [picked(right.inputs, columns)[..., 0] for _, columns in pack]
        d, e = (side.deltas[units, :, :, 0].permute(2, 1, 0).contiguous() for side in (left, right))  # [n, out, unit]
        for rows, cols in strips(n, m, n_fitting(len(units) * m, dtype), symmetric):
            similarity = [(p[:, :, rows].mT @ q[:, :, cols]).permute(1, 2, 0) for p, q in zip(x, y, strict=True)]
            weights = torch.cat(similarity, 2)  # [n, m, unit]
            if symmetric:  # an example with itself is met once more transposed
                weights.diagonal().mul_(0.5)
            for i, a in enumerate(weights):
                first = i if symmetric else 0
                where = slice(cols.start + first, cols.stop)
                pairs = (a[first:, None] * d[rows.start + i]) @ e[where].mT  # [m, out, out']
                out[:, rows.start + i, :, where] += pairs.permute(1, 2, 0)


def _packs(groups: Iterable[Group], most: int) -> Iterator[list[Group]]:
    """Groups in a row of at most ``most`` columns together, or one alone."""
    pack: list[Group] = []
    held = 0
    for units, columns in groups:
        if pack and held + columns.numel() > most:
            yield pack
            pack, held = [], 0
        pack.append((units, columns))
        held += columns.numel()
    if pack:
        yield pack


def halved(tile: Tensor, symmetric: bool) -> Tensor:
    """Halve, in place, the leading square of a strip: it is met once more transposed."""
    if symmetric:
        tile[:, : len(tile)].mul_(0.5)
    return tile


def add_outputs(
    out: Tensor, similarity: Tensor, left: Tensor, right: Tensor, rows: slice, columns: slice, *, symmetric: bool
) -> None:
    """Contract A[unit or 1, n, t, m, t'] with the deltas of both sides, one example of the left at a time.

    Summing over t first keeps the cost at O T^2 + O^2 T a unit and pair of examples, not O^2 T^2. Of a
    symmetric strip example n needs the examples from n on, itself by half.
    """
    units, n_out, _, positions = left.shape
    m, others = right.shape[2:]
    flat = right.permute(2, 0, 3, 1).reshape(m, units * others, n_out)
    for i, n in enumerate(range(rows.start, rows.stop)):
        first = i if symmetric else 0
        a = similarity[:, i, :, first:]  # [unit or 1, t, m, t']
        if symmetric:
            a[:, :, 0].mul_(0.5)
        where = slice(columns.start + first, columns.stop)
        # Shared by all units, it is one product instead of a batch.
        mine = left[:, :, i]
        half = mine.reshape(-1, positions) @ a[0].flatten(1) if len(a) == 1 else mine @ a.flatten(2)
        half = half.view(units, n_out, m - first, others).permute(2, 1, 0, 3).reshape(m - first, n_out, -1)
        out[:, n, :, where] += (half @ flat[first:]).permute(1, 2, 0)
