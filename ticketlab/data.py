"""Data sets as tensors on one device: a ``Task`` with its splits.

Named sets come from ``datasets``; anything else through ``Task.from_tensors``, which leans on ``arrays``. The order of
batches and their augmentation stand in ``batches``.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral
from typing import get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ticketlab import losses, text
from ticketlab.arrays import as_inputs, as_targets, check_layout, n_outputs
from ticketlab.batches import batch_indices, crop_flip, epoch_order
from ticketlab.datasets import SOURCES, Augmentation, Source, read
from ticketlab.errors import Refused, nearest
from ticketlab.imports import imported, is_own
from ticketlab.losses import FLOATING, LOSSES, Loss, LossName
from ticketlab.mapped import Mapped, rows
from ticketlab.seeds import stream
from ticketlab.shown import as_table

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+:-]{0,99}")
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True, repr=False)
class Split:
    """Examples and what they should give.

    Attributes:
        x: Inputs [n, ...]: floating, or tokens in int64; a tensor, or a `mapped.Mapped` that stands for one on disk.
        y: Labels in int64, [n] or [n, t] with a label per token; or floating targets [n, out].

    Raises:
        Refused: No examples, or a number of labels that differs.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if self.y.ndim < 1 or self.x.ndim < 1 or not 0 < len(self.x) == len(self.y):
            raise Refused(
                "a split must hold at least one example and one label for each: got x of shape "
                f"{tuple(self.x.shape)} and y of shape {tuple(self.y.shape)}. Pass y as [n]."
            )

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        return f"Split({len(self)} examples {tuple(self.x.shape[1:])}, {self.x.dtype})"


