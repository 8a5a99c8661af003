"""How one network is trained: optimizer, schedule, batch size, steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ticketlab.errors import Refused, nearest

Optimizers = Literal["adam", "adamw", "sgd"]
Schedules = Literal["constant", "step", "cosine"]


@dataclass(frozen=True)
class Recipe:
    """How one network is trained. The defaults are Frankle & Carbin's for LeNet-300-100, shortened."""

    steps: int = 5000
    """T, the optimizer steps of a full training."""
    batch_size: int = 60
    """Examples a step."""
    optimizer: Optimizers = "adam"
    """From torch.optim."""
    learning_rate: float = 1.2e-3
    """Peak learning rate."""
    momentum: float = 0.9
    """Of SGD alone."""
    nesterov: bool = False
    """Of SGD alone."""
    weight_decay: float = 0.0
    """L2 for sgd and adam, decoupled for adamw."""
    schedule: Schedules = "constant"
    """How the learning rate falls: not at all, at the milestones, or to zero at T."""
    milestones: tuple[int, ...] = ()
    """Steps at which the step schedule multiplies the rate by `decay`."""
    decay: float = 0.1
    """Factor of the step schedule."""
    warmup_steps: int = 0
    """Steps of a linear rise to the peak, under any schedule."""
    eval_every: int = 100
    """Steps between two looks at the validation set, the resolution of the early-stop step."""

    def __post_init__(self) -> None:
        for kind, given, known in (("optimizer", self.optimizer, Optimizers), ("schedule", self.schedule, Schedules)):
            if given not in get_args(known):
                raise Refused(nearest(kind, given, get_args(known)))
        checks = {
            "steps must be at least 1": self.steps >= 1,
            "batch_size must be at least 1": self.batch_size >= 1,
            "eval_every must be at least 1": self.eval_every >= 1,
            "learning_rate must be positive and finite": 0 < self.learning_rate < math.inf,
            "momentum must lie in [0, 1)": 0 <= self.momentum < 1,
            "nesterov needs a momentum above 0": not self.nesterov or self.momentum > 0,
            "momentum and nesterov belong to optimizer 'sgd'": self.optimizer == "sgd"
            or (self.momentum == 0.9 and not self.nesterov),
            "schedule 'step' needs milestones": self.schedule != "step" or bool(self.milestones),
            "weight_decay must be at least 0 and finite": 0 <= self.weight_decay < math.inf,
            "decay must lie in (0, 1]": 0 < self.decay <= 1,
            "decay belongs to schedule 'step'": self.decay == 0.1 or self.schedule == "step",
            "warmup_steps must lie in [0, steps]": 0 <= self.warmup_steps <= self.steps,
            "milestones must rise and lie in (0, steps)": list(self.milestones) == sorted(set(self.milestones))
            and all(0 < m < self.steps for m in self.milestones),
            "milestones belong to schedule 'step'": not self.milestones or self.schedule == "step",
        }
        for rule, holds in checks.items():
            if not holds:
                raise Refused(f"{rule}: got {self}.")

    def learning_rate_at(self, step: int) -> float:
        """The rate that the 0-based ``step`` is taken with."""
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        fall = 1.0
        if self.schedule == "step":
            fall = self.decay ** sum(step >= m for m in self.milestones)
        elif self.schedule == "cosine":
            fall = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * rise * fall
