"""Writes any data set as shards, one at a time: checked, summed up, and counted only when all of them are there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ticketlab import losses
from ticketlab.arrays import check_layout, n_outputs
from ticketlab.datasets import Augmentation
from ticketlab.errors import Refused
from ticketlab.losses import LossName
from ticketlab.shards import MANIFEST, checksum

_BYTES = 2**28  # of inputs in a shard, about
_PARTS = ("train", "test")

Examples = Iterable[tuple[Any, Any]]


def write_shards(
    folder: str | Path,
    train: Examples,
    test: Examples | None = None,
    *,
    name: str,
    n_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augmentation: Augmentation = "none",
    loss: LossName = "cross_entropy",
    examples_per_shard: int | None = None,
    progress: bool = True,
) -> Path:
    """Write a data set as shards. Nothing but one shard is held in memory at a time, and all targets.

    Inputs are arrays or tensors of one shape and dtype, images with channels first; or images of Pillow, which become
    bytes [c, h, w]. Bytes (uint8) are pixels: they are stored as they are and normalised when they are read. Floating
    inputs are stored as the model should see them; other integers are tokens.

    Args:
        folder: New, or one whose writing was not finished.
        train: Examples to train and validate on: (input, target) each, of a map-style or an iterable data set.
        test: Examples to test on, in their order; None: they are split off when the task is loaded.
        name: Name of the task.
        n_classes: Number of classes, or of tokens; None: every class must have an example.
        mean: Of the channels of pixels in [0, 1]; None: that of ``train``.
        std: The same for the standard deviation.
        augmentation: ``none`` or ``crop_flip``.
        loss: ``cross_entropy`` or ``squared_error``.
        examples_per_shard: As many as make 256 MB when None.
        progress: Show a progress bar where the output is a terminal.

    Returns:
        The folder.

    Raises:
        Refused: A folder that is finished, examples of different shapes or dtypes, NaN or infinity, targets that do not
            fit the loss, normalisation of what are no pixels, and whatever else a task refuses.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        raise Refused(f"{folder} must be a new folder: it holds a finished set. Choose another, or delete it.")
    if examples_per_shard is not None and examples_per_shard < 1:
        raise Refused(f"examples_per_shard must be at least 1: got {examples_per_shard}.")
    if (mean is None) != (std is None):
        raise Refused("mean and std must be given together, or both be taken from the pixels: got one of them.")
    writer = _Writer(folder, loss, n_classes, examples_per_shard)
    parts = {part: given for part, given in zip(_PARTS, (train, test), strict=True) if given is not None}
    shards = {part: writer.write(part, given, progress) for part, given in parts.items()}
    x_shape, x_dtype = writer.kind[0]
    manifest = {
        "format": 1,
        "name": name,
        "n_classes": writer.classes(),
        "augmentation": augmentation,
        "loss": loss,
        "shape": list(x_shape),
        "dtype": str(x_dtype),
        "scale": writer.scale(mean, std),
        "parts": shards,
    }
    content = (json.dumps(manifest, indent=1) + "\n").encode()
    _save(folder / MANIFEST, lambda file: file.write(content))
    return folder


