"""What the three layer-wise methods share: halves of symmetric kernels, strips of examples, groups of units.

Every method *adds* into a tile, [out, n, out', m] for a full kernel and [n, m] for a trace. Where both sides
are the same examples it adds a half H instead, of its own choice, such that the kernel is H + H': about half
the work, and exactly symmetric.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ticketlab.ntk.layers import Layer

CHUNK_BYTES = 2**23
"""Size aimed at by every temporary. It is in reach of the cache, and below what allocators hand back to the
system: a fresh large array costs ten times its arithmetic in page faults (measured: 1.7 against 0.16 ns an entry)."""

Group = tuple[Int[Tensor, " unit"], Int[Tensor, "unit column"]]


def add_gram(out: Tensor, left: Tensor, right: Tensor, symmetric: bool) -> None:
    """out[p, q] += left[e, p] right[e, q], or half of it where left is right."""
    if not symmetric:
        out.addmm_(left.mT, right)
        return
    n = len(out)
    step = max(128, -(-n // 8))
    for start in range(0, n, step):
        stop = min(start + step, n)
        mine = left[:, start:stop].mT
        out[start:stop, start:stop].addmm_(mine, right[:, start:stop], alpha=0.5)
        if stop < n:
            out[start:stop, stop:].addmm_(mine, right[:, stop:])


def strips(n: int, m: int, size: int, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    """Row strips of at most ``size`` examples and the columns they need, from their own first row on."""
    # Strips thinner than this slow the products down by more than the halves save.
    size = max(1, min(size, max(64, -(-n // 8)) if symmetric else n))
    for start in range(0, n, size):
        yield slice(start, min(start + size, n)), slice(start if symmetric else 0, m)


def n_fitting(n_each: int, dtype: torch.dtype) -> int:
    """How many items of ``n_each`` entries fit in a temporary; at least one."""
    return max(1, CHUNK_BYTES // (max(1, n_each) * dtype.itemsize))


def unit_groups(layer: Layer, n_entries: int, dtype: torch.dtype) -> Iterator[Group]:
    """Units with about as many live inputs each, and where those lie among the columns of the features.

    Shorter rows are padded with the column of zeros; units without a live input are left out.

    Args:
        layer: Its ``live`` mask is what the groups are of.
        n_entries: Entries that a temporary holds for each live input.
        dtype: Of the temporaries.
    """
    counts, columns = _live_columns(layer.live, layer.groups, layer.bias is not None)
    order = counts.argsort(descending=True, stable=True)
    sizes = counts[order].tolist()
    ends = counts.cumsum(0)
    pad, start = layer.groups * layer.inputs + 1, 0
    while start < len(sizes) and sizes[start] > 0:
        largest = sizes[start]
        most = start + n_fitting(n_entries * largest, dtype)
        stop = start + 1
        # Little padding; short rows lie together whatever their length.
        while stop < min(len(sizes), most) and sizes[stop] > max(0, 0.75 * largest - 4):
            stop += 1
        units = order[start:stop]
        place = torch.arange(largest, device=counts.device)
        table = (ends - counts)[units][:, None] + place
        inside = place < counts[units][:, None]
        yield units, torch.where(inside, columns[table.clamp(max=len(columns) - 1)], pad)
        start = stop


def picked(tensor: Tensor, rows: Int[Tensor, "..."]) -> Tensor:
    """``tensor[rows]``, in long copies: several times faster than advanced indexing on a CPU."""
    return tensor.index_select(0, rows.flatten()).view(*rows.shape, *tensor.shape[1:])


def _live_columns(live: Bool[Tensor, "unit column"], groups: int, has_bias: bool) -> tuple[Tensor, Tensor]:
    """Live inputs of each unit, counted and then listed unit after unit, as columns of the features."""
    unit, column = live.nonzero(as_tuple=True)
    inputs = live.shape[1] - has_bias
    own = column + unit // (len(live) // groups) * inputs
    return live.sum(1), torch.where(column < inputs, own, groups * inputs)
