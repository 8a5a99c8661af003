"""How one network is trained: optimizer, schedule, batch size, steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor
from torch.optim import Optimizer

from ticketlab.errors import Refused, check_fields, nearest

Optimizers = Literal["adam", "adamw", "sgd"]
Schedules = Literal["constant", "step", "cosine", "linear", "triangular", "one_cycle"]
Precisions = Literal["float32", "tf32", "bfloat16"]

if TYPE_CHECKING:
    OptimizerChoice = Optimizers | Callable[[list[Tensor]], Optimizer]
    ScheduleChoice = Schedules | Callable[[int], float]
else:  # a command line is made of these, and can give names alone
    OptimizerChoice, ScheduleChoice = Optimizers, Schedules

OWN = "own:"
"""What the name of a user's own optimizer or schedule is stored behind."""


@dataclass(frozen=True)
class Recipe:
    """How one network is trained. The defaults are Frankle & Carbin's for LeNet-300-100, shortened."""

    steps: int = 5000
    """Optimizer steps of a full training, T."""
    batch_size: int = 60
    """Examples per step."""
    optimizer: OptimizerChoice = "adam"
    """Optimizer of torch.optim; in Python also a function of your own, list of parameters -> torch.optim.Optimizer.

    An optimizer of your own gets the rate of the schedule in all its groups, has a weight decay of its own, and must be
    a function of its parameters and their gradients. Pruned weights are put back after each of its steps.
    """
    learning_rate: float = 1.2e-3
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of sgd; other optimizers have none."""
    nesterov: bool = False
    """Nesterov's form of the momentum, for sgd."""
    weight_decay: float = 0.0
    """Weight decay: L2 for sgd and adam, decoupled for adamw."""
    schedule: ScheduleChoice = "constant"
    """Course of the learning rate by name; in Python also a function of your own, step -> rate.

    constant stays at the peak; step falls by the factor `decay` at every milestone; cosine and linear fall to 0 at T,
    along half a cosine or a line; triangular rises over the warm-up and falls along a line to 0; one_cycle is PyTorch's
    OneCycleLR. Formulas: ``Recipe.learning_rate_at``.
    """
    milestones: tuple[int, ...] = ()
    """Steps at which the step schedule multiplies the rate by `decay`."""
    decay: float = 0.1
    """Factor of the step schedule."""
    warmup_steps: int = 0
    """Steps of a linear rise to the peak, under any schedule that has no rise of its own."""
    eval_every: int = 100
    """Steps between two looks at the validation set, the resolution of the early-stop step."""
    decay_all: bool = True
    """Weight decay of every parameter; otherwise norms and biases have none, as in BERT, ViT and many residual nets."""
    label_smoothing: float = 0.0
    """Share of the uniform distribution in the labels that are trained on; evaluation is of the plain loss."""
    clip_norm: float | None = None
    """Largest norm of a network's whole gradient, pruned weights left out; a longer one is scaled down to it."""
    precision: Precisions = "float32"
    """Precision of a training step's products: float32 (the weights' own dtype, without TF32), tf32 or bfloat16.

    bfloat16 is torch.autocast of the forward pass: weights, gradients, optimizer state and the loss stay float32. tf32
    exists on CUDA devices. Evaluation, as every measure, is in true float32, however a network was trained.
    """

    def __post_init__(self) -> None:
        check_fields(self)
        named = (
            ("optimizer", self.optimizer, Optimizers),
            ("schedule", self.schedule, Schedules),
            ("precision", self.precision, Precisions),
        )
        for kind, given, known in named:
            if not callable(given) and given not in get_args(known):
                raise Refused(nearest(kind, given, get_args(known)))
        for rule, holds in (self._ranges() | self._belongings()).items():
            if not holds:
                raise Refused(f"{rule}: got {self}.")
        if callable(self.schedule) and not isinstance(self.schedule, Elsewhere):
            for step in (0, self.steps - 1):
                self.learning_rate_at(step)

    def _ranges(self) -> dict[str, bool]:
        """What each number must be by itself."""
        return {
            "steps must lie in [1, 10^9], or training has no end": 1 <= self.steps <= 10**9,
            "batch_size must be at least 1": self.batch_size >= 1,
            "eval_every must be at least 1": self.eval_every >= 1,
            "learning_rate must be positive and finite": 0 < self.learning_rate < math.inf,
            "momentum must lie in [0, 1)": 0 <= self.momentum < 1,
            "weight_decay must be at least 0 and finite": 0 <= self.weight_decay < math.inf,
            "decay must lie in (0, 1]": 0 < self.decay <= 1,
            "warmup_steps must lie in [0, steps]": 0 <= self.warmup_steps <= self.steps,
            "milestones must rise and lie in (0, steps)": list(self.milestones) == sorted(set(self.milestones))
            and all(0 < m < self.steps for m in self.milestones),
            "label_smoothing must lie in [0, 1)": 0 <= self.label_smoothing < 1,
            "clip_norm must be positive and finite, or None": self.clip_norm is None or 0 < self.clip_norm < math.inf,
        }

    def _belongings(self) -> dict[str, bool]:
        """What needs what, so that no flag does nothing."""
        rises = callable(self.schedule) or self.schedule == "one_cycle"
        return {
            "nesterov needs a momentum above 0": not self.nesterov or self.momentum > 0,
            "momentum and nesterov belong to optimizer 'sgd'": self.optimizer == "sgd"
            or (self.momentum == 0.9 and not self.nesterov),
            "an optimizer of your own has a weight decay of its own, leave weight_decay at 0": self.weight_decay == 0
            or not callable(self.optimizer),
            "decay_all=False needs a weight_decay above 0": self.decay_all or self.weight_decay > 0,
            "schedule 'step' needs milestones": self.schedule != "step" or bool(self.milestones),
            "decay belongs to schedule 'step'": self.decay == 0.1 or self.schedule == "step",
            "milestones belong to schedule 'step'": not self.milestones or self.schedule == "step",
            "schedule 'triangular' needs warmup_steps, its rise": self.schedule != "triangular"
            or self.warmup_steps > 0,
            "schedule 'one_cycle' needs 4 steps at least": self.schedule != "one_cycle" or self.steps >= 4,
            "schedule 'one_cycle' and one of your own have a rise of their own, leave warmup_steps at 0": not rises
            or self.warmup_steps == 0,
            "a schedule of your own gives the rates, leave learning_rate at its default": self.learning_rate == 1.2e-3
            or not callable(self.schedule),
        }

    def learning_rate_at(self, step: int) -> float:
        r"""The rate that the 0-based ``step`` t of T is taken with; w are the steps of the warm-up.

        The peak times :math:`\min(1, (t + 1) / w)` times

        - ``constant``: 1; ``step``: `decay` for each milestone reached; ``cosine``: :math:`(1 + \cos(\pi t / T)) / 2`
          (Loshchilov & Hutter 2017, without restarts);
        - ``linear``: :math:`1 - t / T` (Devlin et al. 2019, whose fall too counts the steps of the warm-up);
        - ``triangular``: 1 up to the warm-up's end, then :math:`(T - t) / (T - w)`, so that nothing jumps (Howard &
          Ruder 2018; with transformers, the linear schedule with warm-up).

        ``one_cycle`` goes along half a cosine from 1/25 of the peak at step 0 up to the peak at 0.3 T - 1, and along
        another down to 1/250,000 of it at T - 1: Smith & Topin 2019 as in ``torch.optim.lr_scheduler.OneCycleLR`` at
        its defaults; the momentum stays.

        Raises:
            Refused: A schedule of a user's own that gives no rate.
        """
        if callable(self.schedule):
            return _own_rate(self.schedule, step)
        if self.schedule == "one_cycle":
            return self.learning_rate * _one_cycle(step, self.steps)
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        fall = 1.0
        if self.schedule == "step":
            fall = self.decay ** sum(step >= m for m in self.milestones)
        elif self.schedule == "cosine":
            fall = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        elif self.schedule == "linear":
            fall = 1 - step / self.steps
        elif self.schedule == "triangular" and step >= self.warmup_steps:
            fall = (self.steps - step) / (self.steps - self.warmup_steps)
        return self.learning_rate * rise * fall