class _Writer:
    """What is known of a set while it is written: all of its examples must agree."""

    def __init__(self, folder: Path, loss: LossName, n_classes: int | None, per_shard: int | None) -> None:
        self.folder, self.loss, self.n_classes, self.per_shard = folder, loss, n_classes, per_shard
        self.kind: list[tuple[tuple[int, ...], np.dtype]] = []
        self.targets: list[Tensor] = []
        self.sums: np.ndarray | None = None  # of training pixels: count, sum and sum of squares, [3, channel]

    def write(self, part: str, examples: Examples, progress: bool) -> list[dict[str, Any]]:
        with _refused(self.folder):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        found: list[dict[str, Any]] = []
        bar = tqdm(
            _each(examples), desc=part, unit="example", total=_length(examples), disable=None if progress else True
        )
        block: list[tuple[np.ndarray, np.ndarray]] = []
        for number, (x, y) in enumerate(bar):
            block.append((self._like_all(_input(x), f"input {number}"), np.asarray(_plain(y))))
            if len(block) == (self.per_shard or max(1, _BYTES // max(1, block[0][0].nbytes))):
                found.append(self._shard(part, len(found), block))
                block = []
        if block:
            found.append(self._shard(part, len(found), block))
        if not found:
            raise Refused(f"{part} must hold at least one example: got none.")
        return found

    def _like_all(self, x: np.ndarray, what: str) -> np.ndarray:
        kind = (x.shape, x.dtype)
        if not self.kind:
            if x.dtype.kind not in "fiu" or x.dtype.itemsize > 8:
                raise Refused(f"inputs must be numbers, floating or integer: got {x.dtype}. Convert them.")
            check_layout(x.shape, x.dtype.kind == "f" or x.dtype == np.uint8)
            self.kind.append(kind)
        if kind != self.kind[0]:
            shape, dtype = self.kind[0]
            raise Refused(
                f"inputs must have one shape and dtype, those of the first, {shape} and {dtype}: {what} has {x.shape} "
                f"and {x.dtype}. Resize images, and pad what is short."
            )
        return x

    def _shard(self, part: str, number: int, block: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
        where = f"shard {number} of {part}"
        x, y = np.stack([example for example, _ in block]), self._checked([target for _, target in block], where)
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            raise Refused(f"inputs must be finite: {where} has {int((~np.isfinite(x)).sum())} values that are not.")
        if x.dtype.kind == "i" and x.min() < 0:
            raise Refused(
                f"inputs of integers are tokens, from 0: {where} has {x.min()}. Convert features to floating."
            )
        if part == "train" and x.dtype == np.uint8:
            self._count(x)
        names = {"x": f"{part}/x_{number:03d}.npy", "y": f"{part}/y_{number:03d}.npy"}
        checksums = {key: _save_array(self.folder / names[key], array) for key, array in (("x", x), ("y", y))}
        return {"n": len(x), **names, "sha256": checksums}

    def _checked(self, targets: Sequence[np.ndarray], where: str) -> np.ndarray:
        if len({t.shape for t in targets}) > 1 or any(t.dtype.kind not in "fiu" for t in targets):
            raise Refused(
                f"targets of {where} must be numbers of one shape: got {sorted({str(t.shape) for t in targets})}."
            )
        y = np.stack(targets)
        if self.loss == "squared_error":
            losses.check_values(torch.from_numpy(y), f"targets of {where}")
        else:
            losses.check_integers(torch.from_numpy(y), f"labels of {where}")
            y = y.astype(np.int64)
            losses.check_labels(torch.from_numpy(y), self.n_classes or int(y.max()) + 1, f"labels of {where}")
        self.targets.append(torch.from_numpy(y))
        return y

    def _count(self, x: np.ndarray) -> None:
        channels = x.swapaxes(0, 1).reshape(x.shape[1], -1) if x.ndim == 4 else x.reshape(1, -1)
        counts = np.stack([np.bincount(channel, minlength=256) for channel in channels])  # [channel, 256]
        values = np.arange(256)
        sums = np.stack([counts.sum(1), counts @ values, counts @ values**2])
        self.sums = sums if self.sums is None else self.sums + sums

    def classes(self) -> int:
        if len({t.shape[1:] for t in self.targets}) > 1:
            raise Refused("targets of training and test examples must have one shape.")
        return n_outputs(torch.cat(self.targets), self.loss) if self.n_classes is None else self.n_classes

    def scale(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> dict[str, list[float]] | None:
        """Of pixels: as given, or that of the training examples."""
        if self.sums is None:
            if mean is not None:
                raise Refused(f"mean and std are of pixels, uint8: the inputs are {self.kind[0][1]}. Leave them out.")
            return None
        n, total, squares = self.sums.astype(np.float64)
        means = total / n / 255 if mean is None else np.array(mean, float)
        deviations = np.sqrt(squares / n - (total / n) ** 2) / 255 if std is None else np.array(std, float)
        if not len(means) == len(deviations) == len(n) or not (deviations > 0).all():
            raise Refused(
                f"mean and std must be {len(n)} numbers, one per channel, and std above 0: got {means.tolist()} and "
                f"{deviations.tolist()}. Give both, where a channel is constant."
            )
        return {"mean": means.tolist(), "std": deviations.tolist()}


def _save_array(path: Path, array: np.ndarray) -> str:
    _save(path, lambda file: np.save(file, array, allow_pickle=False))
    return checksum(path)


def _save(path: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = path.with_suffix(".tmp")
    with _refused(path), temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(path)


@contextmanager
def _refused(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refused(
            f"{place} must be a place to write to: {error.strerror or error}. Choose another, or make room."
        ) from error


def _length(examples: Examples) -> int | None:
    return len(examples) if hasattr(examples, "__len__") else None  # type: ignore[arg-type]


def _each(examples: Any) -> Iterator[tuple[Any, Any]]:
    """The pairs of a data set; a map-style one need not stop at its end by itself."""
    if hasattr(examples, "__len__") and hasattr(examples, "__getitem__"):
        pairs: Iterator[Any] = (examples[i] for i in range(len(examples)))
    else:
        pairs = iter(examples)
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise Refused(f"an example must be a pair of an input and a target: got {type(pair).__name__}.")
        yield pair[0], pair[1]


def _plain(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def _input(x: Any) -> np.ndarray:
    """An array; of an image of Pillow with its channels first."""
    array = np.asarray(_plain(x))
    if hasattr(x, "getbands"):
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return array
