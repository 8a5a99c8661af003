"""All measures of a ResNet's kernel without forming it: seconds and peak memory, one after another in one process.

ResNet-20, random inputs of CIFAR-10's shape, a random mask. "rows" is the exact trace, with which the rows of the live
Jacobian are made and kept where they fit; all later measures multiply with them. "product" is one vector by two
backward passes per block, before there are rows. Peak memory is the process's so far, of everything in it.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

import ticketlab as tl
from benchmarks.timing import command, hardware, report
from ticketlab import ntk


@dataclass(frozen=True)
class Config:
    """Time every measure of ntk.operator once."""

    model: str = "resnet_20"
    """Name in ticketlab.models."""
    examples: int = 1000
    """N."""
    density: float = 0.1
    """Of the mask, at random."""
    top: int = 10
    """Eigenvalues."""
    n_probes: int = 64
    """Of each estimate."""
    keep_bytes: int = 2**31
    """Rows are kept where they take no more; 0: made again for every product with several vectors."""
    other: bool = True
    """Align with the kernel at half of the mask too, whose rows are made for it and kept as well."""
    out: Path | None = None
    """Write the table to this CSV file too."""


def operators(config: Config) -> tuple[ntk.KernelOperator, ntk.KernelOperator]:
    """The network at a random mask, and at half of it."""
    model = tl.initialise(lambda: tl.models.build(config.model, (3, 32, 32), 10), 0).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(config.examples, 3, 32, 32, generator=generator)
    masks = {n: torch.rand(m.shape, generator=generator) < config.density for n, m in tl.masks.ones(model).items()}
    halves = {n: m & (torch.rand(m.shape, generator=generator) < 0.5) for n, m in masks.items()}
    one, other = (
        ntk.operator(model, tl.state(model), x, masks=some, keep_bytes=config.keep_bytes) for some in (masks, halves)
    )
    return one, other


def measures(config: Config) -> dict[str, Callable[[], ntk.Estimate]]:
    """By name, in the order in which they are timed."""
    one, other = operators(config)
    how = {"n_probes": config.n_probes}
    y = torch.arange(config.examples) % 10
    vector = torch.ones(one.size)
    exact = torch.zeros(())
    found: dict[str, Callable[[], ntk.Estimate]] = {
        "product": lambda: ntk.Estimate(vector @ one.product(vector), exact),
        "rows": one.trace,
        "trace, estimated": lambda: one.trace(**how),
        "frobenius": lambda: one.frobenius(**how),
        "participation_ratio": lambda: one.participation_ratio(**how),
        "effective_rank": lambda: one.effective_rank(**how),
        "alignment with targets": lambda: one.alignment(y, **how),
        f"top {config.top}": lambda: ntk.Estimate(one.top(config.top).values[0], exact),
    }
    if config.other:
        found["alignment with half of the mask"] = lambda: one.alignment(other, **how)
    return found


def run(config: Config) -> pd.DataFrame:
    """One row per measure."""
    table = []
    for name, measure in measures(config).items():
        began = time.perf_counter()
        found = measure()
        table.append(
            {
                "model": config.model,
                "n": config.examples,
                "density": config.density,
                "n_probes": config.n_probes,
                "measure": name,
                "value": float(found.value),
                "standard_error": float(found.standard_error),
                "seconds": time.perf_counter() - began,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # KiB on Linux
                "n_rounds": 1,
                "hardware": hardware(),
                "date": pd.Timestamp.now(tz="UTC").date().isoformat(),
            }
        )
        print(f"{name}: {table[-1]['seconds']:.1f} s, {table[-1]['peak_mib']:.0f} MiB", file=sys.stderr, flush=True)
    return pd.DataFrame(table)


def main(config: Config) -> int:
    return report(run(config), "seconds", config.out)


if __name__ == "__main__":
    sys.exit(command("operator", Config, main))
