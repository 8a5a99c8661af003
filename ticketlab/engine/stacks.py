"""The call of version 0.1: ``train`` of a stack of states, masks and seeds in parallel lists, as starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from torch import Tensor

from ticketlab.engine.start import Start
from ticketlab.engine.training import Outcome
from ticketlab.errors import Refused
from ticketlab.state import State, select


def takes_stacks(train: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """``train`` that takes (model, stacked state, stacked masks, task, recipe, order seeds) as well."""

    @wraps(train)
    def either(model: Any, starts: Any, *rest: Any, **options: Any) -> Outcome:
        if isinstance(starts, State):
            masks, task, recipe, order_seeds = rest
            starts, rest = as_starts(starts, masks, order_seeds), (task, recipe)
        return train(model, starts, *rest, **options)

    return either


def as_starts(stacked: State, masks: Mapping[str, Tensor], order_seeds: Any) -> list[Start]:
    """One start per replica of a stack.

    Raises:
        Refused: A number of seeds that differs from that of the replicas.
    """
    replicas = len(next(iter(stacked.params.values())))
    if replicas != len(order_seeds):
        raise Refused(f"order_seeds must be one per replica: got {len(order_seeds)} for {replicas} replicas.")
    return [Start(stacked.select(r), select(masks, r), seed) for r, seed in enumerate(order_seeds)]
