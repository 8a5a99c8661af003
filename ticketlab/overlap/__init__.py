"""Mask overlap: what two tickets share beyond chance, unit by unit, level by level, and up to the order of units.

:func:`compare` and :func:`pairs` hold intersections against the hypergeometric null, :func:`aligned` against random
masks aligned alike; :func:`units`, :func:`input_map` and :func:`survival` show where the live weights are.
"""

from __future__ import annotations

from ticketlab.overlap.aligned import aligned
from ticketlab.overlap.compare import compare, pairs
from ticketlab.overlap.units import input_map, survival, units

__all__ = ["aligned", "compare", "input_map", "pairs", "survival", "units"]
