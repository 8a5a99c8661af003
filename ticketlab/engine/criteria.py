"""Pruning criteria: a score for every prunable weight, higher = keep.

Each is a function of the trained network, of where it started and of a seed; ``CRITERIA`` names them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ticketlab.functional import Masks, Params, stream

Scores = dict[str, Tensor]


def magnitude(masks: Masks, theta_start: Params, theta_end: Params, seed: int) -> Scores:
    """|theta_T| (Han et al. 2015; Frankle & Carbin 2019)."""
    return {name: theta_end[name].abs() for name in masks}


def random(masks: Masks, theta_start: Params, theta_end: Params, seed: int) -> Scores:
    """Uniform noise: the control that every criterion has to beat."""
    return {
        name: torch.rand(mask.shape, dtype=torch.float64, generator=stream(f"random score {name}", seed)).to(
            mask.device
        )
        for name, mask in masks.items()
    }


CRITERIA: dict[str, Callable[[Masks, Params, Params, int], Scores]] = {"magnitude": magnitude, "random": random}
