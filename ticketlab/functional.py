"""Names of version 0.1: what was here stands in ``network``, ``masks``, ``state``, ``seeds`` and ``errors`` now."""

from __future__ import annotations

__all__ = [
    *("Buffers", "Execution", "Masks", "Params", "State", "apply", "evaluate", "initialise", "masked", "n_replicas"),
    *("nearest", "resolve", "select", "stack", "stack_states", "state", "stream"),
]
