"""What pruning means in attention: densities of heads and projections, dead and blind heads, overlap of Q and K.

Nothing here knows a module's name. An attention layer is found from the symmetry of its network: its heads may trade
places, and no other hidden units are blocks that run through three projections and out of a fourth.

>>> found = tl.attention.layers(model, x)
>>> tl.attention.heads(found, level.masks)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import prod
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ticketlab import overlap
from ticketlab.errors import Refused
from ticketlab.permutation import Groups, groups
from ticketlab.permutation.permute import Factors
from ticketlab.state import Masks

ProjectionName = Literal["query", "key", "value", "output"]
PROJECTIONS: tuple[ProjectionName, ...] = ("query", "key", "value", "output")


@dataclass(frozen=True)
class Projection:
    """One of a layer's four maps: where its weights lie in a parameter, alone or beside the two others."""

    parameter: str
    axis: int
    """Axis of the parameter along which the heads lie: 0 or 1."""
    of: tuple[int, int]
    """Shape of the parameter."""
    shape: tuple[int, ...]
    """Row-major factors of that axis: heads and units of a head, and 3 where query, key and value are one parameter."""
    part: tuple[int, int] | None = None
    """Position of that 3 in ``shape``, and which of the three this is; None where the parameter holds it alone."""

    def by_head(self, tensor: Tensor) -> Tensor:
        """What a tensor of the parameter's shape holds of each head.

        Args:
            tensor: Weights, gradients or a mask [*replica, ...] of the parameter.

        Returns:
            [*replica, head, unit, width]: a view, the output's transposed like those of the others.
        """
        split = tensor.movedim(self.axis - 2, -2).unflatten(-2, self.shape)
        return split if self.part is None else split.select(self.part[0] - len(self.shape) - 1, self.part[1])


@dataclass(frozen=True)
class Layer:
    """An attention layer: its four projections and how it is cut into heads."""

    name: str
    """Path of the module that holds all four."""
    heads: int
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    paired: bool
    """Whether unit i of the query meets unit i of the key alone; rotary embeddings mix units."""


def layers(model: nn.Module, x: Tensor) -> tuple[Layer, ...]:
    """The attention layers of a network, in the order of the forward pass.

    Query and key are two of the three projections that share their heads; which comes first is taken from the order
    of the parameters, and of the thirds where one parameter holds all (``nn.MultiheadAttention``, GPT-2). Several
    queries for one key are not taken apart.

    Args:
        model: Any module that ``permutation.groups`` can trace.
        x: An example input [n, ...]; its values do not matter.

    Raises:
        Refused: None is found; whatever ``permutation.groups`` refuses.
    """
    traced = groups(model, x)
    matrices = {n: (p.shape[0], p.shape[1]) for n, p in model.named_parameters() if p.ndim == 2}
    found = [layer for group in traced.sizes for layer in _layer(traced, group, matrices)]
    if not found:
        raise Refused(
            f"{type(model).__name__} must have attention of two heads or more, as many for keys as for queries: no "
            f"group of units runs through three projections and out of a fourth, among {', '.join(traced.sizes)}. "
            "With one head nothing tells its projections from other layers."
        )
    return tuple(found)


def densities(layers: Sequence[Layer], masks: Masks) -> pd.DataFrame:
    """Live weights of every head's four projections.

    Args:
        layers: Of the architecture, from :func:`layers`.
        masks: One network's, or a stack. A parameter that has none is not pruned: all of it is kept.

    Returns:
        A row per [replica,] layer, head and projection: kept, prunable, density.

    Raises:
        Refused: No projection has a mask.
    """

    def rows(layer: Layer, live: Callable[[Projection], Tensor]) -> Iterator[pd.DataFrame]:
        for name in PROJECTIONS:
            one = live(getattr(layer, name))
            kept, prunable = one.flatten(1).sum(1), one[0].numel()
            yield _numbers(projection=name, kept=kept, prunable=prunable, density=kept.double() / prunable)

    return _each(layers, masks, rows)


def heads(layers: Sequence[Layer], masks: Masks) -> pd.DataFrame:
    """What is left of every head.

    A unit of a head passes something on if it has a live weight on both sides. Without such a unit between value and
    output a head is *dead*: nothing that it reads comes out, and a bias of the value adds the same to every token.
    Without one between query and key it is *blind*: its scores compare no two tokens, though biases may still prefer
    some keys to others, and without biases it takes the mean of all tokens.

    Args:
        layers: See :func:`densities`.
        masks: See :func:`densities`.

    Returns:
        A row per [replica,] layer and head: density (of its four projections), live_dims_qk and live_dims_vo (units
        with both sides live), blind, dead. Where rotary embeddings mix units, live_dims_qk is the lesser of the live
        units of query and key, and a head is called blind only where one of the two is empty.

    Raises:
        Refused: See :func:`densities`.
    """

    def rows(layer: Layer, live: Callable[[Projection], Tensor]) -> Iterator[pd.DataFrame]:
        four = [live(getattr(layer, name)) for name in PROJECTIONS]
        query, key, value, output = (one.any(-1) for one in four)
        between = (query & key).sum(-1) if layer.paired else query.sum(-1).minimum(key.sum(-1))
        through = (value & output).sum(-1)
        kept, prunable = (
            torch.stack([one.flatten(1).sum(1) for one in four]).sum(0),
            sum(one[0].numel() for one in four),
        )
        yield _numbers(
            density=kept.double() / prunable,
            live_dims_qk=between,
            live_dims_vo=through,
            blind=between == 0,
            dead=through == 0,
        )

    return _each(layers, masks, rows)


