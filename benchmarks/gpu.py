"""Replica-steps per second on a GPU: the engine's stacks against the loop that one writes first, eager and compiled.

Every case trains one family on random inputs of its data's shape, all contestants in the same rounds. Two shares say
what is left to gain: of the rate of a large matrix product in the same precision, and of a copy's for the bytes that
weights, moments and masks move. Memory is the most that the device's allocator held beyond what stood before.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

import ticketlab as tl
from benchmarks.timing import alternate, command, hardware
from ticketlab.engine import cost
from ticketlab.engine.advance import advancing
from ticketlab.engine.recipe import Precisions
from ticketlab.engine.start import Start
from ticketlab.engine.step import training_loss
from ticketlab.state import stack, stack_states

DENSITY = 0.2
MOVED = 3 * 4 + 4 * 4 + 1  # bytes per weight and step: read twice and written, two moments, a byte of mask
MATRIX = 4096  # side of the square product that gives the arithmetic's rate


@dataclass(frozen=True)
class Case:
    """One family at one batch size."""

    model: str
    shape: tuple[int, ...]
    batch_size: int
    replicas: tuple[int, ...]
    precision: Precisions = "float32"
    compiled: bool = False
    """Whether the plain loop is compiled too, which takes up to a minute."""


CASES = (
    Case("lenet_300_100", (1, 28, 28), 60, (1, 5, 20, 64, 512), compiled=True),
    Case("conv_2", (3, 32, 32), 60, (1, 8, 32)),
    Case("resnet_20", (3, 32, 32), 128, (1, 8, 32), "bfloat16", compiled=True),
    Case("vit_mini", (3, 32, 32), 128, (1, 8), "bfloat16"),
)
SMALL = (Case("mlp_100_50", (1, 8, 8), 20, (1, 3)),)


@dataclass(frozen=True)
class Config:
    """Time stacks of replicas on a GPU against plain loops."""

    rounds: int = 5
    """Alternations; medians are over these."""
    steps: int = 20
    """Steps in each timing."""
    small: bool = False
    """One small family, as for a CPU."""
    device: str = "cuda"
    """Where."""
    out: Path | None = None
    """Write rows, device and versions to this JSON file too."""


@dataclass(frozen=True)
class Problem:
    """What the contestants of a case share."""

    task: tl.Task
    recipe: tl.Recipe
    factory: Callable[[], nn.Module]
    steps: int

    def start(self, seed: int) -> Start:
        net = tl.initialise(self.factory, seed)
        generator = torch.Generator().manual_seed(seed)
        drawn = {n: torch.rand(m.shape, generator=generator) < DENSITY for n, m in tl.masks.ones(net).items()}
        masks = {n: mask.to(self.task.device) for n, mask in drawn.items()}
        return Start(tl.state(net).to(self.task.device, self.task.dtype), masks, seed)


def plain(problem: Problem, compiled: bool = False) -> Callable[[], None]:
    """One network, as one writes it first: an indexed batch, backward, gradients times masks, Adam."""
    net, start, task = tl.initialise(problem.factory, 0).to(problem.task.device), problem.start(0), problem.task
    params = dict(net.named_parameters())
    masks = [(params[n], m.float()) for n, m in start.masks.items()]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=compiled)
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0)).to(task.device)
    loss = partial(training_loss, net, task=task, recipe=problem.recipe)
    loss = torch.compile(loss) if compiled else loss
    batch = problem.recipe.batch_size

    def run() -> None:
        for step in range(problem.steps):
            index = order[step * batch : (step + 1) * batch]
            optimizer.zero_grad()
            loss(task.train.x[index], task.train.y[index]).backward()
            for weight, mask in masks:
                assert weight.grad is not None
                weight.grad.mul_(mask)
            optimizer.step()

    return run


def engine(problem: Problem, replicas: int) -> Callable[[], None]:
    """A segment between two evaluations, as ``train`` runs it."""
    starts = [problem.start(seed) for seed in range(replicas)]
    live, masks = stack_states([start.begun for start in starts]), stack([start.masks for start in starts])
    model = tl.initialise(problem.factory, 0)
    advance = advancing(model, live, masks, starts, problem.task, problem.recipe)
    return lambda: advance(range(problem.steps), range(replicas))


def problem_of(case: Case, config: Config) -> Problem:
    generator = torch.Generator().manual_seed(0)
    n = config.steps * case.batch_size + 1000
    x, y = torch.randn(n, *case.shape, generator=generator), torch.randint(0, 10, (n,), generator=generator)
    task = tl.Task.from_tensors(x, y, n_classes=10).to(config.device)
    recipe = tl.Recipe(steps=10**6, batch_size=case.batch_size, precision=case.precision)
    return Problem(task, recipe, partial(tl.models.build, case.model, case.shape, 10), config.steps)


def rates(config: Config, precision: Precisions) -> tuple[float, float]:
    """Multiply-adds per second of a matrix product, bytes per second of a copy: medians of the rounds."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    side = 512 if config.small else MATRIX
    a, b = torch.randn(2, side, side, device=config.device, dtype=dtype)
    source = torch.randn(4 * side**2, device=config.device)
    target = torch.empty_like(source)
    rivals: dict[str, Callable[[], object]] = {
        "product": partial(torch.mm, a, b),
        "copy": partial(target.copy_, source),
    }
    seconds = alternate(rivals, 4 * config.rounds, warmup=3)
    product, copy = (statistics.median(seconds[name]) for name in ("product", "copy"))
    return side**3 / product, 8 * source.numel() / copy