@dataclass(frozen=True, repr=False)
class Task:
    """A problem, all splits on one device; inputs in memory, or on disk and read batch by batch (``load_shards``).

    Attributes:
        name: Name of the set, which goes into the names of run folders: letters, digits and ``_ . + : -``.
        train: Examples to train on.
        validation: Split from the training data; early stopping looks here.
        test: Never selected on.
        n_classes: Number of outputs of a model for this task; of each token for labels [n, t].
        augmentation: ``crop_flip`` where training batches pass through `crop_flip`.
        loss: ``cross_entropy`` of labels, or ``squared_error`` of floating targets.

    Raises:
        Refused: A name that is none of a folder, splits that differ in shape, dtype or device, inputs or targets that
            do not fit the loss or each other, images with their channels last, an unknown augmentation or loss.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    n_classes: int
    augmentation: Augmentation = "none"
    loss: LossName = "cross_entropy"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise Refused(
                "the name of a task goes into the names of folders: it must be letters, digits and _ . + : - (100 at "
                f"most, the first a letter, digit or _): got {str(self.name)[:120]!r}. Choose another."
            )
        if self.loss not in tuple(LOSSES):
            raise Refused(nearest("loss", self.loss, list(LOSSES)))
        if self.augmentation not in get_args(Augmentation):
            known = get_args(Augmentation)
            raise Refused(f"augmentation must be one of {known}: got {self.augmentation!r}. Use 'none' if unsure.")
        self._check_splits()
        check_layout(self.input_shape, self.train.x.is_floating_point())
        if self.augmentation == "crop_flip" and len(self.input_shape) != 3:
            raise Refused(
                f"inputs must be images [c, h, w] for crop_flip: got shape {self.input_shape}. "
                "Reshape them, or use augmentation='none'."
            )
        for split in ("train", "validation", "test"):
            self._check_targets(getattr(self, split).y, f"{split} labels")

    def _check_splits(self) -> None:
        x, y = self.train.x, self.train.y
        kinds = {(s.x.shape[1:], s.y.shape[1:], s.x.dtype, s.y.dtype, s.x.device, s.y.device) for s in self.splits()}
        targets = torch.int64 if self.loss == "cross_entropy" else x.dtype if x.is_floating_point() else y.dtype
        if len(kinds) > 1 or x.dtype not in (*FLOATING, torch.int64) or (y.dtype, y.device) != (targets, x.device):
            given = "; ".join(f"x {tuple(k[0])} {k[2]} on {k[4]}, y {tuple(k[1])} {k[3]} on {k[5]}" for k in kinds)
            raise Refused(
                "splits must share input shape, device and dtype (floating, or int64 for tokens), with labels in int64 "
                f"or targets in the dtype of inputs: got {given}. Build it with Task.from_tensors."
            )

    def _check_targets(self, y: Tensor, what: str) -> None:
        least = 2 if self.loss == "cross_entropy" else 1
        if not isinstance(self.n_classes, Integral) or self.n_classes < least:
            raise Refused(f"n_classes must be an integer of at least {least}: got {self.n_classes}.")
        if self.loss == "cross_entropy":
            losses.check_labels(y, self.n_classes, what)
            if y.ndim == 2 and y.shape[1] == self.n_classes and losses.is_one_hot(y):
                raise Refused(f"{what} must be class labels [n]: got one-hot rows {tuple(y.shape)}. Pass y.argmax(1).")
            return
        losses.check_values(y, what.replace("labels", "targets"))
        if y.ndim < 2 or math.prod(y.shape[1:]) != self.n_classes:
            remedy = "Pass y[:, None]." if y.ndim == 1 else "Leave n_classes out."
            raise Refused(f"targets must be [n, {self.n_classes}], a column per output: got {tuple(y.shape)}. {remedy}")

    def __repr__(self) -> str:
        sizes = " + ".join(str(len(split)) for split in self.splits())
        return f"Task({self.name!r}: {sizes} examples {self.input_shape}, {self.n_classes} outputs, {self.device})"

    _repr_html_ = as_table

    def splits(self) -> tuple[Split, Split, Split]:
        """Training, validation and test examples."""
        return self.train, self.validation, self.test

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example, such as (1, 28, 28)."""
        return tuple(self.train.x.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.train.x.device

    @property
    def dtype(self) -> torch.dtype | None:
        """Floating dtype of the inputs, or else of the targets; None where both are integers, as in language models."""
        return next((t.dtype for t in (self.train.x, self.train.y) if t.is_floating_point()), None)

    @property
    def objective(self) -> Loss:
        """The loss that is named, as functions of outputs and targets."""
        return LOSSES[self.loss]

    def map(self, change: Callable[[Split], Split], **others: object) -> Task:
        """The task of changed splits, and of other fields that change with them."""
        train, validation, test = map(change, self.splits())
        return replace(self, train=train, validation=validation, test=test, **others)  # type: ignore[arg-type]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Task:
        """The same task elsewhere or in another floating dtype, integers as they are; None leaves as is.

        Raises:
            Refused: A device that is not there, or a dtype that is not floating.
        """
        if dtype is not None and dtype not in FLOATING:
            raise Refused(f"a task is moved to a floating dtype, its integers stay: got {dtype}. Use torch.float32.")
        if device is not None:
            device = usable_device(device)

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return self.map(lambda split: Split(move(split.x), move(split.y)))

    def limit(self, train: int | None = None, validation: int | None = None, test: int | None = None) -> Task:
        """The first n examples of each split; None keeps all.

        The first n are a random sample, for splits are shuffled when they are made. The one exception
        is a test set of one's own given to `from_tensors`, which keeps the order it came in. What is
        limited is in memory.

        Raises:
            Refused: An n outside 1..length of its split.
        """

        def cut(what: str, split: Split, n: int | None) -> Split:
            if n is None and isinstance(split.x, Mapped):
                return split
            n = len(split) if n is None else n
            if not isinstance(n, Integral) or not 1 <= n <= len(split):
                raise Refused(f"the limit of {what} must be in 1..{len(split)}: got {n}. Use None to keep all.")
            return Split(split.x[:n].clone(), split.y[:n].clone())  # views would keep the whole set in memory

        return replace(
            self,
            train=cut("train", self.train, train),
            validation=cut("validation", self.validation, validation),
            test=cut("test", self.test, test),
        )

    def of_classes(self, first: int, last: int) -> Task:
        """The examples of the classes first to last, numbered anew from 0.

        Raises:
            Refused: Fewer than two classes, one that the task does not have, or no label per example.
        """
        if self.train.y.ndim != 1 or self.loss != "cross_entropy":
            raise Refused(f"classes are chosen by a label per example: {self.name} has {tuple(self.train.y.shape)}.")
        if not all(isinstance(c, Integral) for c in (first, last)) or not 0 <= first < last < self.n_classes:
            raise Refused(f"classes must be FIRST-LAST in 0..{self.n_classes - 1}, two at least: got {first}-{last}.")

        def keep(split: Split) -> Split:
            kept = (split.y >= first) & (split.y <= last)
            return Split(rows(split.x, kept), split.y[kept] - first)

        return self.map(keep, name=f"{self.name}_{first}-{last}", n_classes=last - first + 1)

    def resize(self, height: int, width: int) -> Task:
        """Images of another height and width, bilinear with antialiasing; the same task where they have it.

        Raises:
            Refused: Inputs that are not images, or a side below 1.
        """
        size = (height, width)
        if len(self.input_shape) != 3 or not all(isinstance(side, Integral) and side >= 1 for side in size):
            raise Refused(f"resize needs images [c, h, w] and sides of at least 1: got {self.input_shape} and {size}.")
        if self.input_shape[1:] == size:
            return self
        self._refuse_on_disk("resize")

        def scale(x: Tensor) -> Tensor:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))  # halves have no kernel on a CPU
            return F.interpolate(
                wide, (int(height), int(width)), mode="bilinear", antialias=True, align_corners=False
            ).to(x.dtype)

        return self.map(lambda split: Split(scale(split.x), split.y), name=f"{self.name}_{height}x{width}")

    def grey(self) -> Task:
        """Colour images as their luma in one channel; the same task where there is one channel.

        Taken after normalisation, which gives the channels nearly equal scales.

        Raises:
            Refused: Inputs that have neither one channel nor three.
        """
        if len(self.input_shape) != 3 or self.input_shape[0] not in (1, 3):
            raise Refused(f"grey needs images [c, h, w] of one channel or three: got {self.input_shape}.")
        if self.input_shape[0] == 1:
            return self
        self._refuse_on_disk("grey")

        def fade(x: Tensor) -> Tensor:
            return torch.einsum("nchw,c->nhw", x, x.new_tensor(_LUMA))[:, None]

        return self.map(lambda split: Split(fade(split.x), split.y), name=f"{self.name}_grey")

    def _refuse_on_disk(self, what: str) -> None:
        if any(isinstance(split.x, Mapped) for split in self.splits()):
            raise Refused(f"{what} needs all examples in memory: some are on disk. Do it before they are written.")

    def fingerprint(self) -> str:
        """16 hex digits (SHA-256) of all that makes the task what it is, the same on every device."""
        later = () if self.loss == "cross_entropy" else (self.loss,)  # stored runs know no loss
        digest = hashlib.sha256(repr((self.name, int(self.n_classes), self.augmentation, *later)).encode())
        for split in self.splits():
            for tensor in (split.x, split.y):
                if isinstance(tensor, Mapped):
                    digest.update(tensor.fingerprint().encode())
                    continue
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
        loss: LossName = "cross_entropy",
    ) -> Task:
        """A task from arrays. The inputs are *not* normalised: pass them as the model should see them.

        Args:
            x: Inputs [n, *input], floating and finite, images with channels first; or integer tokens.
            y: Labels [n], integers in 0..n_classes - 1; labels [n, t] of tokens, -100 where one does not count; or
                floating targets [n, out] of the squared error.
            x_test: Test inputs, kept in their order. If None, a test set is split off first, with the same seed.
            y_test: Their labels.
            name: Name of the task.
            validation_size: Number (int), or fraction (float), of the training examples to validate on.
            test_size: The same for the test set; ignored when x_test is given.
            split_seed: Seed of who goes where.
            n_classes: Number of classes, or of tokens. If None every class must have an example.
            augmentation: ``none`` or ``crop_flip``.
            loss: ``cross_entropy`` or ``squared_error``.

        Raises:
            Refused: Lengths that differ, NaN or infinity, labels out of range, an empty split, and whatever `Task`
                refuses.
        """
        if (x_test is None) != (y_test is None):
            raise Refused("x_test and y_test must be given together: got one of them. Pass both or neither.")
        if loss not in tuple(LOSSES):
            raise Refused(nearest("loss", loss, list(LOSSES)))
        inputs = as_inputs(x)
        rest = Split(inputs, as_targets(y, inputs, loss))
        if x_test is not None and y_test is not None:
            inputs = as_inputs(x_test, "x_test")
            test = Split(inputs, as_targets(y_test, inputs, loss, "y_test"))
        else:
            test, rest = _split_off(rest, test_size, "test_size", stream("test", split_seed))
        if n_classes is None:
            same = rest.y.shape[1:] == test.y.shape[1:]  # otherwise Task refuses them, by their shapes
            n_classes = n_outputs(torch.cat([rest.y.cpu(), test.y.cpu()]) if same else rest.y, loss)
        validation, train = _split_off(rest, validation_size, "validation_size", stream("split", split_seed))
        return cls(name, train, validation, test, n_classes, augmentation, loss)


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
    return Split(rows(split.x, first), split.y[first]), Split(rows(split.x, others), split.y[others])