def query_key_overlap(layers: Sequence[Layer], masks: Masks) -> pd.DataFrame:
    """What the masks of query and key share in every head, against chance.

    Args:
        layers: See :func:`densities`.
        masks: See :func:`densities`.

    Returns:
        A row per [replica,] layer, head and ``of``, with the columns of ``overlap.compare``: ``of`` is ``weights``
        (positions: the same unit reads the same input), ``units`` (live in both) or ``inputs`` (read by both). The
        null places each mask's live ones anywhere in its head, their numbers given.

    Raises:
        Refused: See :func:`densities`.
    """
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "weights": lambda live: live,
        "units": lambda live: live.any(-1),
        "inputs": lambda live: live.any(-2),
    }

    def rows(layer: Layer, live: Callable[[Projection], Tensor]) -> Iterator[pd.DataFrame]:
        for kind, seen in kinds.items():
            query, key = ({kind: seen(live(projection))} for projection in (layer.query, layer.key))
            table = overlap.compare(query, key, stacked=True).query("layer != 'all'").drop(columns=["layer", "replica"])
            yield table.assign(of=kind)[["of", *table]]

    return _each(layers, masks, rows)


@dataclass(frozen=True)
class _Entry:
    """A matrix along one axis of which a group of units lies, first or behind a 3, and what is inside each of them."""

    parameter: str
    axis: int
    of: tuple[int, int]
    heads: int
    before: Factors
    inside: Factors

    def whole(self) -> Projection:
        return Projection(self.parameter, self.axis, self.of, (self.heads, _size(self.inside)))

    def thirds(self) -> list[Projection]:
        """Query, key and value of one parameter: [3, head, unit] or [head, 3, unit]; none where there is no 3."""
        if self.before:
            shape, at = (3, self.heads, _size(self.inside)), 0
        elif self.inside[0] == _THREE:
            shape, at = (self.heads, 3, _size(self.inside[1:])), 1
        else:
            return []
        return [Projection(self.parameter, self.axis, self.of, shape, (at, part)) for part in range(3)]


_THREE = (None, 3)


def _size(factors: Factors) -> int:
    return prod(size for _, size in factors)


def _layer(traced: Groups, group: str, matrices: Mapping[str, tuple[int, int]]) -> Iterator[Layer]:
    """The layer whose heads are the units of a group, if they are heads."""
    entries = []
    for name in (n for n in traced.axes if n in matrices):
        for axis, factors in enumerate(traced.axes[name]):
            owners = [owner for owner, _ in factors]
            if group in owners:
                at = owners.index(group)
                entries.append(_Entry(name, axis, matrices[name], traced.sizes[group], factors[:at], factors[at + 1 :]))
    if any(one.before not in ((), (_THREE,)) or _size(one.inside) == 1 for one in entries):
        return
    four = _of_one(entries) if len(entries) == 2 else _of_four(entries) if len(entries) == 4 else []
    if four and len({(one.shape[-1], one.part is None) for one in four[:2]}) == 1:
        inside = next(one.inside for one in entries if one.parameter == four[0].parameter)
        paths = [one.parameter.split(".") for one in four]
        shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
        paired = any(owner is not None for owner, _ in inside)
        query, key, value, output = four
        yield Layer(".".join(shared), traced.sizes[group], query, key, value, output, paired)


def _of_one(entries: Sequence[_Entry]) -> list[Projection]:
    """Query, key and value as thirds of one parameter, and the output."""
    for three, output in (entries, entries[::-1]):
        if three.thirds() and not output.thirds():
            return [*three.thirds(), output.whole()]
    return []


def _of_four(entries: Sequence[_Entry]) -> list[Projection]:
    """The output is cut along the other axis than the three; the value shares the units inside its heads."""
    outputs = [one for one in entries if sum(one.axis == other.axis for other in entries) == 1]
    values = [one for one in entries if outputs and one is not outputs[0] and one.inside == outputs[0].inside]
    if len(outputs) != 1 or len(values) != 1 or any(one.before for one in entries):
        return []
    pair = [one for one in entries if one is not outputs[0] and one is not values[0]]
    return [one.whole() for one in (*pair, values[0], outputs[0])]


def _each(
    layers: Sequence[Layer],
    masks: Masks,
    rows: Callable[[Layer, Callable[[Projection], Bool[Tensor, "n unit width"]]], Iterator[pd.DataFrame]],
) -> pd.DataFrame:
    """The rows of every layer: ``rows`` sees the heads of all replicas along one axis."""
    masked = [m for n, m in masks.items() if any(n == getattr(one, p).parameter for one in layers for p in PROJECTIONS)]
    if not masked:
        raise Refused(f"masks must be those of a projection of attention, among others: got {', '.join(masks)}.")
    stack = masked[0].shape[:-2]

    def live(projection: Projection) -> Bool[Tensor, "n unit width"]:
        whole = torch.ones((*stack, *projection.of), dtype=torch.bool, device=masked[0].device)
        return projection.by_head(masks.get(projection.parameter, whole)).flatten(0, len(stack))

    def table(layer: Layer, part: pd.DataFrame) -> pd.DataFrame:
        at = np.arange(len(part))
        front = {"replica": at // layer.heads} if stack else {}
        return pd.DataFrame({**front, "layer": layer.name, "head": at % layer.heads, **part.reset_index(drop=True)})

    return pd.concat([table(layer, part) for layer in layers for part in rows(layer, live)], ignore_index=True)


def _numbers(**columns: Tensor | str | int) -> pd.DataFrame:
    return pd.DataFrame({name: c.cpu().numpy() if isinstance(c, Tensor) else c for name, c in columns.items()})