def run(config: Config) -> pd.DataFrame:
    """One row per case and contestant."""
    return pd.DataFrame([row for case in (SMALL if config.small else CASES) for row in rows_of(case, config)])


def rows_of(case: Case, config: Config) -> list[dict[str, Any]]:
    problem = problem_of(case, config)
    ways: dict[str, partial[Callable[[], None]]] = {"plain, eager": partial(plain, problem)}
    if case.compiled:
        ways["plain, compiled"] = partial(plain, problem, compiled=True)
    ways |= {f"engine R={r}": partial(engine, problem, r) for r in case.replicas}
    contestants, first = {}, {}
    for name, way in ways.items():
        with suppress(RuntimeError) if way.keywords else nullcontext():  # nothing here that compiles
            contestants[name], first[name] = begun(way, config.device)
    seconds = alternate(contestants, config.rounds)
    macs_per_second, bytes_per_second = rates(config, case.precision)
    model = tl.initialise(problem.factory, 0).to(config.device)
    ones = tl.masks.ones(model)
    uses = cost.positions(model, problem.task.train.x)
    macs = cost.training_macs(cost.forward_macs(uses, {n: m.numel() for n, m in ones.items()}), case.batch_size, 1)
    moved = MOVED * sum(p.numel() for p in model.parameters())
    rows = []
    for name, taken in seconds.items():
        r = int(name.partition("R=")[2] or 1)
        each = statistics.median(taken) / config.steps / r
        rows.append(
            {
                "model": case.model,
                "precision": case.precision,
                "batch_size": case.batch_size,
                "contestant": name,
                "replicas": r,
                "replica_steps_per_second": 1 / each,
                "ms_per_replica_step": 1e3 * each,
                "times_faster_than_eager": statistics.median(
                    r * a / b for a, b in zip(seconds["plain, eager"], taken, strict=True)
                ),
                "share_of_matrix_product": macs / each / macs_per_second,
                "share_of_copy": moved / each / bytes_per_second,
                "seconds_to_begin": first[name][0],
                "peak_mebibytes": first[name][1],
                "n_rounds": config.rounds,
            }
        )
    return rows


def begun(way: Callable[[], Callable[[], None]], device: str) -> tuple[Callable[[], None], tuple[float, float]]:
    """A contestant that has run once, and what that took: seconds, and MiB beyond what was held (NaN on a CPU)."""
    on_gpu, began = torch.device(device).type == "cuda", time.perf_counter()
    held = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    run = way()
    run()
    peak = (torch.cuda.max_memory_allocated() - held) / 2**20 if on_gpu else float("nan")
    return run, (time.perf_counter() - began, peak)


def main(config: Config) -> int:
    table = run(config)
    print(
        table.drop(columns=["precision", "batch_size", "n_rounds"]).to_string(index=False, float_format="{:.3g}".format)
    )
    print(f"{hardware()}; medians of n = {config.rounds} alternating rounds")
    if config.out is not None:
        versions = {"device": hardware(), "python": platform.python_version(), "date": str(datetime.now(UTC).date())}
        rows = json.loads(table.to_json(orient="records", double_precision=6))
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps({**versions, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(command("gpu", Config, main))
