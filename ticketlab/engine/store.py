"""Run directories: one folder a run, one folder a level, readable without this package.

::

    runs/<task>-<model>-<hash>/config.json
                               level_00/{weights,masks}.safetensors, {metrics,curves}.csv, manifest.json

A level is written under a temporary name, synced and renamed, and counts only with a manifest whose
checksums hold and that names its run and its number, so a process killed at any moment leaves whole levels and nothing
else. Both JSON files end in a seal, a checksum of what else they say. Nothing that is stored is ever written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ticketlab import masks as mask_ops
from ticketlab.engine.level import Level
from ticketlab.errors import Refused
from ticketlab.state import State, select
from ticketlab.version import __version__

CONFIG, MANIFEST, WEIGHTS, MASKS, METRICS, CURVES, LOCK = (
    "config.json",
    "manifest.json",
    "weights.safetensors",
    "masks.safetensors",
    "metrics.csv",
    "curves.csv",
    ".lock",
)


def environment(device: torch.device) -> dict[str, str]:
    """What the numbers were made with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": f"{device.type}: {name}",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ticketlab": __version__,
        "commit": _commit(),
    }


def _commit() -> str:
    """Of the checkout that this file runs from; "unknown" where it is installed without one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--show-prefix", "HEAD"]
    try:
        prefix, _, commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() if prefix == "ticketlab/engine/" else "unknown"


def identity(description: Mapping[str, Any]) -> str:
    """Hash of a JSON-able description: equal for equal content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:10]


def sealed(content: Mapping[str, Any]) -> bytes:
    """A JSON file that ends in a checksum of what else it says."""
    return (json.dumps({**content, "seal": _seal(content)}, indent=2) + "\n").encode()


