"""Seconds for Jacobian statistics of 256 inputs, against the plain loop over inputs.

(a) plain: ``torch.autograd.functional.jacobian`` of the module at one input after another, and the singular values
of each. (b) exact: ``signal.jacobian_singular_values``, the same numbers. (c) stochastic: ``signal.jacobian_moments``,
the mean squared singular value alone, with its standard error, from four probes.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch

import ticketlab as tl
from benchmarks.timing import alternate, command, hardware, median_ratio, report
from ticketlab.models import build

INPUTS = {"lenet_300_100": (1, 28, 28), "conv_2": (3, 32, 32)}
N_PROBES = 4


@dataclass(frozen=True)
class Config:
    """Time Jacobian statistics of LeNet-300-100 and Conv-2 on random inputs of MNIST's and CIFAR's shapes."""

    models: tuple[str, ...] = ("lenet_300_100", "conv_2")
    """Of these two."""
    n_inputs: int = 256
    """Jacobians in each timing."""
    rounds: int = 5
    """Alternations; medians are over these."""
    device: str = "cpu"
    """Where."""
    out: Path | None = None
    """Write the table to this CSV file too."""


def plain(net: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The loop that one writes first."""
    rows = [torch.autograd.functional.jacobian(net, one) for one in x.split(1)]
    return torch.stack([torch.linalg.svdvals(row.flatten(2)[0].flatten(1)) for row in rows])


def run(config: Config) -> pd.DataFrame:
    """one row per model and contestant, medians over rounds."""
    return pd.concat([_one_model(config, name) for name in config.models], ignore_index=True)


def _one_model(config: Config, name: str) -> pd.DataFrame:
    net = tl.initialise(lambda: build(name, INPUTS[name], 10), 0).to(config.device).eval()
    state = tl.state(net)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(config.n_inputs, *INPUTS[name], generator=generator).to(config.device)
    torch.testing.assert_close(plain(net, x[:4]), tl.signal.jacobian_singular_values(net, state, x[:4]))
    contestants: dict[str, Callable[[], object]] = {
        "plain": partial(plain, net, x),
        "exact": partial(tl.signal.jacobian_singular_values, net, state, x),
        "stochastic": partial(tl.signal.jacobian_moments, net, state, x, n_moments=1, n_probes=N_PROBES),
    }
    seconds = alternate(contestants, config.rounds)  # type: ignore[arg-type]
    rows = [
        {
            "model": name,
            "n_inputs": config.n_inputs,
            "contestant": contestant,
            "seconds": statistics.median(timed),
            "times_faster_than_plain": median_ratio(seconds["plain"], timed),
            "n_rounds": config.rounds,
            "hardware": hardware(),
        }
        for contestant, timed in seconds.items()
    ]
    return pd.DataFrame(rows)


def main(config: Config) -> int:
    return report(run(config), "seconds", config.out)


if __name__ == "__main__":
    sys.exit(command("signal", Config, main))
