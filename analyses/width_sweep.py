"""How a network approaches its kernel as it widens: the signature of over-parameterisation.

Fully connected ReLU networks under NTK scaling (weights N(0, 1), each layer times sqrt(2 / fan-in)) regress the parity
of the bundled digits by full-batch gradient descent, at every width for the same time. The theory (Du et al. 2019;
Allen-Zhu et al. 2019): lambda_min of the kernel settles above 0; the relative movement of the weights and the relative
change of the kernel fall as width^(-1/2) (the kernel's between -1/2 and -1).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import ticketlab as tl
from analyses.command import Places, Tables, device_of, main
from analyses.intervals import interval
from figures.width_sweep import draw
from ticketlab import ntk
from ticketlab.errors import Refused

SLOPES = {"lambda_min": None, "relative_movement": -0.5, "kernel_change": -0.5}
"""What is fitted against width, and what the theory expects; lambda_min settles instead."""


@dataclass(frozen=True)
class Config(Places):
    """lambda_min, movement of the weights and change of the kernel against width, under NTK scaling."""

    task: str = "digits"
    """Data set; the parity of its labels is regressed."""
    widths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    """Units of each hidden layer."""
    depth: int = 1
    """Hidden layers."""
    n_examples: int = 64
    """Training examples."""
    steps: int = 1000
    """Gradient descent steps at half the largest stable rate of the widest kernel."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the weights; one network per width and seed."""

    def __post_init__(self) -> None:
        if min(self.widths) < 1 or len(set(self.widths)) < 3:
            raise Refused(f"widths must be at least three different numbers of units: got {self.widths}.")
        if min(self.depth, self.n_examples, self.steps) < 1 or not self.seeds:
            raise Refused("depth, n_examples, steps and the number of seeds must be at least 1.")


class NtkLinear(nn.Module):
    """x W' sqrt(gain / fan_in), with W from N(0, 1): the parametrisation in which the kernel has a limit."""

    def __init__(self, fan_in: int, units: int, gain: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(units, fan_in))
        self.scale = math.sqrt(gain / fan_in)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale)


def network(inputs: int, width: int, depth: int) -> nn.Module:
    """``depth`` hidden ReLU layers and one output."""
    sizes = [inputs, *[width] * depth]
    hidden = [part for a, b in pairwise(sizes) for part in (NtkLinear(a, b, 2.0), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, NtkLinear(width, 1, 1.0))


def run(config: Config) -> Tables:
    """``widths``: one row per width and seed. ``slopes``: log-log slopes over the widths with intervals."""
    task = tl.load_task(config.task, dtype=torch.float64, device=device_of(config)).limit(train=config.n_examples)
    x, y = task.train.x, (task.train.y % 2).double()[:, None] * 2 - 1
    x = x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * math.sqrt(x[0].numel())  # unit mean square
    rows = []
    jobs = [(width, seed) for width in config.widths for seed in config.seeds]
    rate = 0.5 * 2 / _largest(x, max(config.widths), config)
    for width, seed in tqdm(jobs, desc="widths", unit="network", disable=None):
        rows.append({"width": width, "seed": seed, **_measure(x, y, width, seed, rate, config)})
    table = pd.DataFrame(rows).assign(task=config.task, depth=config.depth, n_examples=len(x), steps=config.steps)
    return {"widths": table, "slopes": slopes(table)}


def _largest(x: Tensor, width: int, config: Config) -> float:
    model = _network(x, width, config.depth, 0)
    return float(ntk.spectrum(ntk.kernel(model, tl.state(model), x, outputs="sum_logits")).eigenvalues[0])


def _measure(x: Tensor, y: Tensor, width: int, seed: int, rate: float, config: Config) -> dict[str, float]:
    model = _network(x, width, config.depth, seed)
    start = tl.state(model)
    kernel = ntk.kernel(model, start, x, outputs="sum_logits")
    measured = {"lambda_min": float(ntk.spectrum(kernel).eigenvalues[-1]), "loss": _descend(model, x, y, rate, config)}
    if not math.isfinite(measured["loss"]):
        return measured | dict.fromkeys(("relative_movement", "kernel_change"), math.nan)
    end = tl.state(model)
    moved = sum(float((end.params[n] - p).square().sum()) for n, p in start.params.items())
    size = sum(float(p.square().sum()) for p in start.params.values())
    change = ntk.drift(kernel, ntk.kernel(model, end, x, outputs="sum_logits")).relative_change
    return measured | {"relative_movement": math.sqrt(moved / size), "kernel_change": float(change)}


def _network(x: Tensor, width: int, depth: int, seed: int) -> nn.Module:
    return tl.initialise(lambda: network(x[0].numel(), width, depth), seed).to(x.device, x.dtype)


def _descend(model: nn.Module, x: Tensor, y: Tensor, rate: float, config: Config) -> float:
    """Gradient descent on half the sum of squared errors; the loss is that of the last point."""
    params = list(model.parameters())
    for _ in range(config.steps):
        gradients = torch.autograd.grad(0.5 * (model(x) - y).square().sum(), params)
        with torch.no_grad():
            for p, g in zip(params, gradients, strict=True):
                p.sub_(g, alpha=rate)
    with torch.no_grad():
        return float(0.5 * (model(x) - y).square().sum())


def slopes(table: pd.DataFrame) -> pd.DataFrame:
    """Least squares of log2 on log2 for each seed, their means with 95 % intervals over seeds by Student's t.

    Networks of one seed are drawn from one stream at every width, so that they are no independent observations.
    """
    logs = np.log2(table.pivot(index="width", columns="seed", values=list(SLOPES)))
    rows = []
    for column, expected in SLOPES.items():
        known = logs[column].dropna(axis=1)  # seeds that diverged at no width
        fits = np.polyfit(np.log2(logs.index), known.to_numpy(), 1)  # [slope and intercept, seed]
        about = {"intercept": fits[1].mean(), "theory": expected}
        rows.append({"measure": column, **interval(pd.Series(fits[0]), "slope"), **about})
    return pd.DataFrame(rows).drop(columns="p_value")  # against a slope of 0, which nobody expects


def summary(tables: Tables) -> pd.DataFrame:
    """Slopes with 95 % intervals over n seeds."""
    return tables["slopes"].drop(columns="intercept").set_index("measure")


if __name__ == "__main__":
    sys.exit(main("width_sweep", Config, run, draw, summary))
