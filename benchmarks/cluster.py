"""What a cluster costs: blocks on one worker of a Dask cluster against the same blocks one after another here.

The difference is all that is not training: to pickle and send, to start the process that a block runs in, to wait.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from distributed import Client, LocalCluster

import ticketlab as tl
from benchmarks.timing import alternate, command, hardware, median_ratio, report
from ticketlab.engine.sweep import sweep


@dataclass(frozen=True)
class Config:
    """Time a sweep of blocks on one worker against the plain loop over them."""

    rounds: int = 3
    """Alternations; medians are over these."""
    blocks: int = 2
    """Blocks of one seed in each timing."""
    steps: int = 20000
    """Steps of the one training of a block, of mlp_100_50 on the digits."""
    out: Path | None = None
    """Write the table to this CSV file too."""


def trained(config: tl.ImpConfig, folder: Path, client: Client | None) -> None:
    """All blocks, in a store that is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    sweep([config], folder, client=client, device="cpu", progress=False)


def main(config: Config) -> int:
    torch.set_num_threads(1)
    recipe = tl.Recipe(steps=config.steps, eval_every=config.steps)
    study = tl.ImpConfig(levels=0, init_seeds=tuple(range(config.blocks)), recipe=recipe)
    quiet = {"dashboard_address": None, "silence_logs": 50}
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(n_workers=1, threads_per_worker=1, **quiet) as cluster,
        Client(cluster) as client,
    ):
        one = partial(trained, study, Path(folder) / "store")
        seconds = alternate({"here": partial(one, None), "cluster": partial(one, client)}, config.rounds, warmup=0)
    medians = {f"{name}_s": statistics.median(times) for name, times in seconds.items()}
    row = {"blocks": config.blocks, "steps": config.steps, **medians}
    row |= {"block_s": medians["here_s"] / config.blocks}
    row |= {"cluster_over_here": median_ratio(seconds["cluster"], seconds["here"])}
    row |= {"hardware": hardware(), "n_rounds": config.rounds}
    return report(pd.DataFrame([row]), "seconds", config.out)


if __name__ == "__main__":
    sys.exit(command("cluster", Config, main))