class Elsewhere:
    """A user's own optimizer or schedule, of which a stored run knows the name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return OWN + self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Elsewhere) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __call__(self, *_: Any) -> Any:
        raise Refused(
            f"{self.name!r} is an optimizer or schedule of a user's own, and a stored run keeps its name alone. Put "
            "the function into the recipe again, with dataclasses.replace."
        )


def own_name(function: Callable[..., Any]) -> str:
    """What a user's own optimizer or schedule is called in a stored run."""
    return function.name if isinstance(function, Elsewhere) else getattr(function, "__name__", type(function).__name__)


def _own_rate(schedule: Callable[[int], float], step: int) -> float:
    if isinstance(schedule, Elsewhere):
        return schedule(step)
    try:
        rate = float(schedule(step))
    except Exception as error:  # whatever a function of a user's own raises
        why = f"{type(error).__name__}: {error}"
        raise Refused(f"a schedule must return the rate of a step: {own_name(schedule)}({step}): {why}.") from error
    if not 0 <= rate < math.inf:
        raise Refused(f"a schedule must give rates at least 0 and finite: got {rate} of {own_name(schedule)}({step}).")
    return rate


def _one_cycle(step: int, steps: int) -> float:
    peak = 0.3 * steps - 1
    low, high, share = (
        (1 / 25, 1.0, step / peak) if step <= peak else (1.0, 1 / 25 / 1e4, (step - peak) / (steps - 1 - peak))
    )
    return high + (low - high) / 2 * (1 + math.cos(math.pi * share))
