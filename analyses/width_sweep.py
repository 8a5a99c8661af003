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
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

import ticketlab as tl
from analyses.command import Tables, main
from analyses.intervals import interval
from figures.width_sweep import draw
from ticketlab import ntk
from ticketlab.errors import Refused

SLOPES = {"lambda_min": None, "relative_movement": -0.5, "kernel_change": -0.5}
"""What is fitted against width, and what the theory expects; lambda_min settles instead."""


@dataclass(frozen=True)
class Config:
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
    """Networks at each width."""
    out: Path = Path("results")
    """Folder for tables and figures."""

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
    """``widths``: one row a width and seed. ``slopes``: log-log slopes over the widths with intervals."""
    task = tl.load_task(config.task, dtype=torch.float64).limit(train=config.n_examples)
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
    model = tl.initialise(lambda: network(x[0].numel(), width, config.depth), 0).double()
    return float(ntk.spectrum(ntk.kernel(model, tl.state(model).params, x, outputs="sum_logits")).eigenvalues[0])


def _measure(x: Tensor, y: Tensor, width: int, seed: int, rate: float, config: Config) -> dict[str, float]:
    model = tl.initialise(lambda: network(x[0].numel(), width, config.depth), seed).double()
    start = tl.state(model).params
    end, loss = _descend(model, start, x, y, rate, config.steps)
    kernels = [ntk.kernel(model, params, x, outputs="sum_logits") for params in (start, end)]
    moved = sum(float((end[n] - p).square().sum()) for n, p in start.items())
    return {
        "lambda_min": float(ntk.spectrum(kernels[0]).eigenvalues[-1]),
        "relative_movement": math.sqrt(moved / sum(float(p.square().sum()) for p in start.values())),
        "kernel_change": float(ntk.drift(*kernels).relative_change),
        "loss": loss,
    }


def _descend(
    model: nn.Module, start: tl.functional.Params, x: Tensor, y: Tensor, rate: float, steps: int
) -> tuple[tl.functional.Params, float]:
    """Gradient descent on half the sum of squared errors; the loss is that of the last point."""
    params = {name: p.clone().requires_grad_() for name, p in start.items()}
    for _ in range(steps):
        loss = 0.5 * (functional_call(model, params, (x,)) - y).square().sum()
        gradients = torch.autograd.grad(loss, list(params.values()))
        with torch.no_grad():
            for p, g in zip(params.values(), gradients, strict=True):
                p.sub_(g, alpha=rate)
    end = {name: p.detach() for name, p in params.items()}
    return end, float(0.5 * (functional_call(model, end, (x,)) - y).square().sum())


def slopes(table: pd.DataFrame) -> pd.DataFrame:
    """Least squares of log2 on log2 for each seed, their means with 95 % intervals over seeds by Student's t.

    Networks of one seed are drawn from one stream at every width, so that they are no independent observations.
    """
    logs = np.log2(table.pivot(index="width", columns="seed", values=list(SLOPES)))
    rows = []
    for column, expected in SLOPES.items():
        fits = np.polyfit(np.log2(logs.index), logs[column].to_numpy(), 1)  # [slope and intercept, seed]
        about = {"intercept": fits[1].mean(), "theory": expected}
        rows.append({"measure": column, **interval(pd.Series(fits[0]), "slope"), **about})
    return pd.DataFrame(rows).drop(columns="p_value")  # against a slope of 0, which nobody expects


def summary(tables: Tables) -> pd.DataFrame:
    """Slopes with 95 % intervals over n seeds."""
    return tables["slopes"].drop(columns="intercept")


if __name__ == "__main__":
    sys.exit(main("width_sweep", Config, run, draw, summary))
