"""When a mask moves and where to: pure functions of one layer's mask, weights and gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ticketlab import masks as mask_ops
from ticketlab.errors import Refused, nearest
from ticketlab.seeds import stream

Growth = Literal["gradient", "random"]


@dataclass(frozen=True)
class DropGrow:
    r"""Drop the weakest connections of each layer and grow as many others: RigL and SET.

    .. math:: k_l = \lfloor n_l \frac{\alpha}{2} (1 + \cos \frac{\pi t}{T_{end}}) \rfloor

    of a layer's :math:`n_l` live weights go, those of least magnitude, and k_l of the connections that do not stay
    become live: RigL (Evci et al. 2020, algorithm 1) those with the largest dense gradient, SET (Mocanu et al. 2018)
    random ones. What was dropped just now may be chosen again and then keeps its weight, as in RigL's own code.
    The number of live weights of each layer is constant.
    """

    growth: Growth = "gradient"
    """By gradient: RigL; at random: SET."""
    every: int = 100
    """Steps between two updates."""
    until: float = 0.75
    """T_end, after which the mask stays, as a share of training."""
    drop_fraction: float = 0.3
    """alpha, the share of a layer's live weights that goes at first."""
    seed: int = 0
    """Seed of random growth."""

    def __post_init__(self) -> None:
        if self.growth not in get_args(Growth):
            raise Refused(nearest("growth", self.growth, get_args(Growth)))
        if not 0 < self.drop_fraction < 1:
            raise Refused(f"drop_fraction must lie in (0, 1): got {self.drop_fraction}.")
        _check_schedule(self.every, self.until)

    def update_steps(self, steps: int) -> range:
        """The steps, of ``steps``, that are updates instead."""
        return _updates(self.every, self.until, steps)

    def drop_fraction_at(self, step: int, steps: int) -> float:
        """The share of a layer's live weights that an update at ``step`` drops."""
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * step / (self.until * steps)))

    def next_mask(
        self,
        name: str,
        mask: Bool[Tensor, "*weight"],
        weight: Float[Tensor, "*weight"],
        gradient: Float[Tensor, "*weight"],
        step: int,
        steps: int,
    ) -> Bool[Tensor, "*weight"]:
        """The mask of layer ``name`` after an update; ``gradient`` is that of all weights, dead ones too."""
        live = int(mask.sum())
        n_drop = math.floor(live * self.drop_fraction_at(step, steps))
        stays = mask_ops.top(weight.abs(), mask, live - n_drop)
        if self.growth == "gradient":
            return stays | mask_ops.top(gradient.abs(), ~stays, n_drop)
        score = torch.rand(mask.shape, generator=stream(f"grow {name}", self.seed, step), dtype=torch.float64)
        return stays | mask_ops.top(score.to(mask.device), ~stays, n_drop)


@dataclass(frozen=True)
class Gradual:
    r"""Gradual magnitude pruning from dense to given counts (Zhu & Gupta 2017, eq. 1, from t_0 = 0 and s_i = 0).

    .. math:: n_l(t) = n_l + (N_l - n_l) (1 - t / t_{last})^3

    The weights of least magnitude of each layer go, at each update as many as bring it to n_l(t).
    """

    kept: Mapping[str, int]
    """Live weights of each layer after the last update, such as ``layer_counts(...)``."""
    every: int = 100
    """Steps between two updates."""
    until: float = 0.75
    """No update after this share of training."""

    def __post_init__(self) -> None:
        if min(self.kept.values(), default=0) < 0 or not any(self.kept.values()):
            raise Refused(f"kept must be counts, some above 0: got {dict(self.kept)}. Take layer_counts(...).")
        _check_schedule(self.every, self.until)

    def update_steps(self, steps: int) -> range:
        """The steps, of ``steps``, that are updates instead."""
        return _updates(self.every, self.until, steps)

    def kept_at(self, name: str, size: int, step: int, steps: int) -> int:
        """Live weights of a layer of ``size`` weights when ``step`` is taken, an update at it included."""
        updates = self.update_steps(steps)
        done = min(step // self.every, len(updates)) / len(updates)
        return self.kept[name] + math.floor((size - self.kept[name]) * (1 - done) ** 3 + 0.5)

    def next_mask(
        self,
        name: str,
        mask: Bool[Tensor, "*weight"],
        weight: Float[Tensor, "*weight"],
        gradient: Float[Tensor, "*weight"],
        step: int,
        steps: int,
    ) -> Bool[Tensor, "*weight"]:
        """The mask of layer ``name`` after an update, nested in the one before; ``gradient`` is not looked at."""
        return mask_ops.top(weight.abs(), mask, self.kept_at(name, mask.numel(), step, steps))


Dynamics = DropGrow | Gradual


def validate(dynamics: Dynamics, masks: Mapping[str, Tensor], steps: int) -> None:
    """Refuse ``dynamics`` that cannot move the masks of one network in a training of ``steps`` steps."""
    if not masks:
        raise Refused("a mask that moves must be there: got none. Pass masks, such as dynamic.sparse_masks(...).")
    if not dynamics.update_steps(steps):
        raise Refused(
            f"there must be an update before {dynamics.until} of {steps} steps: got one every {dynamics.every} steps. "
            "Update more often, or train longer."
        )
    if isinstance(dynamics, Gradual):
        if set(dynamics.kept) != set(masks):
            raise Refused(f"kept must name every masked layer: got {sorted(dynamics.kept)} for {sorted(masks)}.")
        above = {n: k for n, k in dynamics.kept.items() if k > masks[n].numel()}
        if above:
            sizes = {n: masks[n].numel() for n in above}
            raise Refused(f"kept must be at most the size of each layer, {sizes}: got {above}.")
        if not all(bool(mask.all()) for mask in masks.values()):
            raise Refused("gradual pruning starts dense: got masks with pruned weights. Start from masks.ones.")


def _check_schedule(every: int, until: float) -> None:
    if every < 2:
        raise Refused(f"every must be at least 2 steps, for an update takes the place of a descent: got {every}.")
    if not 0 < until <= 1:
        raise Refused(f"until, a share of training, must lie in (0, 1]: got {until}.")


def _updates(every: int, until: float, steps: int) -> range:
    last = min(math.floor(until * steps + 1e-9), steps - 1)
    return range(every, last + 1, every)
