"""What is trained: one replica."""

from __future__ import annotations

from dataclasses import dataclass

from ticketlab import masks as mask_ops
from ticketlab.engine.dynamic.moves import Dynamics
from ticketlab.shown import as_line, as_table
from ticketlab.state import Masks, State


@dataclass(frozen=True)
class Start:
    """What is trained: one replica."""

    state: State
    """Parameters and buffers of one network, on the task's device."""
    masks: Masks
    """True = trained; empty: nothing is pruned."""
    order_seed: int
    """Seed of the batch order."""
    frozen: bool = False
    """Pruned weights keep the values in ``state`` and count in the forward pass; otherwise they are zero."""
    learning_rate: float | None = None
    """Constant rate in place of the recipe's schedule."""
    dynamics: Dynamics | None = None
    """How the mask moves in training (RigL, SET, gradual pruning); None: it stays."""

    __repr__, _repr_html_ = as_line, as_table

    @property
    def begun(self) -> State:
        """What is trained from: pruned weights zero, unless they are frozen at their values."""
        return self.state if self.frozen else State(mask_ops.masked(self.state.params, self.masks), self.state.buffers)

    @property
    def apart(self) -> bool:
        """Whether it needs an optimizer of its own."""
        return self.learning_rate is not None or self.dynamics is not None
