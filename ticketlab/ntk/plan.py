"""Which method computes which layer, and in blocks of how many examples.

Costs are counted in multiply-adds of one large matrix product, the fastest thing a processor does; work that
moves memory rather than multiplies is charged at its measured exchange rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from ticketlab.errors import Refused
from ticketlab.ntk.blocks import CHUNK_BYTES
from ticketlab.ntk.layers import Layer

LayerMethod = Literal["structured", "rows", "gather"]
Method = Literal["auto", "structured", "rows", "gather", "generic"]

MEMORY_BYTES = 2**30
"""Cap on what is held at once beside the kernel itself; temporaries of blocks.CHUNK_BYTES come on top."""

# Measured with float32 on one core of the build machine (45e9 multiply-adds /s in a large product); the ratios
# hold within a factor of 2 for float64 and for two cores, and the choices are rarely that close.
_PASS = 40.0
"""One entry read, multiplied and written elementwise."""
_THIN = 3.0
"""A multiply-add of a product with a short side."""
_STEP = 1.2e6
"""One turn of a Python loop over a few torch calls."""


def multiply_adds(
    layer: Layer, method: LayerMethod, n_outputs: int, n: int, m: int, *, trace: bool, symmetric: bool
) -> float:
    r"""Cost of one layer's kernel of n by m examples.

    With T positions, K inputs and U units of all groups, k live weights and O outputs, a pair of examples costs
    :math:`T^2 K + O T^2 U + O^2 T U` structured (K + O^2 U where T = 1), :math:`T^2 k + O T^2 U + O^2 T U` by
    rows, and :math:`O^2 k` by gathering, which also forms O T k entries' worth of products an example. A trace
    has O in place of O^2 and needs no second step. Passes over memory come on top.
    """
    t, units, o, k = layer.positions, layer.units, n_outputs, layer.n_live
    every = layer.live.numel()
    pairs, singles = (n * m / 2, n) if symmetric else (n * m, n + m)
    if method == "gather":
        # Picked inputs, picked deltas and their product; with positions a product, and its entries picked out.
        form = o * k * 3 * _PASS if t == 1 else o * t * min(2 * _THIN * k, 1.5 * every) + o * k * 5 * _PASS
        return singles * form + pairs * k * (o if trace else o * o)
    if method == "structured":
        cost = 2 * pairs * t * t * layer.groups * layer.live.shape[1]
    else:
        cost = _THIN / 2 * pairs * t * t * k + singles * t * k * 2 * _PASS
    if trace:
        return cost + pairs * t * t * (2 * o * units + _PASS * (1 if method == "structured" else units))
    if t > 1:
        return cost + pairs * t * o * units * (t * (1 if method == "structured" else _THIN) + o + 2 * _PASS)
    if method == "structured":
        return cost + pairs * o * o * (units + _PASS)
    n_packs = 1 + k * max(n, m) / CHUNK_BYTES
    return cost + pairs * o * units * (_PASS + o) + n_packs * n * _STEP


def allowed(layer: Layer) -> tuple[LayerMethod, ...]:
    """The methods that are exact for a layer: structure needs every weight, and all of the bias or none."""
    n_bias = int(layer.live[:, layer.inputs :].count_nonzero())
    dense = layer.n_live == layer.units * layer.inputs + n_bias and n_bias in (0, layer.units)
    return ("structured", "rows", "gather") if dense else ("rows", "gather")


def choose(
    layers: Sequence[Layer], method: Method, n_outputs: int, n: int, m: int, *, trace: bool, symmetric: bool
) -> list[LayerMethod]:
    """The method of each layer: the cheapest one for ``auto``, else the one asked for.

    Raises:
        Refused: ``structured`` for a layer with pruned weights.
    """
    found: list[LayerMethod] = []
    for layer in layers:
        options = allowed(layer)
        if method == "auto":
            costs = {o: multiply_adds(layer, o, n_outputs, n, m, trace=trace, symmetric=symmetric) for o in options}
            found.append(min(options, key=costs.__getitem__))
        elif method in options:
            found.append(method)
        else:
            raise Refused(
                f"method='structured' needs every weight of a layer as a coordinate: {layer.weight!r} has "
                f"{layer.n_live} of {layer.live.numel()}. Use method='rows', 'gather' or 'auto'."
            )
    return found


def largest_block(
    layers: Sequence[Layer], methods: Sequence[LayerMethod], n_outputs: int, n_generic: int, dtype: torch.dtype
) -> int:
    """The most examples whose features, on both sides, stay under the memory cap."""
    # Inputs and deltas, and once more for the activations and gradients that they are read from.
    entries = sum(2 * la.positions * (la.groups * la.inputs + 2 + (n_outputs + 1) * la.units) for la in layers)
    entries += n_outputs * n_generic
    size = MEMORY_BYTES // (2 * max(1, entries) * dtype.itemsize)
    for layer, method in zip(layers, methods, strict=True):
        if layer.positions > 1 and method != "gather":
            # One example against a block is the least that these hold: T m T' entries and their products.
            size = min(size, MEMORY_BYTES // (4 * layer.positions**2 * n_outputs * dtype.itemsize))
    return max(1, size)
