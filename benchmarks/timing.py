"""Timing as every benchmark here does it: alternating, medians, with n."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch

from ticketlab.commands import guarded, parsed

C = TypeVar("C")


def command(name: str, kind: type[C], answer: Callable[[C], int]) -> int:
    """Run a benchmark as the flags of its command say; exit codes as of ``commands.guarded``."""
    return guarded(lambda: answer(parsed(kind, None, prog=f"python -m benchmarks.{name}")))


def alternate(contestants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; every round runs all of them in turn, so that drift hits all alike."""
    for _ in range(warmup):
        for run in contestants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def report(table: pd.DataFrame, unit: str, out: Path | None) -> int:
    """Print a benchmark's table with its hardware and n (columns of it), write it to ``out``; the exit code 0."""
    shown = table.drop(columns=["hardware", "n_rounds"])
    print(shown.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    print(f"{unit}; {table['hardware'].iloc[0]}; medians of n = {table['n_rounds'].iloc[0]} alternating rounds")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(out, index=False, float_format="%.6g")
    return 0


def hardware() -> str:
    """Such as "AMD EPYC, 2 threads, torch 2.13.0"."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
