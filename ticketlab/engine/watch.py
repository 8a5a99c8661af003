"""Evaluation while replicas train: validation curves, the early-stop network, and who is still finite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import nn

from ticketlab.data import Split, Task
from ticketlab.functional import Execution, evaluate
from ticketlab.state import Masks, State


@torch.no_grad()
def put_back(live: State, replicas: Sequence[int], kept: State) -> None:
    """Overwrite these replicas of a stack with those of a smaller one."""
    for part, saved in zip(live, kept, strict=True):
        for name, tensor in part.items():
            tensor[list(replicas)] = saved[name]


@dataclass
class Watch:
    """Evaluation during training: validation curves, the early-stop network, and who is still finite."""

    model: nn.Module
    live: State
    masks: Masks
    task: Task
    execution: Execution
    rows: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        replicas = len(next(iter(self.live.params.values())))
        self.alive = list(range(replicas))
        self.last, self.best = self._now(), self.live.clone()
        self.best_loss = [math.inf] * replicas
        self.best_step: list[int | None] = [None] * replicas
        self.diverged_step: list[int | None] = [None] * replicas

    def look(self, step: int) -> None:
        loss, error = self._evaluate(self.live, self.task.validation)
        for r in list(self.alive):
            if not math.isfinite(loss[r]):
                self._freeze(r, step)
                continue
            self.rows.append({"replica": r, "step": step, "loss_nats": loss[r], "error": error[r]})
            if loss[r] < self.best_loss[r]:
                self.best_loss[r], self.best_step[r] = loss[r], step
                put_back(self.best, [r], self.live.select([r]))
        self.last = self._now()

    def metrics(self) -> pd.DataFrame:
        replicas = range(len(self.best_loss))
        steps = {"early_stop_step": self.best_step, "diverged_step": self.diverged_step}
        table = pd.DataFrame({"replica": replicas, **steps}).astype(dict.fromkeys(steps, "Int64"))
        splits = {"train": self.task.train, "validation": self.task.validation, "test": self.task.test}
        for name, split in splits.items():
            table[f"{name}_loss_nats"], table[f"{name}_error"] = self._evaluate(self.live, split)
        for name in ("validation", "test"):
            loss, error = self._evaluate(self.best, splits[name])
            table[f"early_stop_{name}_loss_nats"], table[f"early_stop_{name}_error"] = loss, error
        # A training that diverged has no result, whatever its last finite weights score.
        results = [c for c in table if c.endswith(("_nats", "_error"))]
        table.loc[table["diverged_step"].notna(), results] = math.nan
        return table

    def _freeze(self, r: int, step: int) -> None:
        live, masks = self.last
        put_back(self.live, [r], live.select([r]))
        for name, mask in masks.items():
            self.masks[name][r] = mask[r]
        self.alive.remove(r)
        self.diverged_step[r] = step
        warnings.warn(
            f"replica {r} has a non-finite validation loss at step {step}: it is frozen at its last finite "
            "evaluation and its results are NaN. Lower the learning rate or warm it up.",
            RuntimeWarning,
            stacklevel=3,
        )

    def _now(self) -> tuple[State, Masks]:
        return self.live.clone(), {name: mask.clone() for name, mask in self.masks.items()}

    def _evaluate(self, state: State, split: Split) -> tuple[list[float], list[float]]:
        loss, error = evaluate(
            self.model, state.params, split.x, split.y, buffers=state.buffers, execution=self.execution
        )
        return loss.tolist(), error.tolist()
