"""Two processes that train together, started as ``torchrun`` does: what they reach is what one process reaches."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from cases import blobs, small_mlp
from ranks_worker import CASES, SGD, STUDY, problem
from torch.nn import functional as F

import ticketlab as tl
from ticketlab.batches import batch_indices, crop_flip
from ticketlab.engine.training import train

HERE = Path(__file__).parent
ALIKE = [name for name in CASES if name not in ("batch norm", "dropout", "cropped and flipped")]


def started(*argv: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *argv]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def run(*argv: str) -> str:
    process = started(*argv)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said.decode()
    return said.decode()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    run(str(HERE / "ranks_worker.py"), str(folder))
    yield {name: [torch.load(folder / f"{name}-{r}.pt", weights_only=False) for r in (0, 1)] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_all_processes_end_in_the_same_bits(together, name):
    (end, masks, metrics), (other, others, theirs) = together[name]
    for a, b in ((end.params, other.params), (end.buffers, other.buffers), (masks, others)):
        assert all(torch.equal(tensor, b[n]) for n, tensor in a.items())
    assert metrics == theirs


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_reach_what_one_reaches(together, name):
    end, masks, metrics = together[name][0]
    model, starts, task, recipe = problem(name)
    alone = train(model, starts, task, recipe, progress=False, execution="loop")
    for n, p in alone.end.params.items():
        torch.testing.assert_close(end.params[n], p, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(mask, masks[n]) for n, mask in alone.masks.items())
    pd.testing.assert_frame_equal(pd.DataFrame(metrics), alone.metrics, check_dtype=False)


@pytest.mark.parametrize("name", ["batch norm", "cropped and flipped"])
def test_batch_norm_is_that_of_each_share_and_its_running_statistics_are_averaged(together, name):
    """Two plain networks, one for each half of every batch, whose gradients are averaged."""
    end, _, _ = together[name][0]
    _, starts, task, _ = problem(name)
    for r, start in enumerate(starts):
        halves = [problem(name)[0].train() for _ in range(2)]
        with torch.no_grad():
            for half in halves:
                for n, tensor in (*half.named_parameters(), *half.named_buffers()):
                    tensor.copy_({**start.begun.params, **start.begun.buffers}[n])
        optimizers = [
            torch.optim.SGD(h.parameters(), SGD.learning_rate, SGD.momentum, weight_decay=SGD.weight_decay)
            for h in halves
        ]
        for step in range(SGD.steps):
            index = batch_indices(len(task.train), SGD.batch_size, start.order_seed, step)
            x, y = task.train.x[index], task.train.y[index]
            x = crop_flip(x, start.order_seed, step) if task.augmentation == "crop_flip" else x
            for half, optimizer, xs, ys in zip(halves, optimizers, x.chunk(2), y.chunk(2), strict=True):
                optimizer.zero_grad()
                F.cross_entropy(half(xs), ys).backward()
            for name_, p in halves[0].named_parameters():
                q = halves[1].get_parameter(name_)
                p.grad = q.grad = (p.grad + q.grad) / 2 * start.masks.get(name_, 1)
            for optimizer in optimizers:
                optimizer.step()
            if step + 1 in (4, 8, 9):  # where training pauses
                with torch.no_grad():
                    for a, b in zip(halves[0].buffers(), halves[1].buffers(), strict=True):
                        mean = (a + b) / 2 if a.is_floating_point() else a
                        a.copy_(mean), b.copy_(mean)
        for n, tensor in (*halves[0].named_parameters(), *halves[0].named_buffers()):
            found = (end.params | end.buffers)[n][r]
            torch.testing.assert_close(found, tensor.detach(), rtol=1e-9, atol=1e-11)


def contents(run: Path) -> dict[str, str]:
    files = [path for path in sorted(run.rglob("*")) if path.suffix in (".safetensors", ".csv")]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_study_that_is_killed_and_goes_on_ends_in_the_same_bits(tmp_path):
    worker = str(HERE / "ranks_worker.py")
    run(worker, str(tmp_path / "whole"), "study")
    (whole,) = (tmp_path / "whole").iterdir()
    process = started(worker, str(tmp_path / "killed"), "study")
    while not [*(tmp_path / "killed").glob("*/level_01*")]:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    run(worker, str(tmp_path / "killed"), "study")
    (killed,) = (tmp_path / "killed").iterdir()
    assert contents(killed) == contents(whole) and len(tl.load_run(killed)) == 3
    assert tl.verify(killed, model=small_mlp, task=blobs()) == {0: None, 1: None, 2: None}
    alone = list(tl.imp(STUDY, model=small_mlp, task=blobs(), store=None, progress=False, execution="loop"))
    for level, other in zip(tl.load_run(whole), alone, strict=True):
        for n, p in level.end.params.items():
            torch.testing.assert_close(p, other.end.params[n], rtol=1e-8, atol=1e-10)


def test_a_command_trains_on_both_and_one_of_them_speaks(tmp_path):
    flags = ["--levels", "1", "--steps", "20", "--eval-every", "10", "--init-seeds", "0", "--device", "cpu"]
    said = run("-m", "ticketlab", "imp", *flags, "--out", str(tmp_path / "out"), "--store", str(tmp_path / "store"))
    assert said.count("Test error in percent") == 1 and said.count("run: ") == 1
    (table,) = (tmp_path / "out").rglob("levels.csv")
    assert len(pd.read_csv(table)) == 5
