"""The structure of masks beyond counts: live connections of hidden units, of inputs, and from level to level."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int
from torch import Tensor

from ticketlab.errors import Refused
from ticketlab.overlap.compare import WHOLE, check
from ticketlab.permutation import Groups
from ticketlab.permutation.permute import is_stacked
from ticketlab.state import Masks


def units(groups: Groups, masks: Masks) -> pd.DataFrame:
    """Live fan-in and fan-out of every hidden unit, and which units are dead.

    A unit is a neuron of a linear layer, a channel of a convolution (each kernel position counts), or a channel of a
    residual stream, with all layers that write and read it.

    Args:
        groups: Of the architecture, from ``permutation.groups(model, x)``.
        masks: One network's, or a stack.

    Returns:
        One row a unit: [replica,] group, unit, fan_in and fan_out (live weights), dense_fan_in and dense_fan_out,
        dead (no live input or no live output, where it has any).
    """
    if any(is_stacked(groups, name, mask) for name, mask in masks.items()):
        n = len(next(iter(masks.values())))
        parts = [units(groups, {name: m[r] for name, m in masks.items()}).assign(replica=r) for r in range(n)]
        table = pd.concat(parts, ignore_index=True)
        return table[["replica", *table.columns.drop("replica")]]
    counts = {(g, k): np.zeros(size, dtype=int) for g, size in groups.sizes.items() for k in _COLUMNS}
    for name, mask in masks.items():
        factors = [(group, size, dim) for dim, axis in enumerate(groups.axes[name]) for group, size in axis]
        split = mask.reshape([size for _, size, _ in factors]).cpu().numpy()
        for place, (group, size, dim) in enumerate(factors):
            if group is not None:
                side = "fan_in" if dim == 0 else "fan_out"  # weights are [output, input, ...]
                counts[group, side] += split.sum(tuple(i for i in range(split.ndim) if i != place))
                counts[group, f"dense_{side}"] += split.size // size
    rows = [
        pd.DataFrame({"group": g, "unit": np.arange(size), **{k: counts[g, k] for k in _COLUMNS}})
        for g, size in groups.sizes.items()
    ]
    table = pd.concat(rows, ignore_index=True)
    cut = [(table[side] == 0) & (table[f"dense_{side}"] > 0) for side in ("fan_in", "fan_out")]
    return table.assign(dead=cut[0] | cut[1])


_COLUMNS = ("fan_in", "fan_out", "dense_fan_in", "dense_fan_out")


def input_map(mask: Bool[Tensor, "*replica unit input"], input_shape: Sequence[int]) -> Int[Tensor, "*replica_shape"]:
    """Live weights of the first layer summed over its units, for every input (pixel).

    Args:
        mask: Of the linear layer on the flattened input; a replica axis may stand in front.
        input_shape: Of one example, such as (1, 28, 28).

    Raises:
        Refused: The layer does not have one column an input.
    """
    if mask.ndim not in (2, 3) or mask.shape[-1] != prod(input_shape):
        raise Refused(
            f"mask must be that of a linear layer on {prod(input_shape)} inputs {tuple(input_shape)}: got shape "
            f"{tuple(mask.shape)}. Give the first layer's; a convolution sees every pixel with the same weights."
        )
    return mask.sum(-2).reshape(*mask.shape[:-2], *input_shape)


def survival(levels: Sequence[Masks], *, stacked: bool = False) -> pd.DataFrame:
    """Share of the weights alive in one mask that are still alive in a later one: 1 on the diagonal.

    Masks of an iterative pruning are nested, and the share is the ratio of their densities; sparse training that
    moves its mask, or masks of different criteria, fall below.

    Args:
        levels: Masks of one network, in order; or stacks of the same replicas.
        stacked: Whether there is a replica axis in front; without it a stack is taken for one network, see `compare`.

    Returns:
        One row for every two positions a <= b of ``levels``, layer (``all`` for the whole) [and replica]: survival;
        NaN where nothing is alive at a.
    """
    stacks = [dict(masks) if stacked else {n: m[None] for n, m in masks.items()} for masks in levels]
    check(stacks)
    blocks = []
    for a, first in enumerate(stacks):
        live = {n: m.flatten(1).sum(1).cpu().numpy() for n, m in first.items()}
        for b, later in enumerate(stacks[a:], start=a):
            both = {n: (m & later[n]).flatten(1).sum(1).cpu().numpy() for n, m in first.items()}
            with np.errstate(invalid="ignore"):  # 0 / 0 of empty layers
                share = {n: both[n] / live[n] for n in first} | {WHOLE: sum(both.values()) / sum(live.values())}
            found = [pd.DataFrame({"a": a, "b": b, "layer": n, "survival": s}) for n, s in share.items()]
            blocks += [rows.assign(replica=rows.index) if stacked else rows for rows in found]
    return pd.concat(blocks, ignore_index=True)
