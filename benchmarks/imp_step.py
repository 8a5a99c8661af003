"""Milliseconds a replica-step of the engine, against a plain loop and against the floor of the arithmetic.

(a) plain: one LeNet-300-100 as an ``nn.Sequential``, data in memory, an indexed batch, cross-entropy, backward,
gradients times masks, ``torch.optim.Adam`` as it comes; and the same with ``fused=True``, to tell what comes of the
optimizer alone. (b) the engine's training segment for R replicas.

The floor is what no program with this arithmetic can beat on this machine: multiply-adds of the forward pass, the
weight gradients and the inner input gradients at the rate of a large matrix product, plus the bytes that weights
(read forward, read and written by the optimizer), masks (a byte a weight) and Adam's two moments (read and written)
move at the rate of a copy that moves as many bytes. Both rates are measured in the same rounds.
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
import torch.nn.functional as F

import ticketlab as tl
from benchmarks.timing import alternate, command, hardware, median_ratio, report
from ticketlab.engine.advance import advancing
from ticketlab.engine.start import Start
from ticketlab.models import mlp
from ticketlab.state import Masks, stack, stack_states

MATRIX = 1024  # side of the square product that gives the matrix-product rate
REPEATS = 10  # products or copies in one timing
WEIGHTS = 266_200  # of LeNet-300-100
MOVED = WEIGHTS * (3 * 4 + 4 * 4 + 1)  # bytes a step: float32 weights read twice and written, moments, a byte of mask


@dataclass(frozen=True)
class Config:
    """Time the training step of LeNet-300-100 on random inputs of MNIST's shape."""

    replicas: tuple[int, ...] = (1, 5, 10)
    """Stack sizes of the engine."""
    batch_sizes: tuple[int, ...] = (60, 128)
    """Examples a step."""
    rounds: int = 15
    """Alternations; medians are over these."""
    steps: int = 40
    """Steps in each timing."""
    density: float = 0.2
    """Of the masks."""
    device: str = "cpu"
    """Where."""
    out: Path | None = None
    """Write the table to this CSV file too."""


def lenet() -> torch.nn.Module:
    return mlp((784,), 10, hidden=(300, 100))


def masks_of(model: torch.nn.Module, density: float, seed: int) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(m.shape, generator=generator) < density for n, m in tl.masks.ones(model).items()}


def plain(task: tl.Task, config: Config, batch_size: int, *, fused: bool | None = None) -> Callable[[], None]:
    """The loop that one writes first; with ``fused`` the one that knows torch.optim well."""
    net = tl.initialise(lenet, 0).to(task.device)
    masks = {n: m.float().to(task.device) for n, m in masks_of(net, config.density, 0).items()}
    params = dict(net.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            params[name].mul_(mask)
    optimizer = torch.optim.Adam(net.parameters(), lr=1.2e-3, fused=fused)
    x, y = task.train.x, task.train.y
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).to(task.device)

    def run() -> None:
        for step in range(config.steps):
            index = order[step * batch_size : (step + 1) * batch_size]
            optimizer.zero_grad()
            F.cross_entropy(net(x[index]), y[index]).backward()
            for name, mask in masks.items():
                params[name].grad.mul_(mask)
            optimizer.step()

    return run


def engine(task: tl.Task, config: Config, batch_size: int, replicas: int) -> Callable[[], None]:
    """A segment between two evaluations, as ``train`` runs it."""
    nets = [tl.initialise(lenet, r) for r in range(replicas)]
    every = [{n: m.to(task.device) for n, m in masks_of(net, config.density, r).items()} for r, net in enumerate(nets)]
    states = [tl.state(net).to(task.device, task.dtype) for net in nets]
    starts = [Start(state, masks, r) for r, (state, masks) in enumerate(zip(states, every, strict=True))]
    recipe, live = tl.Recipe(steps=10**6, batch_size=batch_size), stack_states([start.begun for start in starts])
    advance = advancing(nets[0], live, stack(every), starts, task, recipe)
    return lambda: advance(range(config.steps), range(replicas))


def floor_ms(batch_size: int, macs_per_second: float, bytes_per_second: float) -> float:
    """Milliseconds that arithmetic and memory traffic alone take for one replica-step."""
    macs = batch_size * (3 * WEIGHTS - 784 * 300)  # the first layer's inputs need no gradient
    return 1e3 * (macs / macs_per_second + MOVED / bytes_per_second)


def run(config: Config) -> pd.DataFrame:
    """One row a batch size and contestant, medians over rounds."""
    device = torch.device(config.device)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12_000, 784, generator=generator), torch.randint(0, 10, (12_000,), generator=generator)
    task = tl.Task.from_tensors(x, y, n_classes=10).to(device)
    return pd.concat([_one_batch_size(config, task, size) for size in config.batch_sizes], ignore_index=True)


def _one_batch_size(config: Config, task: tl.Task, batch_size: int) -> pd.DataFrame:
    """Everything that one batch size needs in the same rounds: plain, engine, matrix product and copies."""
    a, b = torch.randn(2, MATRIX, MATRIX, device=task.device)
    source = {r: torch.randn(r * MOVED // 8, device=task.device) for r in config.replicas}
    target = {r: torch.empty_like(tensor) for r, tensor in source.items()}
    contestants = {"plain": plain(task, config, batch_size), "product": partial(_repeat, partial(torch.mm, a, b))}
    contestants["plain, fused Adam"] = plain(task, config, batch_size, fused=True)
    for r in config.replicas:
        contestants[f"engine R={r}"] = engine(task, config, batch_size, r)
        contestants[f"copy R={r}"] = partial(_repeat, partial(target[r].copy_, source[r]))
    seconds = alternate(contestants, config.rounds, warmup=2)
    macs_per_second = REPEATS * MATRIX**3 / statistics.median(seconds["product"])
    rows = []
    for name, r in [("plain", 1), ("plain, fused Adam", 1), *((f"engine R={r}", r) for r in config.replicas)]:
        like = r if r in config.replicas else config.replicas[0]
        bytes_per_second = REPEATS * 8 * source[like].numel() / statistics.median(seconds[f"copy R={like}"])
        ms = statistics.median(1e3 * s / config.steps / r for s in seconds[name])
        floor = floor_ms(batch_size, macs_per_second, bytes_per_second)
        rows.append(
            {
                "batch_size": batch_size,
                "contestant": name,
                "ms_per_replica_step": ms,
                "times_faster_than_plain": r * median_ratio(seconds["plain"], seconds[name]),
                "floor_ms": floor,
                "times_the_floor": ms / floor,
                "gflops": 2e-9 * macs_per_second,
                "copy_gb_per_second": 1e-9 * bytes_per_second,
                "n_rounds": config.rounds,
                "hardware": hardware(),
            }
        )
    return pd.DataFrame(rows)


def _repeat(call: Callable[[], object]) -> None:
    for _ in range(REPEATS):
        call()


def main(config: Config) -> int:
    return report(run(config), "milliseconds a replica-step", config.out)


if __name__ == "__main__":
    sys.exit(command("imp_step", Config, main))
