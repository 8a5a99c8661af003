"""How a network is found: training with a price on every bit, then descent on the bound, in rounds.

Nothing here needs to be trusted: a bound speaks of the network that was found, whatever way led there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import trange

from examples.certificate.network import (
    HIDDEN_BIAS,
    LARGEST,
    MOST_HIDDEN,
    OUTPUT_BIAS,
    Network,
    lots,
    shapes,
    without_idle_units,
)
from examples.certificate.polish import certified, polish
from ticketlab.errors import Refused
from ticketlab.losses import mean_cross_entropy, probabilities
from ticketlab.seeds import stream

FEATURE_SCALE, SCORE_SCALE = 32.0, 3.0  # of training alone: they make inputs and logits of order 1


@dataclass(frozen=True)
class Training:
    """How to search; none of it is part of the certificate."""

    hidden: int = 24
    """Hidden units at the start; those that end idle are dropped."""
    steps: int = 1500
    """Of the first training; those of later rounds have half as many."""
    rounds: int = 6
    """Trainings, each followed by descent on the bound; from the second on they start at one of the best so far."""
    nats_per_bit: float = 8.0
    """Price of a bit of description, in nats of loss summed over all examples."""
    learning_rate: float = 0.03
    """Of Adam, in steps of the integer grid; falls linearly to 0."""
    power: float = 0.0
    """Of the generalised cross-entropy, from 0, cross-entropy itself, to 1, which is bounded."""
    batch_size: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"hidden": 1, "steps": 1, "rounds": 1, "batch_size": 1, "seed": 0}
        if wrong := {name: getattr(self, name) for name, value in least.items() if getattr(self, name) < value}:
            raise Refused(f"hidden, steps, rounds and batch_size must be at least 1, and seed 0: got {wrong}.")
        if self.hidden > MOST_HIDDEN:
            raise Refused(f"hidden must be at most {MOST_HIDDEN}, the most that the code can write: got {self.hidden}.")
        if not (0 <= self.nats_per_bit < math.inf and 0 < self.learning_rate < math.inf and 0 <= self.power <= 1):
            raise Refused(
                "nats_per_bit must be at least 0, learning_rate above 0, both finite, and power in [0, 1]: got "
                f"{self.nats_per_bit}, {self.learning_rate} and {self.power}."
            )


def search(
    x: NDArray[np.uint8], y: NDArray[np.uint8], settings: Training, delta: float, start: Network | None = None
) -> Network:
    """The network with the smallest bound that was met in all rounds.

    Later rounds start at one of the three best, with settings drawn at random.

    Args:
        x: Features [n, d].
        y: Labels [n].
        settings: Seeded; the same on the same machine.
        delta: Of the bound.
        start: A network to improve; None: begin at random weights.
    """
    draw = np.random.default_rng(settings.seed)
    met = [] if start is None else [(certified(start, x, y, delta)[0], -1, start)]
    progress = trange(settings.rounds, desc="searching", unit="round", disable=None)
    for index in progress:
        start, now = None, settings
        if met:  # go on from there with other settings
            start = met[draw.integers(min(3, len(met)))][2]
            now = replace(
                settings,
                steps=max(1, settings.steps // 2),
                nats_per_bit=settings.nats_per_bit * draw.choice([0.6, 0.8, 1.0]),
                learning_rate=settings.learning_rate * draw.choice([0.3, 0.6, 1.0]),
                power=draw.choice([0.0, 0.3, 0.6]),
                seed=settings.seed + index,
            )
        network = polish(train(x, y, now, start), x, y, sweeps=5, delta=delta, seed=now.seed)
        met = sorted([*met, (certified(network, x, y, delta)[0], index, network)], key=lambda it: it[:2])
        progress.set_postfix_str(f"bound {met[0][0]:.5f}")
    return met[0][2]


def train(x: NDArray[np.uint8], y: NDArray[np.uint8], settings: Training, start: Network | None = None) -> Network:
    """Adam on loss + nats_per_bit / n * description bits, through the rounding, from noise or from a network."""
    draw = stream("certificate", settings.seed)
    if start is None:
        arrays = [0.3 * torch.randn(shape, generator=draw) for shape in shapes(settings.hidden)]
    else:
        arrays = [torch.from_numpy(array).float() for array in start.arrays]
    latent, temperature = [nn.Parameter(array) for array in arrays], nn.Parameter(torch.tensor(0.0))
    optimizer = torch.optim.Adam([{"params": latent}, {"params": [temperature]}], betas=(0.9, 0.99))
    inputs, labels = torch.tensor(x).float() / FEATURE_SCALE, torch.tensor(y).long()
    batches, steps = max(1, len(y) // settings.batch_size), settings.steps
    for step in range(steps):
        if step % batches == 0:
            order = torch.randperm(len(y), generator=draw)
        if step % 50 == 0:
            tables = [prices(lot) for w in latent for lot in lots(w)]
        optimizer.param_groups[0]["lr"] = settings.learning_rate * min(1, step / 100) * (1 - step / steps)
        optimizer.param_groups[1]["lr"] = 0.01 * (1 - step / steps)
        batch = order[step % batches * settings.batch_size :][: settings.batch_size]
        loss = generalised_cross_entropy(
            temperature.exp() * _logits(latent, inputs[batch]), labels[batch], settings.power
        )
        price = settings.nats_per_bit / len(y) * (1.0 if start is not None else min(1.0, 5 * step / steps))
        parts = [lot for w in latent for lot in lots(w)]
        bits = sum(description_bits(part, table) for part, table in zip(parts, tables, strict=True))
        (loss + price * bits).backward()
        optimizer.step()
        optimizer.zero_grad()
    return without_idle_units(Network(*(_rounded(w.detach()).numpy().astype(np.int64) for w in latent)))


def _rounded(w: Tensor) -> Tensor:
    """The nearest integers in -7..7."""
    return w.round().clamp(-LARGEST, LARGEST)


def _logits(latent: list[nn.Parameter], x: Tensor) -> Tensor:
    """The scores of the rounded network, scaled; the gradient passes the rounding as if it were not there."""
    weights, hidden_bias, output, output_bias = (w + (_rounded(w) - w).detach() for w in latent)
    hidden = F.relu(F.linear(x, weights, HIDDEN_BIAS / FEATURE_SCALE * hidden_bias)) * FEATURE_SCALE / OUTPUT_BIAS
    return F.linear(hidden, output, output_bias) / SCORE_SCALE


def generalised_cross_entropy(logits: Tensor, y: Tensor, power: float) -> Tensor:
    """Mean of (1 - p_y^q) / q, which tends to -ln p_y as the power q does to 0 (Zhang & Sabuncu 2018)."""
    if power == 0:
        return mean_cross_entropy(logits, y)
    own = probabilities(logits).gather(1, y[:, None]).clamp(min=1e-6)
    return (1 - own**power).mean() / power


def prices(w: Tensor) -> Tensor:
    """Bits of a weight of size 0, 1, ... 7, at the frequencies of sizes in w: [8]."""
    counts = torch.bincount(_rounded(w.detach()).abs().long().flatten(), minlength=LARGEST + 1)
    tails = counts.flip(0).cumsum(0).flip(0)
    ends = (counts + 0.5) / (tails + 1.0)  # of the sizes that come so far, those that end here
    ends[-1] = 1.0  # nothing is larger
    onward = -(1 - ends[:-1]).log2().cumsum(0)
    bits = torch.cat([torch.zeros(1), onward]) - ends.log2()
    return bits + (torch.arange(LARGEST + 1) > 0)  # the sign


def description_bits(w: Tensor, table: Tensor) -> Tensor:
    """The prices of latent weights, interpolated between integers."""
    size = w.abs().clamp(max=LARGEST - 1e-3)
    low = size.floor().long()
    return (table[low] + (size - low) * (table[low + 1] - table[low])).sum()
