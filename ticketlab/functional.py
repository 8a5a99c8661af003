"""Names of version 0.1: what was here stands in ``network``, ``masks``, ``state``, ``seeds`` and ``errors`` now."""

from __future__ import annotations

from ticketlab.errors import nearest
from ticketlab.masks import masked
from ticketlab.network import Execution, apply, evaluate, n_replicas, resolve
from ticketlab.seeds import initialise, stream
from ticketlab.state import Buffers, Masks, Params, State, select, stack, stack_states, state

__all__ = [
    "Buffers",
    "Execution",
    "Masks",
    "Params",
    "State",
    "apply",
    "evaluate",
    "initialise",
    "masked",
    "n_replicas",
    "nearest",
    "resolve",
    "select",
    "stack",
    "stack_states",
    "state",
    "stream",
]