def _seal(content: Mapping[str, Any]) -> str:
    """Of all but the seal. What was stored before there were seals has no identity and no run either."""
    rest = {key: value for key, value in content.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def is_sealed(content: Mapping[str, Any]) -> bool:
    """Whether it says what its seal was made of."""
    return content.get("seal") == _seal(content)


def plain(value: Any) -> Any:
    """As JSON reads it back: tuples are lists."""
    return json.loads(json.dumps(value))


def is_run(folder: Path) -> bool:
    """Whether a run is stored there.

    Raises:
        Refused: A place that cannot be.
    """
    with refused(folder):
        return (folder / CONFIG).exists()


def n_stored(folder: Path) -> int:
    """How many levels are stored, counted from 0 up to the first that is missing."""
    level = 0
    while (_level_folder(folder, level) / MANIFEST).exists():
        level += 1
    return level


def n_beyond(folder: Path) -> int:
    """How many whole levels are stored after the first that is missing."""
    return sum((level / MANIFEST).exists() for level in _level_folders(folder)) - n_stored(folder)


def place(device: torch.device | str | None) -> torch.device:
    """A device that is there; where None, a CUDA device if there is one, otherwise the CPU.

    Raises:
        Refused: One that PyTorch does not have here.
    """
    try:
        found = torch.device("cuda" if device is None and torch.cuda.is_available() else device or "cpu")
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        why = str(error).strip().partition("\n")[0]
        raise Refused(
            f"device must be one that PyTorch has here, such as cpu or cuda:0: got {device!r}. {why}"
        ) from error
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The stored description of a run, held against the identity that its folder or its file carries.

    Raises:
        Refused: Not a run directory, or a description that is not whole or not what was stored.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise Refused(f"{folder} must be a run directory with a {CONFIG}: found none. Make it with ticketlab imp.")
    remedy = "Restore it, or run again into another store."
    try:
        stored = json.loads(path.read_text())
    except (ValueError, RecursionError, OSError) as error:  # also of a number with more digits than Python reads
        raise Refused(f"{path} must be valid JSON: {error or type(error).__name__}. {remedy}") from error
    if not isinstance(stored, dict) or not {"config", "fingerprint"} <= set(stored):
        raise Refused(f"{path} must describe a study, with config and fingerprint: it does not. {remedy}")
    found = identity({k: v for k, v in stored.items() if k not in ("environment", "identity", "seal")})
    named = re.fullmatch(r".*-([0-9a-f]{10})", folder.name)  # version 0.1 kept it in the name of the folder alone
    for expected in (stored.get("identity"), named and named[1]):
        if expected is not None and found != expected:
            raise Refused(
                f"{path} must be what was stored: its content has the identity {found}, not {expected}. {remedy}"
            )
    if "identity" in stored and not is_sealed(stored):
        raise Refused(f"{path} must be what was stored: it does not match its seal. {remedy}")
    return stored


@contextmanager
def writing(
    folder: Path, description: Mapping[str, Any], environment: Mapping[str, str]
) -> Iterator[Callable[[], None]]:
    """Be the one writer of a run directory: a new one gets its config.json, leftovers of a killed one go.

    Yields:
        What to call before anything is written: it refuses where the lock was taken away, as another may write then.

    Raises:
        Refused: A place that cannot be written, or one that another process writes.
    """
    with refused(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise Refused(
                f"{folder} must have one writer: another process holds it. Wait for it, or stop it."
            ) from error
    try:
        with refused(folder):
            _tidy(folder)
            if not (folder / CONFIG).exists():
                stored = {**description, "identity": identity(description), "environment": dict(environment)}
                write_synced(folder / f"{CONFIG}.tmp", sealed(stored))
                os.replace(folder / f"{CONFIG}.tmp", folder / CONFIG)
                _sync_folder(folder)
        yield partial(_refuse_lost, folder, (folder / LOCK).stat().st_ino)
    finally:
        lock.release()


def _refuse_lost(folder: Path, lock: int) -> None:
    path = folder / LOCK
    if not path.exists() or path.stat().st_ino != lock:
        raise Refused(f"{path} must stay while {folder} is written: it was deleted, and another process may write now.")


def _tidy(folder: Path) -> None:
    """What was never finished goes; a level that lacks its manifest is no level, and stands aside."""
    for leftover in folder.glob("level_*.tmp"):
        shutil.rmtree(leftover)
    for unfinished in _level_folders(folder):
        if not (unfinished / MANIFEST).exists():
            aside = unfinished.with_name(f"{unfinished.name}.without_manifest")
            shutil.rmtree(aside, ignore_errors=True)
            unfinished.rename(aside)


def checkpoint_folder(folder: Path, level: int) -> Path:
    """Where the training of a level leaves its checkpoints."""
    return _level_folder(folder, level).with_suffix(".checkpoint")


@contextmanager
def refused(folder: Path) -> Iterator[None]:
    """A place that fails is a line that names it."""
    try:
        yield
    except OSError as error:
        raise Refused(
            f"{folder} must be a place to write to: {error.strerror or error}. Choose another store, or make room."
        ) from error


def write_level(folder: Path, level: Level, run: str, environment: Mapping[str, str]) -> None:
    """Store a level of the run with this identity, whole or not at all.

    Raises:
        Refused: It cannot be written, as on a full disk.
    """
    files = {
        WEIGHTS: save_tensors(_contiguous(_flatten(level))),
        MASKS: save_tensors(_contiguous(level.masks)),
        METRICS: level.metrics.to_csv(index=False).encode(),
        CURVES: level.curves.to_csv(index=False).encode(),
    }
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    manifest = {
        "run": run,
        "level": level.level,
        "density": level.density,
        "sha256": sums,
        "wall_seconds": level.wall_seconds,
        "execution": level.execution,
        "names": {"masks": [*level.masks], "params": [*level.end.params], "buffers": [*level.end.buffers]},
        "environment": dict(environment),
    }
    target = _level_folder(folder, level.level)
    temporary = target.with_suffix(".tmp")
    with refused(folder):
        temporary.mkdir()
        for name, content in files.items():
            write_synced(temporary / name, content)
        write_synced(temporary / MANIFEST, sealed(manifest))
        _sync_folder(temporary)
        os.rename(temporary, target)
        _sync_folder(folder)


def read_level(folder: Path, level: int, device: torch.device | str = "cpu") -> Level:
    """Read a stored level and hold every file against its checksum, the level against its run and its number.

    Raises:
        Refused: The level is not stored, or a file is missing, truncated, changed or of another level or run.
    """
    path = _level_folder(folder, level)
    if not (path / MANIFEST).is_file():
        raise Refused(f"level {level} must be stored in {folder}: it has {n_stored(folder)} levels, from 0.")
    run = read_config(folder).get("identity")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        content = {name: _verified(path / name, manifest["sha256"][name]) for name in (WEIGHTS, MASKS, METRICS, CURVES)}
        place, wall_seconds = (manifest.get("run"), manifest["level"]), float(manifest["wall_seconds"])
        execution, names = str(manifest.get("execution", "")), manifest.get("names", {})
        broken = "run" in manifest and not is_sealed(manifest)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(_damaged(path / MANIFEST, "is not a whole manifest")) from error
    if broken:
        raise Refused(_damaged(path / MANIFEST, "does not match its seal"))
    if place != (run, level):
        raise Refused(_damaged(path, f"holds level {place[1]} of run {place[0]}, not level {level} of {run}"))
    try:
        return replace(_level(level, content, wall_seconds, device, names), execution=execution)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise Refused(_damaged(path, "does not hold a level, although its checksums fit")) from error


def _level(
    number: int,
    content: Mapping[str, bytes],
    wall_seconds: float,
    device: torch.device | str,
    names: Mapping[str, list[str]],
) -> Level:
    masks = _in_order({n: t.to(device) for n, t in load_tensors(content[MASKS]).items()}, names.get("masks"))
    found = _unflatten({n: t.to(device) for n, t in load_tensors(content[WEIGHTS]).items()})
    parts = ("params", "buffers")
    tensors = {
        key: State(*(_in_order(part, names.get(name)) for part, name in zip(state, parts, strict=True)))
        for key, state in found.items()
    }
    metrics, curves = (pd.read_csv(BytesIO(content[n]), dtype=_INTEGERS) for n in (METRICS, CURVES))
    start, end = tensors.pop("start", State({}, {})), tensors.pop("end")
    snapshots = {int(key.removeprefix("step_")): s for key, s in sorted(tensors.items())}
    ticket = int((metrics["treatment"] == "ticket").idxmax())
    density = float(mask_ops.density(select(masks, ticket))) if masks else 1.0
    return Level(number, density, masks, start, end, metrics, curves, snapshots, wall_seconds)


def _in_order(tensors: dict[str, Tensor], names: list[str] | None) -> dict[str, Tensor]:
    """As they stood when they were stored: safetensors has them in an order that differs from process to process."""
    return {name: tensors[name] for name in (sorted(tensors) if names is None else names)}


_INTEGERS = {"early_stop_step": "Int64", "diverged_step": "Int64"}  # may be missing, and stay integers


def _flatten(level: Level) -> dict[str, Tensor]:
    states = {"start": level.start, "end": level.end}
    states |= {f"step_{step:08d}": s for step, s in level.snapshots.items()}
    return {
        f"{key}/{part}/{name}": tensor
        for key, s in states.items()
        for part, tensors in s._asdict().items()
        for name, tensor in tensors.items()
    }


def _unflatten(tensors: Mapping[str, Tensor]) -> dict[str, State]:
    states: dict[str, State] = {}
    for full, tensor in tensors.items():
        key, part, name = full.split("/", 2)
        getattr(states.setdefault(key, State({}, {})), part)[name] = tensor
    return states


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _level_folder(folder: Path, level: int) -> Path:
    return folder / f"level_{level:02d}"


def _level_folders(folder: Path) -> list[Path]:
    return [path for path in folder.glob("level_*") if re.fullmatch(r"level_\d{2,}", path.name)]


def _verified(path: Path, digest: str) -> bytes:
    if not path.is_file():
        raise Refused(_damaged(path, "is missing"))
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise Refused(_damaged(path, "does not match its checksum"))
    return content


def _damaged(path: Path, what: str) -> str:
    level = path.name if path.name.startswith("level_") else path.parent.name
    return (
        f"{path} {what}. Restore it from a copy, or move {level} and every later level away: "
        "the run then trains them again, to the same bits."
    )


def write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
