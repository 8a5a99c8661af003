"""``python -m fuzz.soak``: kills, flipped bits, two writers and lost workers, and a table of what came of them.

Whatever happens to a run, it ends in the bytes of an undisturbed one, or says in one line what is wrong. *Silent* is
everything else that was believed, *tracebacks* are all exceptions but a refusal. Exit code 1 where there was any.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from tqdm import tqdm

import ticketlab as tl
from ticketlab.commands import guarded, parsed
from ticketlab.engine.checkpoint import Checkpoints, Half
from ticketlab.engine.sweep import sweep
from ticketlab.errors import Refused

TABLE = Path(__file__).parent.parent / "docs" / "soak.md"
HEAD = """# Soak

`make soak` disturbs small studies of the digits and writes this page. *As undisturbed*: the end has the same bytes, or
what is read the same values; *refused*: one line says what is wrong. *Silent* is everything else, *tracebacks* are all
exceptions but a refusal.

| what | how many | as undisturbed | refused | silent | tracebacks | minutes | date |
|---|---|---|---|---|---|---|---|
"""
STUDY = tl.ImpConfig(
    levels=2, prune_fraction=0.5, init_seeds=(0, 1), snapshot_steps=(20,), recipe=tl.Recipe(steps=60, eval_every=20)
)
REFUSED, FAILED = 2, 3
"""Exit codes of a child."""


@dataclass(frozen=True)
class Config:
    """Disturb studies in every way that a machine has."""

    kills: int = 200
    """Processes killed while they train or write, at moments drawn at random."""
    flips: int = 2000
    """Bits flipped, one at a time, in all files of a run and of a checkpoint."""
    pairs: int = 20
    """Pairs of processes that start the same study at once."""
    workers: int = 20
    """Workers of a cluster of two that are killed while they sweep."""
    seed: int = 0
    """Of what is drawn."""
    out: Path | None = TABLE
    """Page that gets the table; None: printed alone."""


@dataclass
class Tally:
    """What came of the disturbances of one kind."""

    same: int = 0
    refused: int = 0
    silent: int = 0
    tracebacks: int = 0


def train(folder: Path) -> None:
    """The study, with a checkpoint at every look; by the loop, and so the same in a sweep."""
    study = tl.Study(STUDY, device="cpu", execution="loop", progress=False, checkpoint_minutes=0.0)
    list(study.levels(folder))


def contents(folder: Path) -> dict[str, str]:
    """Checksums of all results that are stored, by level."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".csv")]
    return {"/".join(path.parts[-2:]): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def forked(action: Callable[[], object]) -> int:
    """The process id of a copy of this one that does it; its exit code is 0, or that of what stopped it."""
    pid = os.fork()
    if pid:
        return pid
    code = 0
    try:
        action()
    except Refused:
        code = REFUSED
    except BaseException:
        traceback.print_exc()
        code = FAILED
    os._exit(code)


def ended(pid: int) -> int:
    """Its exit code; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _is_over(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def kills(config: Config, folder: Path, whole: Path, tally: Tally) -> None:
    """Each life of a run is cut short until one is not; then its bytes are compared."""
    draw, began = random.Random(config.seed), time.monotonic()
    ended(forked(partial(train, folder / "measured")))
    lifetime, expected, lost, life = time.monotonic() - began, contents(whole), 0, 0
    with tqdm(total=config.kills, desc="kills", disable=None) as bar:
        while lost < config.kills:
            place, code = folder / str(life), -signal.SIGKILL
            while code == -signal.SIGKILL:
                pid = forked(partial(train, place))
                if lost < config.kills:
                    wait, began = draw.uniform(0, lifetime), time.monotonic()
                    while time.monotonic() - began < wait and not _is_over(pid):
                        time.sleep(0.001)
                    os.kill(pid, signal.SIGKILL)
                code = ended(pid)
                lost += code == -signal.SIGKILL
                bar.update(lost - bar.n)
            life += 1
            tally.tracebacks += code != 0
            tally.silent += code == 0 and contents(place) != expected
    tally.same = lost if not tally.tracebacks + tally.silent else 0


def flips(config: Config, folder: Path, whole: Path, tally: Tally) -> None:
    """One bit at a time, in a file drawn at random; then all is read."""
    draw = random.Random(config.seed)
    run, half = shutil.copytree(next(whole.iterdir()), folder / next(whole.iterdir()).name), _half(folder / "half")
    files = [path for root in (run, half.folder) for path in sorted(root.rglob("*")) if path.is_file()]
    files = [path for path in files if path.stat().st_size]
    known = _told(run, half)
    for _ in tqdm(range(config.flips), desc="flips", disable=None):
        path = draw.choice(files)
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        before = path.read_bytes()
        path.write_bytes(content)
        try:
            found = _told(run, half)
        except Refused:
            tally.refused += 1
        except Exception:
            traceback.print_exc()
            tally.tracebacks += 1
        else:
            tally.same += found == known
            tally.silent += found != known
        path.write_bytes(before)


def _half(folder: Path) -> Checkpoints:
    """The checkpoint of a study that was stopped after its second look."""
    pid = forked(partial(train, folder))
    while not (found := list(folder.glob("*/level_01.checkpoint/state.json"))):
        time.sleep(0.002)
    os.kill(pid, signal.SIGSTOP)
    place, run = found[0].parent, found[0].parent.parent
    kept = shutil.copytree(place, folder.with_name("checkpoint") / place.name)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    return Checkpoints(kept, run.name.rpartition("-")[2])


def _told(run: Path, half: Checkpoints) -> list[Any]:
    """All that a reader learns of a run and of a checkpoint, as values that can be compared."""
    found = tl.load_run(run)
    parts: list[Any] = [replace(found.config), len(found)]
    for level in found:
        states = (level.start, level.end, *level.snapshots.values())
        tensors = [t for s in states for part in s for t in part.values()] + [*level.masks.values()]
        parts += [level.density, level.wall_seconds, [*level.snapshots], _digest(tensors)]
        parts += [table.to_csv() for table in (level.metrics, level.curves)]
    read = half.read(torch.device("cpu"), _optimizers(half))
    if read is None:
        raise Refused("a checkpoint must be whole: this one is not read.")
    return [*parts, *_of_half(read)]


def _optimizers(half: Checkpoints) -> int:
    return len(STUDY.init_seeds) * len(STUDY.treatments)


def _of_half(half: Half) -> Iterator[Any]:
    yield dict(half.state)
    yield {name: _digest([tensor]) for name, tensor in half.tensors.items()}


def _digest(tensors: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pairs(config: Config, folder: Path, whole: Path, tally: Tally) -> None:
    """Two at once: one writes, the other is refused, or comes late and reads."""
    expected = contents(whole)
    for number in tqdm(range(config.pairs), desc="writers", disable=None):
        both = [forked(partial(train, folder / str(number))) for _ in range(2)]
        codes = sorted(ended(pid) for pid in both)
        tally.refused += codes.count(REFUSED)
        tally.tracebacks += sum(code not in (0, REFUSED) for code in codes)
        right = contents(folder / str(number)) == expected and codes[0] == 0
        tally.same += right
        tally.silent += not right


def workers(config: Config, folder: Path, whole: Path, tally: Tally) -> None:
    """Sweeps on a cluster of two, one worker after another killed, until there were enough."""
    from distributed import Client, LocalCluster, Status  # noqa: PLC0415  (ticketlab[cluster])

    draw, lost = random.Random(config.seed), 0
    blocks = replace(STUDY, init_seeds=tuple(range(8)))
    sweep([blocks], folder / "here", progress=False)
    quiet: dict[str, Any] = {"dashboard_address": None, "silence_logs": 50}
    with (
        tqdm(total=config.workers, desc="workers", disable=None) as bar,
        LocalCluster(n_workers=2, threads_per_worker=1, **quiet) as cluster,
        Client(cluster) as client,
    ):
        while lost < config.workers:
            done, place = Event(), folder / f"swept_{lost}"

            def kill(done: Event = done) -> None:
                nonlocal lost
                while not done.wait(draw.uniform(1, 6)) and lost < config.workers:
                    cluster.scale(2)  # Dask gives up a worker that dies while it starts
                    processes = [nanny.process for nanny in [*cluster.workers.values()]]
                    running = [pid for p in processes if p and p.status == Status.running and (pid := p.pid)]
                    if running:
                        os.kill(draw.choice(running), signal.SIGKILL)
                        lost += 1
                        bar.update()

            killer = Thread(target=kill)
            killer.start()
            try:
                sweep([blocks], place, client=client, retries=200, progress=False)
            except Exception:
                traceback.print_exc()
                tally.tracebacks += 1
            done.set()
            killer.join()
            tally.silent += _by_run(place) != _by_run(folder / "here")
    tally.same = lost if not tally.tracebacks + tally.silent else 0


def _by_run(folder: Path) -> dict[str, dict[str, str]]:
    return {run.name: contents(run) for run in sorted(folder.iterdir())}


KINDS: dict[str, Callable[[Config, Path, Path, Tally], None]] = {
    "kills": kills,
    "flips": flips,
    "pairs": pairs,
    "workers": workers,
}


def main(argv: list[str] | None = None) -> int:
    """Exit code: 1 where anything went wrong; otherwise as of ``commands.guarded``."""
    return guarded(lambda: _answer(parsed(Config, argv, prog="python -m fuzz.soak")))


def _answer(config: Config) -> int:
    torch.set_num_threads(1)  # a copy of a process has no threads but one
    rows, wrong = [], 0
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        train(whole)
        for name, disturb in KINDS.items():
            n, tally, began = getattr(config, name), Tally(), time.monotonic()
            if n:
                disturb(config, Path(place) / name, whole, tally)
            minutes, date = (time.monotonic() - began) / 60, datetime.now(UTC).strftime("%Y-%m-%d")
            cells = (name, n, tally.same, tally.refused, tally.silent, tally.tracebacks, f"{minutes:.1f}", date)
            rows.append("| " + " | ".join(map(str, cells)) + " |")
            print(rows[-1], flush=True)
            wrong += tally.silent + tally.tracebacks
    if config.out is not None:
        config.out.write_text(HEAD + "\n".join(rows) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
