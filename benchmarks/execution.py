"""How a stack of replicas is best computed: a loop, ``vmap``, or on a GPU recorded steps. What ``auto`` rests on.

Each case trains R replicas for a segment of steps each way, in the same rounds, on random inputs of the task's shape.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch

import ticketlab as tl
from benchmarks.timing import alternate, command, hardware, median_ratio, report
from ticketlab.engine.advance import advancing
from ticketlab.engine.start import Start
from ticketlab.errors import Refused
from ticketlab.network import Execution, resolve
from ticketlab.state import stack, stack_states

CASES = (("mlp_100_50", (1, 8, 8)), ("lenet_300_100", (1, 8, 8)), ("lenet_300_100", (1, 28, 28)), ("conv_2", (1, 8, 8)))
LARGE = (("conv_2_bn", (3, 32, 32)), ("resnet_20", (3, 32, 32)))  # on a GPU


@dataclass(frozen=True)
class Config:
    """Time loop against vmap over families, sizes and numbers of replicas."""

    replicas: tuple[int, ...] = (1, 3, 6, 18)
    """Stack sizes."""
    rounds: int = 5
    """Alternations; medians are over these."""
    steps: int = 20
    """Steps in each timing."""
    device: str = "cpu"
    """Where."""
    out: Path | None = None
    """Write the table to this CSV file too."""


def segment(
    execution: Execution, name: str, shape: tuple[int, ...], replicas: int, config: Config
) -> Callable[[], None]:
    """Training of a stack of dense networks between two evaluations."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(3000, *shape, generator=generator), torch.randint(0, 10, (3000,), generator=generator)
    task = tl.Task.from_tensors(x, y, n_classes=10).to(config.device)
    nets = [tl.initialise(partial(tl.models.build, name, shape, 10), r) for r in range(replicas)]
    masks = {n: m.to(task.device) for n, m in tl.masks.ones(nets[0]).items()}
    starts = [Start(tl.state(net).to(task.device, task.dtype), masks, r) for r, net in enumerate(nets)]
    live, every = stack_states([start.begun for start in starts]), stack([masks] * replicas)
    advance = advancing(nets[0], live, every, starts, task, tl.Recipe(steps=10**6), execution)
    return lambda: advance(range(config.steps), range(replicas))


def run(config: Config) -> pd.DataFrame:
    """One row a case and number of replicas."""
    rows = []
    on_gpu = torch.device(config.device).type == "cuda"
    ways: tuple[Execution, ...] = ("loop", "vmap", "auto") if on_gpu else ("loop", "vmap")
    for name, shape in (*CASES, *LARGE) if on_gpu else CASES:
        model = tl.initialise(partial(tl.models.build, name, shape, 10), 0)
        for r in config.replicas:
            contestants: dict[str, Callable[[], None]] = {}
            for way in ways:
                with suppress(Refused):  # vmap, where its gradients are not those of the loop
                    contestants[way] = segment(way, name, shape, r, config)
            seconds = alternate(contestants, config.rounds)
            named = {"auto": "recorded"}
            ms = {f"{named.get(w, w)}_ms": 1e3 * statistics.median(s) / config.steps / r for w, s in seconds.items()}
            rows.append(
                {
                    "model": name,
                    "input": "x".join(map(str, shape)),
                    "weights": sum(p.numel() for p in model.parameters()),
                    "replicas": r,
                    **ms,
                    "loop_over_vmap": median_ratio(seconds["loop"], seconds["vmap"]) if "vmap" in seconds else math.nan,
                    "chosen": "recorded" if on_gpu else resolve("auto", model, torch.device(config.device), r),
                    "n_rounds": config.rounds,
                    "hardware": hardware(),
                }
            )
    return pd.DataFrame(rows)


def main(config: Config) -> int:
    return report(run(config), "milliseconds a replica-step", config.out)


if __name__ == "__main__":
    sys.exit(command("execution", Config, main))
