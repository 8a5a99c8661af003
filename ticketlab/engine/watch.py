"""Evaluation while replicas train: validation curves, the early-stop network, and who is still finite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import nn

from ticketlab.data import Split, Task
from ticketlab.losses import LOSSES
from ticketlab.network import Execution, Network
from ticketlab.shown import as_line, as_table
from ticketlab.state import Masks, State

Row = dict[str, Any]
OnEval = Callable[[int, list[Row]], None]

LIVE, BEST = 0, 1  # of the networks that are looked at

_CURVES = {"replica": "int64", "step": "int64", "loss_nats": "float64", "error": "float64"}


@torch.no_grad()
def put_back(live: State, replicas: Sequence[int], kept: State) -> None:
    """Overwrite these replicas of a stack with those of a smaller one."""
    for part, saved in zip(live, kept, strict=True):
        for name, tensor in part.items():
            tensor[list(replicas)] = saved[name]


@dataclass
class Watch:
    """What is looked at on the way; ``live`` and ``masks`` are those that training moves."""

    model: nn.Module
    live: State
    masks: Masks
    task: Task
    execution: Execution
    on_eval: OnEval | None = None
    rows: list[Row] = field(default_factory=list)

    __repr__, _repr_html_ = as_line, as_table

    def __post_init__(self) -> None:
        replicas = len(next(iter(self.live.params.values())))
        self.alive = list(range(replicas))
        self.last, self.best = self._now(), self.live.clone()
        # Made once, so that what is found out about the forward pass holds for all looks.
        self.nets = [Network(self.model, *state, replicas=replicas) for state in (self.live, self.best)]
        self.best_loss = [math.inf] * replicas
        self.best_step: list[int | None] = [None] * replicas
        self.diverged_step: list[int | None] = [None] * replicas

    def look(self, step: int) -> None:
        """Evaluate on the validation set, keep what is best, and stop who is no longer finite."""
        loss, error = self._evaluate(LIVE, self.task.validation)
        seen: list[Row] = []
        for r in list(self.alive):
            if not math.isfinite(loss[r]):
                self._freeze(r, step)
                continue
            seen.append({"replica": r, "step": step, "loss_nats": loss[r], "error": error[r]})
            if loss[r] < self.best_loss[r]:
                self.best_loss[r], self.best_step[r] = loss[r], step
                put_back(self.best, [r], self.live.select([r]))
        self.last = self._now()
        self.rows += seen
        if self.on_eval is not None:
            self.on_eval(step, [dict(row) for row in seen])

    def check(self, step: int) -> None:
        """Stop replicas whose weights are not finite: between two looks, or from the start."""
        for r in list(self.alive):
            if not all(bool(t[r].isfinite().all()) for t in self.live.params.values()):
                self._freeze(r, step)

    def state(self) -> State:
        """A copy of the networks as they are; of those that have diverged nothing is known, NaN."""
        state = self.live.clone()
        lost = [r for r, step in enumerate(self.diverged_step) if step is not None]
        for tensor in (*state.params.values(), *state.buffers.values()) if lost else ():
            if tensor.is_floating_point():
                tensor[lost] = math.nan
        return state

    def curves(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=list(_CURVES)).astype(_CURVES)

    def metrics(self) -> pd.DataFrame:
        replicas = range(len(self.best_loss))
        steps = {"early_stop_step": self.best_step, "diverged_step": self.diverged_step}
        table = pd.DataFrame({"replica": replicas, **steps}).astype(dict.fromkeys(steps, "Int64"))
        splits = {"train": self.task.train, "validation": self.task.validation, "test": self.task.test}
        for name, split in splits.items():
            table[f"{name}_loss_nats"], table[f"{name}_error"] = self._evaluate(LIVE, split)
        for name in ("validation", "test"):
            if self._ended_best():
                loss, error = table[f"{name}_loss_nats"], table[f"{name}_error"]
            else:
                loss, error = self._evaluate(BEST, splits[name])
            table[f"early_stop_{name}_loss_nats"], table[f"early_stop_{name}_error"] = loss, error
        # A training that diverged has no result, whatever its last finite weights score.
        results = [c for c in table if c.endswith(("_nats", "_error"))]
        table.loc[table["diverged_step"].notna(), [*results, "early_stop_step"]] = math.nan
        return table

    def _ended_best(self) -> bool:
        """Whether every network is its own early-stop network, as is usual under a rate that falls."""
        return all(torch.equal(p, self.best.params[n]) for n, p in self.live.params.items()) and all(
            torch.equal(b, self.best.buffers[n]) for n, b in self.live.buffers.items()
        )

    def _freeze(self, r: int, step: int) -> None:
        live, masks = self.last
        put_back(self.live, [r], live.select([r]))
        for name, mask in masks.items():
            self.masks[name][r] = mask[r]
        self.alive.remove(r)
        self.diverged_step[r] = step
        warnings.warn(
            f"replica {r} is not finite at step {step}: it is frozen at its last finite evaluation and its results are "
            "NaN. Lower the learning rate or warm it up.",
            RuntimeWarning,
            stacklevel=3,
        )

    def _now(self) -> tuple[State, Masks]:
        return self.live.clone(), {name: mask.clone() for name, mask in self.masks.items()}

    def _evaluate(self, which: int, split: Split) -> tuple[list[float], list[float]]:
        loss, error = self.nets[which].evaluate(split.x, split.y, LOSSES[self.task.loss], execution=self.execution)
        return loss.tolist(), error.tolist()