NAMES = (*SOURCES, *text.NAMES)


def load(
    name: str,
    *,
    validation_size: int | None = None,
    split_seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Task:
    """A named set: images normalised channel by channel, or text; its validation set split from the training data.

    The test set is always the same one, shuffled once; for digits, which has none of its own, it is
    a fixed 360 of the 1,797 examples. Files are looked for under ``TICKETLAB_DATA``: the four IDX files, gzipped
    or plain, in ``mnist`` or ``MNIST/raw`` and ``fashion-mnist`` or ``FashionMNIST/raw``, the binary version of
    CIFAR-10 in ``cifar10/cifar-10-batches-bin``. Otherwise the set comes from OpenML and is cached in
    ``TICKETLAB_DATA/openml``, or in scikit-learn's own folder when the variable is not set.

    ``stdlib_lm`` and ``stdlib_topics`` need neither: they are made of the sources of the running Python's standard
    library, see `ticketlab.text`, and bear the digest of that text in their name, ``stdlib_lm.1c0ffee5``. By that name
    they are found again, or refused where the text is another.

    Args:
        name: One of `NAMES`.
        validation_size: 5,000 if None, 200 for digits, and 1,000 and 800 passages for the two of text.
        split_seed: Of the split between training and validation.
        device: Of all tensors.
        dtype: Of the images [n, c, h, w]; tokens [n, t] are int64.

    Raises:
        Refused: An unknown name, files that are missing, damaged or of another size, no network, another text.
    """
    if is_own(name):
        return _own(name, validation_size, split_seed, dtype).to(device)
    if name not in SOURCES and text.split_name(name)[0] not in text.NAMES:
        raise Refused(nearest("task", name, NAMES))
    if dtype not in FLOATING:
        raise Refused(f"dtype must be floating: got {dtype}. Use torch.float32.")
    if name not in SOURCES:
        return _of_text(name, validation_size, split_seed).to(device)
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


def _own(name: str, validation_size: int | None, split_seed: int, dtype: torch.dtype) -> Task:
    """What a user's own function makes, under a name that folders can have."""
    made = imported(name, "a task")()
    if not isinstance(made, Task):
        raise Refused(f"a task of one's own must be a ticketlab.Task: {name} returns {type(made).__name__}.")
    if validation_size is not None or split_seed:
        raise Refused(f"a task of one's own is split by its function {name}: leave out validation_size and split_seed.")
    return made.to(made.device, dtype)


def _of_text(name: str, validation_size: int | None, split_seed: int) -> Task:
    full_name, passages = text.read(name, validation_size=validation_size, split_seed=split_seed)
    train, validation, test = (Split(*(torch.from_numpy(a.astype(np.int64)) for a in part)) for part in passages)
    n_classes = len(text.TOPICS) if train.y.ndim == 1 else text.VOCABULARY
    return Task(full_name, train, validation, test, n_classes)


def usable_device(device: torch.device | str) -> torch.device:
    """The device, tried.

    Raises:
        Refused: A name that torch does not know, or a device that this machine or build of torch does not have.
    """
    try:
        place = torch.empty(0, device=device).device
        if place.type == "meta":
            raise NotImplementedError("it holds no data")
        return place
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        have = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        reason = str(error).strip().partition("\n")[0]
        raise Refused(f"device must be one of this machine's, {have}: got {device!r} ({reason}).") from error


def _normalised(images: np.ndarray, source: Source, dtype: torch.dtype) -> Tensor:
    mean, std = (torch.tensor(values, dtype=dtype).reshape(-1, 1, 1) for values in (source.mean, source.std))
    return torch.from_numpy(images.copy()).to(dtype).div_(source.largest).sub_(mean).div_(std)


__all__ = ["NAMES", "Split", "Task", "batch_indices", "crop_flip", "epoch_order", "load", "usable_device"]
