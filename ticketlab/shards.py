"""Data sets that do not fit into memory: a folder of ``.npy`` shards, written once, read batch by batch.

::

    FOLDER/shards.json                    what the data are, and each shard's length and checksums
           train/{x_000,y_000,...}.npy    inputs [n, ...] and targets of so many examples
           test/{x_000,y_000,...}.npy

``shard_writer`` writes it, ``python -m ticketlab.to_shards`` does from the command line.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ticketlab.data import Task, usable_device
from ticketlab.errors import Refused
from ticketlab.losses import FLOATING
from ticketlab.mapped import Scale, opened

MANIFEST = "shards.json"


def load_shards(
    folder: str | Path,
    *,
    validation_size: int | float = 0.1,
    test_size: int | float = 0.2,
    split_seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    verify: bool = False,
) -> Task:
    """The task of a folder of shards. Inputs stay on disk, targets are in memory.

    Who is validated on, and the order of batches, are those of `Task.from_tensors` of the same arrays, and so is every
    bit of a batch. Batches are gathered from all over the disk: it should be a fast one, or the system's cache large.

    Args:
        folder: What `write` has made.
        validation_size: Number (int), or fraction (float), of the training examples to validate on.
        test_size: The same for the test set, where the folder has none.
        split_seed: Seed of who goes where.
        device: Where batches go.
        dtype: Floating dtype of the inputs; tokens are int64.
        verify: Read all shards and compare checksums, see `verify_shards`. Those of targets always are.

    Raises:
        Refused: No finished set there, shards that are missing or of another shape, damaged ones.
    """
    if dtype not in FLOATING:
        raise Refused(f"dtype must be floating: got {dtype}. Use torch.float32.")
    folder, manifest = Path(folder), _manifest(folder)
    if verify:
        verify_shards(folder)
    given = manifest["scale"]
    scale = Scale(tuple(given["mean"]), tuple(given["std"])) if given else None
    parts = {}
    for part, shards in manifest["parts"].items():
        arrays = [_open(folder / s["x"], (s["n"], *manifest["shape"]), manifest["dtype"]) for s in shards]
        x = cast(Tensor, opened(arrays, [s["sha256"]["x"] for s in shards], scale, dtype))
        parts[part] = x, torch.from_numpy(np.concatenate([_targets(folder, shard) for shard in shards]))
    x_test, y_test = parts.get("test", (None, None))
    task = Task.from_tensors(
        *parts["train"],
        x_test,
        y_test,
        name=manifest["name"],
        validation_size=validation_size,
        test_size=test_size,
        split_seed=split_seed,
        n_classes=manifest["n_classes"],
        augmentation=manifest["augmentation"],
        loss=manifest["loss"],
    )
    return task.to(usable_device(device))


def verify_shards(folder: str | Path) -> None:
    """Read every shard and compare its checksum.

    Raises:
        Refused: The names of those that are not what was written.
    """
    folder = Path(folder)
    shards = [shard for part in _manifest(folder)["parts"].values() for shard in part]
    files = [(shard[key], shard["sha256"][key]) for shard in shards for key in ("x", "y")]
    damaged = [name for name, known in files if not (folder / name).is_file() or checksum(folder / name) != known]
    if damaged:
        raise Refused(f"shards must be as they were written: {damaged[:5]} of {folder} are not. Write the folder anew.")


def _manifest(folder: str | Path) -> Mapping[str, Any]:
    path = Path(folder) / MANIFEST
    try:
        found = json.loads(path.read_text())
        if found["format"] == 1:
            _check(found)
            return found
        why = f"format {found['format']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = repr(error)
    raise Refused(f"{folder} must hold a finished set of shards, with its {MANIFEST}: {why}. Write it with write(...).")


def _check(found: Mapping[str, Any]) -> None:
    """Raise a ValueError, KeyError or TypeError where a field is missing or of another kind than it is written."""
    np.dtype(found["dtype"])
    scale, parts = found["scale"], found["parts"]
    shards = [shard for part in parts.values() for shard in part]
    names = [shard[key] for shard in shards for key in ("x", "y")]
    numbers = [] if scale is None else [*scale["mean"], *scale["std"]]
    n_channels = found["shape"][0] if len(found["shape"]) == 3 else 1
    holds = {
        "parts": {"train"} <= set(parts) <= {"train", "test"} and all(parts.values()),
        "shards": all(re.fullmatch(r"(train|test)/[xy]_\d+\.npy", name) for name in names),
        "n": all(type(n) is int and n > 0 for n in (*(shard["n"] for shard in shards), *found["shape"])),
        "sha256": all(isinstance(shard["sha256"][key], str) for shard in shards for key in ("x", "y")),
        "n_classes": type(found["n_classes"]) is int,
        "name, augmentation or loss": all(isinstance(found[key], str) for key in ("name", "augmentation", "loss")),
        "scale": all(type(number) is float and math.isfinite(number) for number in numbers)
        and (scale is None or (len(scale["mean"]) == len(scale["std"]) == n_channels and min(scale["std"]) > 0)),
    }
    if wrong := [what for what, right in holds.items() if not right]:
        raise ValueError(f"{', '.join(wrong)} as it is never written")


def _open(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise Refused(f"{path} must be a shard as it was written: {error}. Write the folder anew.") from error
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise Refused(f"{path} must hold {shape} of {dtype}: it has {array.shape} of {array.dtype}. Write it anew.")
    return array


def _targets(folder: Path, shard: Mapping[str, Any]) -> np.ndarray:
    path = folder / shard["y"]
    if not path.is_file() or checksum(path) != shard["sha256"]["y"]:
        raise Refused(
            f"{path} must be as it was written: its checksum differs, or it is missing. Write the folder anew."
        )
    return np.load(path, allow_pickle=False)


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
