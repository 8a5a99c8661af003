"""Data sets as tensors on one device: a ``Task`` with its splits, the seeded batch order, augmentation.

Named sets come from ``raw``; anything else through ``Task.from_tensors``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from ticketlab.errors import Refused, nearest
from ticketlab.raw import SOURCES, Augmentation, Source, read
from ticketlab.seeds import stream


@dataclass(frozen=True)
class Split:
    """Examples and their labels.

    Attributes:
        x: Inputs, floating.
        y: Labels in 0..n_classes - 1, int64.

    Raises:
        Refused: No examples, or a number of labels that differs.
    """

    x: Float[Tensor, " n *input"]
    y: Int64[Tensor, " n"]

    def __post_init__(self) -> None:
        if self.y.ndim != 1 or self.x.ndim < 1 or not 0 < len(self.x) == len(self.y):
            raise Refused(
                "a split must hold at least one example and one label for each: got x of shape "
                f"{tuple(self.x.shape)} and y of shape {tuple(self.y.shape)}. Pass y as [n]."
            )

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Task:
    """A classification problem held in memory, all splits on one device.

    Attributes:
        name: Of the set; goes into the names of run folders.
        train: What is trained on.
        validation: Split from the training data; early stopping looks here.
        test: Never selected on.
        n_classes: Number of outputs of a model for this task.
        augmentation: ``crop_flip`` where training batches pass through `crop_flip`.

    Raises:
        Refused: Splits that differ in input shape, dtype or device, an x that is not floating, a y
            that is not int64, an unknown augmentation or one that the input shape does not allow.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    n_classes: int
    augmentation: Augmentation = "none"

    def __post_init__(self) -> None:
        splits = (self.train, self.validation, self.test)
        kinds = {(tuple(s.x.shape[1:]), s.x.dtype, s.y.dtype, s.x.device, s.y.device) for s in splits}
        labels = (torch.int64, self.device)
        if len(kinds) > 1 or not self.dtype.is_floating_point or (self.train.y.dtype, self.train.y.device) != labels:
            raise Refused(
                "the splits of a task must share input shape, device and a floating dtype, with labels in int64: "
                f"got (shape, x dtype, y dtype, x device, y device) {kinds}. Build it with Task.from_tensors."
            )
        if self.augmentation not in get_args(Augmentation):
            known = get_args(Augmentation)
            raise Refused(f"augmentation must be one of {known}: got {self.augmentation!r}. Use 'none' if unsure.")
        if self.augmentation == "crop_flip" and len(self.input_shape) != 3:
            raise Refused(
                f"inputs must be images [c, h, w] for crop_flip: got shape {self.input_shape}. "
                "Reshape them, or use augmentation='none'."
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example, such as (1, 28, 28)."""
        return tuple(self.train.x.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.train.x.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs; labels are always int64."""
        return self.train.x.dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Task:
        """The same task elsewhere or in another floating dtype; None leaves as is."""

        def move(split: Split) -> Split:
            return Split(split.x.to(device=device, dtype=dtype), split.y.to(device=device))

        return replace(self, train=move(self.train), validation=move(self.validation), test=move(self.test))

    def limit(self, train: int | None = None, validation: int | None = None, test: int | None = None) -> Task:
        """The first n examples of each split; None keeps all.

        The first n are a random sample, for splits are shuffled when they are made. The one exception
        is a test set of one's own given to `from_tensors`, which keeps the order it came in.

        Raises:
            Refused: An n outside 1..length of its split.
        """

        def cut(what: str, split: Split, n: int | None) -> Split:
            n = len(split) if n is None else n
            if not 1 <= n <= len(split):
                raise Refused(f"the limit of {what} must be in 1..{len(split)}: got {n}. Use None to keep all.")
            return Split(split.x[:n].clone(), split.y[:n].clone())  # views would keep the whole set in memory

        return replace(
            self,
            train=cut("train", self.train, train),
            validation=cut("validation", self.validation, validation),
            test=cut("test", self.test, test),
        )

    def fingerprint(self) -> str:
        """16 hex digits (SHA-256) of all that makes the task what it is, the same on every device."""
        digest = hashlib.sha256(repr((self.name, self.n_classes, self.augmentation)).encode())
        for split in (self.train, self.validation, self.test):
            for tensor in (split.x, split.y):
                digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
                # as bytes, because numpy has no bfloat16
                digest.update(tensor.cpu().flatten().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    @classmethod
    def from_tensors(
        cls,
        x: Tensor | np.ndarray,
        y: Tensor | np.ndarray,
        x_test: Tensor | np.ndarray | None = None,
        y_test: Tensor | np.ndarray | None = None,
        *,
        name: str = "custom",
        validation_size: int | float = 0.1,
        test_size: int | float = 0.2,
        split_seed: int = 0,
        n_classes: int | None = None,
        augmentation: Augmentation = "none",
    ) -> Task:
        """A task from arrays. The inputs are *not* normalised: pass them as the model should see them.

        Args:
            x: Inputs [n, *input], floating and finite.
            y: Labels [n], integers in 0..n_classes - 1.
            x_test: Test inputs, kept in their order. If None, a test set is split off first, with the same seed.
            y_test: Their labels.
            name: Of the task.
            validation_size: Number (int), or fraction (float), of the training examples to validate on.
            test_size: The same for the test set; ignored when x_test is given.
            split_seed: Decides who goes where.
            n_classes: The largest label + 1 if None.
            augmentation: ``none`` or ``crop_flip``.

        Raises:
            Refused: Lengths that differ, NaN or infinity, labels out of range, an empty split.
        """
        if (x_test is None) != (y_test is None):
            raise Refused("x_test and y_test must be given together: got one of them. Pass both or neither.")
        rest = _split("", x, y)
        if x_test is not None and y_test is not None:
            test = _split("_test", x_test, y_test)
        else:
            test, rest = _split_off(rest, test_size, "test_size", stream("test", split_seed))
        labels = torch.cat([rest.y.cpu(), test.y.cpu()])
        low, high = int(labels.min()), int(labels.max())
        n_classes = high + 1 if n_classes is None else n_classes
        if low < 0 or high >= n_classes:
            raise Refused(
                f"labels must be in 0..{n_classes - 1} for n_classes = {n_classes}: got {low}..{high}. "
                "Number the classes from 0, or raise n_classes."
            )
        validation, train = _split_off(rest, validation_size, "validation_size", stream("split", split_seed))
        return cls(name, train, validation, test, n_classes, augmentation)


def _split(suffix: str, x: Tensor | np.ndarray, y: Tensor | np.ndarray) -> Split:
    """Arrays checked for what needs a look at their values."""
    # arrays are copied: torch warns on read-only ones and refuses negative strides
    inputs, labels = (a.detach() if isinstance(a, Tensor) else torch.from_numpy(np.array(a)) for a in (x, y))
    if not inputs.is_floating_point() or not inputs.isfinite().all():
        raise Refused(
            f"x{suffix} must be floating and finite: got {inputs.dtype} with {int((~inputs.isfinite()).sum())} values "
            "NaN or infinite. Convert it with .float(), and drop or fill those."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise Refused(f"y{suffix} must be integer class labels: got {labels.dtype}. Convert it with .long().")
    return Split(inputs, labels.to(inputs.device, torch.int64))


def _split_off(split: Split, size: int | float, what: str, generator: torch.Generator) -> tuple[Split, Split]:
    """`size` examples drawn at random, and the others, both in shuffled order."""
    n = len(split)
    count = max(1, round(size * n)) if isinstance(size, float) and 0 < size < 1 else size
    if not isinstance(count, Integral) or not 1 <= count < n:
        raise Refused(
            f"{what} must be a number of examples in 1..{n - 1} or a fraction that leaves some of {n}: "
            f"got {size}. Choose another, or give more data."
        )
    order = torch.randperm(n, generator=generator).to(split.y.device)
    first, others = order[: int(count)], order[int(count) :]
    return Split(split.x[first], split.y[first]), Split(split.x[others], split.y[others])


NAMES = tuple(SOURCES)


def load(
    name: str,
    *,
    validation_size: int | None = None,
    split_seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Task:
    """A named set, normalised channel by channel, its validation set split from the training data.

    The test set is always the same one, shuffled once; for digits, which has none of its own, it is
    a fixed 360 of the 1,797 examples. Files are looked for under ``TICKETLAB_DATA``: the four IDX files, gzipped
    or plain, in ``mnist`` or ``MNIST/raw`` and ``fashion-mnist`` or ``FashionMNIST/raw``, the binary version of
    CIFAR-10 in ``cifar10/cifar-10-batches-bin``. Otherwise the set comes from OpenML and is cached in
    ``TICKETLAB_DATA/openml``, or in scikit-learn's own folder when the variable is not set.

    Args:
        name: One of `NAMES`.
        validation_size: 5,000 if None, and 200 for digits.
        split_seed: Of the split between training and validation.
        device: Of all tensors.
        dtype: Of the images [n, c, h, w].

    Raises:
        Refused: An unknown name, files that are missing, damaged or of another size, no network.
    """
    if name not in SOURCES:
        raise Refused(nearest("task", name, NAMES))
    if not dtype.is_floating_point:
        raise Refused(f"dtype must be floating: got {dtype}. Use torch.float32.")
    source = SOURCES[name]
    raw = read(name)
    shuffled = torch.randperm(len(raw.y_test), generator=stream("test", 0)).numpy()
    # Normalised before it moves: a GPU divides by way of the reciprocal, and the last bit would differ.
    return Task.from_tensors(
        _normalised(raw.x, source, dtype),
        raw.y,
        _normalised(raw.x_test[shuffled], source, dtype),
        raw.y_test[shuffled],
        name=name,
        validation_size=source.validation_size if validation_size is None else validation_size,
        split_seed=split_seed,
        n_classes=source.n_classes,
        augmentation=source.augmentation,
    ).to(device)


def _normalised(images: np.ndarray, source: Source, dtype: torch.dtype) -> Tensor:
    mean, std = (torch.tensor(values, dtype=dtype).reshape(-1, 1, 1) for values in (source.mean, source.std))
    return torch.from_numpy(images.copy()).to(dtype).div_(source.largest).sub_(mean).div_(std)


def epoch_order(n: int, order_seed: int, epoch: int) -> Int64[Tensor, " n"]:
    """The order in which an epoch visits n examples: a permutation of 0..n - 1, on the CPU."""
    return torch.randperm(n, generator=stream("order", order_seed, epoch))


# One entry a replica and epoch, so that many replicas can step in turn: 60 MB on MNIST, when full.
_recent_order: Callable[[int, int, int], Tensor] = lru_cache(maxsize=128)(epoch_order)


def batch_indices(n: int, batch_size: int, order_seed: int, step: int) -> Int64[Tensor, " batch"]:
    """Which of n training examples a step sees, as a function of the step alone: a resumed run needs no state.

    Epochs have n // batch_size steps; the incomplete batch at the end of an epoch is dropped.

    Args:
        n: Number of training examples.
        batch_size: In 1..n.
        order_seed: Of the replica.
        step: From 0.

    Returns:
        Indices on the CPU, all different.

    Raises:
        Refused: A batch size out of range or a negative step.
    """
    if not 1 <= batch_size <= n:
        raise Refused(f"batch_size must be in 1..{n}, the number of examples: got {batch_size}. Lower it.")
    if step < 0:
        raise Refused(f"step must not be negative: got {step}. Count steps from 0.")
    epoch, batch = divmod(step, n // batch_size)
    order = _recent_order(n, order_seed, epoch)
    return order[batch * batch_size : (batch + 1) * batch_size].clone()  # the cached one must stay as it is


def crop_flip(
    x: Float[Tensor, "batch c h w"], order_seed: int, step: int, padding: int = 4
) -> Float[Tensor, "batch c h w"]:
    """Each image shifted by up to `padding` pixels and mirrored with probability 1/2, as is usual on CIFAR.

    The border is filled with 0 *after* normalisation, which is the mean colour, not black. Draws are made on
    the CPU, so that CPU and GPU agree, and are a function of the seed and the step alone.

    Args:
        x: A training batch.
        order_seed: Of the replica.
        step: From 0.
        padding: Largest shift, at least 0.

    Raises:
        Refused: An x that is not four-dimensional, or a negative padding.
    """
    if x.ndim != 4 or padding < 0:
        raise Refused(
            f"x must be [batch, c, h, w] and padding >= 0: got shape {tuple(x.shape)} and {padding}. Reshape x."
        )
    n, c, h, w = x.shape
    generator = stream("augment", order_seed, step)
    shifts = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
    flips = torch.randint(0, 2, (1, n, 1), generator=generator)
    top, left, flip = torch.cat([shifts, flips]).to(x.device)  # [n, 1] each, in one transfer
    rows = top + torch.arange(h, device=x.device)  # [n, h]
    column = torch.arange(w, device=x.device)
    columns = left + torch.where(flip.bool(), w - 1 - column, column)  # [n, w]
    source = rows[:, :, None] * (w + 2 * padding) + columns[:, None, :]  # [n, h, w], into the padded image
    padded = F.pad(x, (padding,) * 4).flatten(2)
    return padded.gather(2, source.reshape(n, 1, h * w).expand(n, c, h * w)).reshape(x.shape)
